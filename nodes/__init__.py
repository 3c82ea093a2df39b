"""Everything that can be dragged onto the canvas, by family."""

from comfy_api.latest import ComfyExtension, io

from . import pocket

FAMILIES = (pocket,)


class Counterpoint(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]
