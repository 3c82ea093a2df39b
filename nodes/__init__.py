"""Everything that can be dragged onto the canvas, by family."""

from comfy_api.latest import ComfyExtension, io

from . import compare, dataset, embedding, generate, pocket, progress, train_embedding

FAMILIES = (pocket, dataset, generate, train_embedding, embedding, compare)


class Counterpoint(ComfyExtension):
    async def on_load(self) -> None:
        progress.register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]
