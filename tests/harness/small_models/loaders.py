"""Loader nodes for the small models; is_dev_only keeps them out of a person's node search."""

import folder_paths
from comfy_api.latest import ComfyExtension, io

from .builders import sd15_clip, sd15_model, sd15_vae
from .families import FAMILIES


class LoadSmallSD15(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SmallModelsLoadSD15",
            display_name="Load Small SD1.5",
            category="small models",
            description="SD1.5's structure at a width of 32 with random weights, for tests.",
            inputs=[io.Int.Input("seed", default=0, min=0, max=2**31, tooltip="Draws the weights. Default 0.")],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            is_dev_only=True,
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        embeddings = folder_paths.get_folder_paths("embeddings")
        return io.NodeOutput(sd15_model(seed), sd15_clip(seed, embeddings), sd15_vae(seed))


class LoadSmallFamily(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SmallModelsLoadFamily",
            display_name="Load Small Family",
            category="small models",
            description="A family's structure at a small width with random weights, for tests.",
            inputs=[io.Combo.Input("family", options=list(FAMILIES), tooltip="1 of the families.")],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            is_dev_only=True,
        )

    @classmethod
    def execute(cls, family: str) -> io.NodeOutput:
        chosen, embeddings = FAMILIES[family], folder_paths.get_folder_paths("embeddings")
        return io.NodeOutput(chosen.model(), chosen.clip(embedding_directory=embeddings), chosen.vae())


class SmallModels(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadSmallSD15, LoadSmallFamily]
