"""ComfyUI inside this process: found, fitted to the machine, imported once; and packs loaded into it."""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DEV = ROOT / ".dev"
NO_COMFYUI = "No ComfyUI here: run `python dev.py test` once, or set COMFYUI_PATH to yours."


def find_comfyui() -> Path | None:
    """The ComfyUI we stand in, else COMFYUI_PATH, else the one that dev.py unpacked; None where there is none."""
    around_us = ROOT.parents[1] if ROOT.parent.name == "custom_nodes" else None
    places = (around_us, os.environ.get("COMFYUI_PATH"), DEV / "ComfyUI")
    return next((Path(place).resolve() for place in places if place and (Path(place) / "main.py").is_file()), None)


def cores() -> int:
    """Physical ones: two threads on one of them only disturb each other."""
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def thread_settings(spare: int = 0) -> dict[str, str]:
    """A thread for each core but `spare`, to be set before torch is imported. They spin while they wait for each other:
    on two cores training is 1.8 times as fast as with sleeping ones, and 5 times as slow as soon as another program
    computes there. So where a browser draws on the same machine, a core is left to it."""
    return {"OMP_NUM_THREADS": str(max(1, cores() - spare))}


def sees_gpu() -> bool:
    """Whether torch can compute on anything but the CPU here."""
    import torch

    xpu = getattr(torch, "xpu", None)
    return torch.cuda.is_available() or torch.backends.mps.is_available() or (xpu is not None and xpu.is_available())


def prepare(base: Path) -> None:
    """Make ComfyUI importable with `base` as its base directory; once, before anything imports a part of it."""
    comfyui = find_comfyui()
    if comfyui is None:
        raise FileNotFoundError(NO_COMFYUI)
    # With our own folder on the path, `import nodes` would find ours instead of ComfyUI's.
    sys.path[:] = [str(comfyui)] + [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    for name, value in thread_settings().items():
        os.environ.setdefault(name, value)
    from comfy.cli_args import args

    args.base_directory = str(base)
    args.cpu = not sees_gpu()
    args.use_pytorch_cross_attention = True


def boot() -> None:
    """Import what ComfyUI's own start imports: core, the extra nodes, the server object that nodes send messages to."""
    import nodes
    from server import PromptServer

    PromptServer(asyncio.new_event_loop())  # registers itself as PromptServer.instance
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))


def load_pack(folder: Path = ROOT, name: str = "counterpoint") -> ModuleType:
    """Load a pack the way ComfyUI does, from its path and not from sys.path, and register its nodes."""
    import nodes

    place = {"submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", **place)
    pack = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    for node in asyncio.run(node_list(pack)):
        schema = node.GET_SCHEMA()
        nodes.NODE_CLASS_MAPPINGS[schema.node_id] = node
        nodes.NODE_DISPLAY_NAME_MAPPINGS[schema.node_id] = schema.display_name
    return pack


async def node_list(pack: ModuleType) -> list[type]:
    """The node classes of a pack, asked for in ComfyUI's order of calls."""
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    return await extension.get_node_list()
