"""Prompts that train and sample a small prior: SD1.5's text encoder at 32 numbers, a CLIP vision of 24, pictures made of noise."""

from importlib import import_module

import comfy.clip_vision
import torch

from harness.small_nets import numbers
from harness.training import node

SMALL_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "hidden_act": "quick_gelu",
                "num_channels": 3, "patch_size": 16, "image_size": 32, "projection_dim": 24, "model_type": "clip_vision_model"}  # fmt: skip
COUNT = 48  # pairs, of which 4 are held out


def small_vision(builders, seed: int = 0, **config):
    """A CLIP_VISION of 24 numbers."""
    made = comfy.clip_vision.ClipVisionModel({**SMALL_VISION, **config})
    builders.draw_weights(made.model, seed)
    return made


def pictures(count: int = COUNT, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shades = torch.rand(count, 1, 1, 3, generator=generator)
    return [(shade * torch.rand(1, 32, 32, 1, generator=generator)) for shade in shades]


def captions(count: int = COUNT) -> list[str]:
    words = ("red", "green", "blue", "grey", "pale", "dark", "odd")
    return [f"a {words[i % 7]} picture of {words[i // 7 % 7]} cats" for i in range(count)]


def training(vision: dict, shown: dict, said: dict, **inputs) -> dict[str, dict]:
    """1 models, 2 pictures, 3 captions, 4 CLIP_VISION, 5 pairs, 6 training, 7 the loss plot."""
    wanted = {"pairs": ["5", 0], "steps": 4, "batch": 8, "network": "small", "look_every": 2, **inputs}
    return {
        "1": node("SmallModelsLoadFamily", family="SD1.5"), "2": shown, "3": said, "4": vision,
        "5": node("CounterpointEmbedPairs", clip=["1", 1], clip_vision=["4", 0], images=["2", 0], captions=["3", 0]),
        "6": node("CounterpointTrainPrior", **wanted),
        "7": node("LossGraphNode", loss=["6", 1]),
    }  # fmt: skip


def sampling(**inputs) -> dict[str, dict]:
    """s the embeddings, t a prompt, u core's unCLIPConditioning, v to look at it."""
    wanted = {"prior": ["6", 0], "clip": ["1", 1], "prompt": "a red picture", "seed": 3, "steps": 2, **inputs}
    return {
        "s": node("CounterpointSamplePrior", **wanted),
        "t": node("CLIPTextEncode", clip=["1", 1], text="a cat"),
        "u": node("unCLIPConditioning", conditioning=["t", 0], clip_vision_output=["s", 0], strength=1.0, noise_augmentation=0.0),
        "v": node("PreviewAny", source=["u", 0]),
    }  # fmt: skip


def made(run, id: str = "s") -> torch.Tensor:
    """(count, d) of what Sample Prior gave."""
    return torch.cat([each.image_embeds for each in run.outputs[id][0]])


def small_prior(pack, dim: int = 24, seed: int = 0, **facts):
    """A prior with random weights of a size that lets every part speak, as in one that was trained; in a space called "small CLIP"."""
    network, starts, prior = (
        import_module(f"{pack.__name__}.training.prior.{name}") for name in ("network", "starts", "prior")
    )
    net = network.drawn(network.Shape(dim, 32, 32, 32, 2, 2, 77), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        net.proj_to_clip_embeddings.weight.copy_(0.2 * numbers(dim, 32, seed=seed + 1))
    start = starts.fit("whitened", numbers(50, 32), 0.2 + 0.5 * numbers(50, dim, seed=2))
    said = {"image": "0123456789ab", "space": "small CLIP", **facts}
    return prior.Prior(net.requires_grad_(False).eval(), start, **said)


def published_clusters(starts, mean: torch.Tensor, std: torch.Tensor, scale: float = 1.0):
    """The start distribution "clusters as published" of these Gaussians (K, d)."""
    whole = {"norm.mean": mean.mean(0), "norm.std": torch.ones(mean.shape[1])}
    return starts.StartDistribution("clusters as published", {**whole, "start.mean": mean, "start.std": std}, scale)
