"""What a MODEL, CLIP, VAE or CLIP_VISION does, as a number: equal after a restart, another for other weights or patches."""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Iterator

import comfy.model_patcher
import torch

from .bridge import WordLookup


def fingerprint(thing) -> str:
    """12 hex digits that say what a MODEL, CLIP, VAE or CLIP_VISION does: its weights and its patches, the same after a restart."""
    patcher = getattr(thing, "patcher", thing)
    module = patcher.model
    digest = hashlib.sha256(type(module).__name__.encode())
    config = getattr(getattr(module, "model_config", None), "unet_config", None)
    digest.update(
        json.dumps(
            {k: str(v) for k, v in (config or {}).items() if k not in ("dtype", "device")}, sort_keys=True
        ).encode()
    )
    statistics = [(name, b) for name, b in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
    for name, p in [*module.named_parameters(), *statistics]:
        kept = patcher.backup.get(name)  # what the weight was before a patched clone was loaded into the shared network
        digest.update(name.encode() + _bytes(p if kept is None else kept.weight))
    for name in sorted(patcher.patches):
        digest.update(name.encode())
        for strength, patch, *_ in patcher.patches[name]:
            digest.update(str(strength).encode())
            for t in _tensors(patch):
                digest.update(_bytes(t))
    for name in sorted(patcher.object_patches):
        patch = patcher.object_patches[name]
        digest.update(name.encode() + repr([k.__name__ for k in type(patch).__mro__]).encode())
        for t in getattr(patch, "buffers", tuple)():
            digest.update(_bytes(t))
    patched = (getattr(patcher, part, None) for part in ("model_options", "wrappers", "injections"))
    digest.update(b"".join(_described(part, {}) for part in patched))
    digest.update(str(getattr(thing, "layer_idx", None)).encode())
    for part in getattr(getattr(thing, "tokenizer", None), "__dict__", {}).values():
        lookup = getattr(part, "_try_get_embedding", None)
        while isinstance(lookup, WordLookup):
            for name in sorted(lookup.table):
                for key, vectors in sorted(lookup.table[name].items()):
                    digest.update(f"{name} {key}".encode() + vectors.detach().float().cpu().clone().numpy().tobytes())
            lookup = lookup.otherwise
    return digest.hexdigest()[:12]


def _described(thing, seen: dict[int, object]) -> bytes:
    """What tells one patch from another after a restart: functions by name and by what they enclose, objects by class and public
    attributes. Nothing for what is empty; models inside a patch only by their kind, as their weights move while they are used.
    `seen` keeps what was seen alive, so that nothing new can have its id."""
    if isinstance(thing, torch.Tensor):
        return hashlib.sha256(thing.detach().float().cpu().clone().numpy().tobytes()).digest()
    if isinstance(thing, (bool, int, float, str, torch.device, torch.dtype)):
        return f"{thing!r};".encode()
    if thing is None or id(thing) in seen:
        return b""
    seen[id(thing)] = thing
    if isinstance(thing, dict):
        parts = sorted((str(k).encode(), _described(v, seen)) for k, v in thing.items())
        return b"".join(k + v for k, v in parts if v)
    if isinstance(thing, (list, tuple, set)):
        return b"".join(_described(part, seen) for part in thing)
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    name = f"{kind.__module__}.{kind.__qualname__};".encode()
    if isinstance(thing, (torch.nn.Module, comfy.model_patcher.ModelPatcher, type)):
        return name
    function = getattr(thing, "__func__", thing)
    enclosed = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != types.CellType()]
    enclosed += [getattr(thing, "__self__", None), getattr(function, "__defaults__", None)]
    public = {k: v for k, v in getattr(thing, "__dict__", {}).items() if not k.startswith("_")}
    return name + _described(enclosed, seen) + _described(public, seen)


def _bytes(t: torch.Tensor) -> bytes:
    """16 numbers from everywhere in a tensor."""
    flat = t.detach().flatten()
    return flat[:: max(1, len(flat) // 16)][:16].float().cpu().clone().numpy().tobytes()


def _tensors(patch) -> Iterator[torch.Tensor]:
    if isinstance(patch, torch.Tensor):
        yield patch
    elif isinstance(patch, (list, tuple)):
        for part in patch:
            yield from _tensors(part)
    elif hasattr(patch, "weights"):  # ComfyUI's weight adapters
        yield from _tensors(patch.weights)
