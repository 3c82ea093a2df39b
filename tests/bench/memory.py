"""What learning a word takes on the models people have, in GB: counted on their full-size structures, without their data.

    python dev.py bench memory

Networks and pictures are built on torch's meta device, so that autograd keeps what it would keep and nothing is computed:
any machine can tell what a large one needs. 16-bit weights and activations, flash attention. The sum is what a training
says beforehand: the private copies of MODEL and CLIP and, for each picture of a step with its negative, what backward keeps and
30 % (`memory.OVER_REMEMBERED`), `lean` with gradient checkpointing.

Goals: 6 GB for SD 1.5 at 512 pixels, 10 GB for SDXL at 1024; spec E6: SD 1.5, 2 pictures and 2 negatives, in 12 GB.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

from harness.boot import boot, load_pack, prepare

BATCHES = (1, 2, 8)
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True, "use_checkpoint": False,
    "legacy": False, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
SD15 = {
    **UNET, "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "context_dim": 768,
    "transformer_depth_middle": 1, "transformer_depth_output": [1] * 9 + [0] * 3, "adm_in_channels": None, "use_linear_in_transformer": False,
}  # fmt: skip
SDXL = {
    **UNET, "num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "context_dim": 2048,
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "adm_in_channels": 2816,
    "use_linear_in_transformer": True, "num_classes": "sequential",
}  # fmt: skip


class Size(NamedTuple):
    """A model at its true size."""

    family: str  # in comfy.supported_models
    unet: dict
    pixels: int
    text: int  # numbers in its text encoders, of which a caption's own activations are small
    goal: float  # GB


SIZES = {
    "SD 1.5, 512 pixels": Size("SD15", SD15, 512, 123_060_480, 6),
    "SDXL, 1024 pixels": Size("SDXL", SDXL, 1024, 123_060_480 + 694_659_840, 10),
}


def main(argv: list[str]) -> None:
    prepare(Path(tempfile.mkdtemp(prefix="counterpoint-bench-")))
    boot()
    pack = load_pack()
    print(
        f"{'GB':24}{'weights':>9}{'way':>7}" + "".join(f"{f'{b} + {b} pictures':>18}" for b in BATCHES) + f"{'goal':>7}"
    )
    for name, model in SIZES.items():
        weights, kept = count(pack, model)
        for way in ("fast", "lean"):
            needs = "".join(f"{(weights + 2 * b * getattr(kept, way)) / 1e9:18.1f}" for b in BATCHES)
            print(f"{name:24}{weights / 1e9:9.1f}{way:>7}{needs}{model.goal:7.0f}")


def count(pack, model: Size):
    """Bytes of the weights, and what one picture adds to what is kept."""
    import comfy.supported_models
    import torch

    training, half = pack.training, torch.float16
    config = getattr(comfy.supported_models, model.family)(dict(model.unet))
    config.set_inference_dtype(half, None)
    with pack.nodes.bridge.training_mode():
        network = config.get_model({}, "", device="meta").diffusion_model.requires_grad_(False)
        counts = [
            training.memory.remembered(forward(network, model, n), training.checkpointing.blocks(network))
            for n in (2, 1)
        ]
    more = training.memory.OVER_REMEMBERED
    kept = training.memory.Kept(*((two - one) * more for two, one in zip(*counts, strict=True)))
    return 2 * (sum(p.numel() for p in network.parameters()) + model.text), kept


def forward(network, model: Size, n: int):
    import torch

    def numbers(*shape, **given):
        return torch.empty(n, *shape, device="meta", dtype=torch.float16, **given)

    side, told = model.pixels // 8, {}
    if model.unet["adm_in_channels"]:
        told["y"] = numbers(model.unet["adm_in_channels"])
    said = numbers(77, model.unet["context_dim"], requires_grad=True)
    told["transformer_options"] = {"optimized_attention_override": flash}
    return lambda: network(numbers(4, side, side), numbers(), context=said * 1, **told)


def flash(_, q, k, v, heads: int, *rest, **options):
    """(B, n, heads * d), as on a CUDA device; on meta torch would take the way that keeps n x n numbers."""
    import torch

    split = [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    return torch.ops.aten._scaled_dot_product_flash_attention(*split)[0].transpose(1, 2).flatten(2)
