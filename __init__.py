"""Counterpoint: teaching diffusion models by contrast, as ComfyUI nodes. The door: it only hands ComfyUI the nodes."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    """What ComfyUI asks a custom node pack for (V3): the extension that lists our nodes."""
    from .nodes import Counterpoint

    return Counterpoint()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
