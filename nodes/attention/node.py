"""Shared Attention: one object in several pictures."""

from __future__ import annotations

from comfy_api.latest import io

from .patch import with_shared_attention


class SharedAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointSharedAttention",
            display_name="Shared Attention",
            category="Counterpoint/attention",
            description="Pictures that are painted in one batch look at each other's subject while they are painted, so that it is the same "
            "object in all of them, each in a scene of its own. Any sampler; put it between the model and the sampler.",
            is_experimental=True,
            search_aliases=["consistent character", "same object", "syncd", "consistory", "story diffusion"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="1 MODEL, which does not change: SD 1.5, SD 2, SDXL, SD 3, FLUX.1, FLUX.2, Qwen-Image, Z-Image, Pocket.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where the subject will be: 1 for each picture of the batch, or 1 for all. Without masks whole pictures are "
                    "shared, and the scenes become alike too.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Share of the sampling after which pictures begin to look at each other: 0 is from the first step.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Share of the sampling after which they stop: 1 is never.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="To the sampler, with all pictures in 1 batch.")],
        )

    @classmethod
    def execute(cls, model, start, end, masks=None) -> io.NodeOutput:
        return io.NodeOutput(with_shared_attention(model, masks, start, end))


NODES = [SharedAttention]
