"""Stage UNet: noise prediction in the latents of the little world, from captions.

What decided the study: weight the loss towards low frequencies. With min-SNR weights everything that is settled at the
highest noise (colour, paper, background) gets almost no gradient.
"""

from __future__ import annotations

import re

import torch
from torch import nn


def alphas_cumprod() -> torch.Tensor:
    """(1000,) of Stable Diffusion's scaled-linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def low_frequency_weights() -> torch.Tensor:
    """(1000,) weights of the eps loss: min(SNR + 1, 5) / SNR, at most 10, mean 0.75."""
    a = alphas_cumprod()
    snr = a / (1 - a)
    weights = ((snr + 1).clamp(max=5) / snr).clamp(max=10)
    return weights / weights.mean() * 0.75


def start_at_zero(unet: nn.Module) -> nn.Module:
    """Residual branches and the output begin as zero: the untrained network is the identity of its skips."""
    for name, m in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)
    return unet


def grow(state: dict[str, torch.Tensor], wide: nn.Module) -> dict[str, torch.Tensor]:
    """Weights for a UNet with more transformer blocks that computes exactly what the smaller one did.

    New blocks end in a zero `proj_out`. In output blocks a new block moves the upsampler's index from 1 to 2.
    """
    grown = {k: v.clone() for k, v in wide.state_dict().items()}
    for k in grown:
        if ".proj_out." in k:
            grown[k].zero_()
    for k, v in state.items():
        moved = re.sub(r"^(output_blocks\.\d+)\.1\.conv\.", r"\1.2.conv.", k)
        target = moved if moved != k and moved in grown else k
        if grown[target].shape != v.shape:
            raise ValueError(
                f"{target} is {tuple(grown[target].shape)} in the larger UNet and {tuple(v.shape)} in the smaller."
            )
        grown[target] = v.clone()
    return grown


def noise_loss(unet: nn.Module, latents: torch.Tensor, words: torch.Tensor, lengths: torch.Tensor, encode, batch: int,
               empty: torch.Tensor, drop: float = 0.1):  # fmt: skip
    """`encode(words, lengths)` gives (B, 77, 128) text states; `empty` (77,) words of the empty caption, used for `drop`."""
    a, weights = alphas_cumprod(), low_frequency_weights()

    def loss(generator: torch.Generator, done: float):
        rows = torch.randint(0, len(latents), (batch,), generator=generator)
        variant = torch.randint(0, len(words), (batch,), generator=generator)
        w, n = words[variant, rows].long(), lengths[variant, rows].clone()
        dropped = torch.rand(batch, generator=generator) < drop
        w[dropped], n[dropped] = empty.long(), 2
        with torch.no_grad():
            context = encode(w, n)
        t = torch.randint(0, 1000, (batch,), generator=generator)
        z = latents[rows].float()
        noise = torch.randn(z.shape, generator=generator)
        signal = a[t].view(-1, 1, 1, 1)
        predicted = unet(signal.sqrt() * z + (1 - signal).sqrt() * noise, t, context=context)
        error = (predicted - noise).square().mean((1, 2, 3))
        return (error * weights[t]).mean(), {"eps": error.mean().item()}

    return loss
