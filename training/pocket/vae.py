"""Stage VAE: latents of 4 x 16 x 16 that keep colour, outline and texture.

Loss = L1 + MSE + 0.1 gradient L1 + 1.5 chroma L1 + L1 of 8-pixel averages + a small KL. Without the chroma terms, and
without guiding three latent channels towards the mean colour in the first half, all channels are spent on luminance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CROP = 64


class Autoencoding(nn.Module):
    """Pictures (B, 3, H, W) in -1..1 -> reconstruction, mean and log variance of the latent."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, x: torch.Tensor, noise: torch.Tensor):
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(x)).chunk(2, 1)
        latent = mean + noise * (0.5 * log_variance.clamp(-20, 10)).exp()
        return self.vae.decoder(self.vae.post_quant_conv(latent)), mean, log_variance


def crops(images: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """n random 64 x 64 crops at multiples of 8, in -1..1."""
    rows = torch.randint(0, len(images), (n,), generator=generator).tolist()
    corners = (torch.randint(0, (images.shape[-1] - CROP) // 8 + 1, (n, 2), generator=generator) * 8).tolist()
    parts = [images[i, :, y : y + CROP, x : x + CROP] for i, (y, x) in zip(rows, corners, strict=True)]
    return torch.stack(parts).float() / 127.5 - 1


def reconstruction_loss(difference: torch.Tensor) -> torch.Tensor:
    d = difference
    edges = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    chroma = (d - d.mean(1, keepdim=True)).abs().mean()
    return d.abs().mean() + d.square().mean() + 0.1 * edges + 1.5 * chroma + F.avg_pool2d(d, 8).abs().mean()


def encoder_loss(model: nn.Module, images: torch.Tensor, batch: int):
    """The loss of the first part: encoder and decoder together; the guide's weight falls to 0 by half time."""

    def loss(generator: torch.Generator, done: float):
        x = crops(images, batch, generator)
        noise = torch.randn(batch, 4, CROP // 8, CROP // 8, generator=generator)
        y, mean, log_variance = model(x, noise)
        kl = 0.5 * (mean * mean + log_variance.exp() - 1 - log_variance).mean()
        guide = (mean[:, :3] - 4 * F.avg_pool2d(x, 8)).square().mean()
        rebuilt = reconstruction_loss(y - x)
        return rebuilt + 2e-4 * kl + 0.25 * max(0.0, 1 - 2 * done) * guide, {
            "rebuilt": rebuilt.item(),
            "guide": guide.item(),
        }

    return loss


def decoder_loss(vae: nn.Module, images: torch.Tensor, latents: torch.Tensor, batch: int):
    """The loss of the second part: the decoder on whole pictures (its group norms see another world than in crops)."""

    def loss(generator: torch.Generator, done: float):
        rows = torch.randint(0, len(images), (batch,), generator=generator)
        y = vae.decoder(vae.post_quant_conv(latents[rows].float()))
        d = y - (images[rows].float() / 127.5 - 1)
        chroma = (d - d.mean(1, keepdim=True)).abs().mean()
        value = d.abs().mean() + 2 * d.square().mean() + 0.5 * chroma
        return value, {"rebuilt": value.item()}

    return loss


@torch.no_grad()
def encode(vae: nn.Module, images: torch.Tensor, batch: int = 50) -> torch.Tensor:
    """(n, 3, 128, 128) uint8 -> (n, 4, 16, 16) latent means."""
    parts = [images[i : i + batch].float() / 127.5 - 1 for i in range(0, len(images), batch)]
    return torch.cat([vae.quant_conv(vae.encoder(x)).chunk(2, 1)[0] for x in parts])


@torch.no_grad()
def decode(vae: nn.Module, latents: torch.Tensor, batch: int = 25) -> torch.Tensor:
    """(n, 4, 16, 16) -> (n, 3, 128, 128) in 0..1."""
    parts = [vae.decoder(vae.post_quant_conv(latents[i : i + batch].float())) for i in range(0, len(latents), batch)]
    return (torch.cat(parts) * 0.5 + 0.5).clamp(0, 1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(n,) decibels between pictures in 0..1."""
    return -10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


@torch.no_grad()
def whiten(vae: nn.Module, latents: torch.Tensor) -> None:
    """Fold a PCA whitening into quant_conv and post_quant_conv, so that latents have mean 0 and variance 1 per channel.

    Exact: what is decoded does not change.
    """
    mean = latents.mean((0, 2, 3))
    flat = (latents - mean.view(1, -1, 1, 1)).permute(1, 0, 2, 3).flatten(1).double()
    values, vectors = torch.linalg.eigh(flat @ flat.T / flat.shape[1])
    forward = (torch.diag(values.rsqrt()) @ vectors.T).float()
    backward = (vectors @ torch.diag(values.sqrt())).float()
    q, p, c = vae.quant_conv, vae.post_quant_conv, len(mean)
    q.weight[:c, :, 0, 0] = forward @ q.weight[:c, :, 0, 0]
    q.bias[:c] = forward @ (q.bias[:c] - mean)
    q.bias[c:] -= values.log().mean().float()  # log variances: the mean scale, as the posterior is diagonal
    p.bias += p.weight[:, :, 0, 0] @ mean
    p.weight[:, :, 0, 0] = p.weight[:, :, 0, 0] @ backward
