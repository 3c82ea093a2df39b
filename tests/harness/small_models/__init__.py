"""A second pack, for tests only: loaders of small models with random weights, built from ComfyUI's own classes."""


async def comfy_entrypoint():
    from .loaders import SmallModels

    return SmallModels()
