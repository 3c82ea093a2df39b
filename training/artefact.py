"""Files that are always whole: tensors and the facts about them in one .safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

SUFFIX = ".safetensors"


def write_whole(path: Path, data: bytes) -> None:
    """Write, fsync, rename: whoever reads `path` sees the old bytes or the new ones, never half of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(path: Path, data: bytes) -> Path:
    """Write where nothing lies: a file that holds other bytes stays, and these get the next free number. The same bytes are there
    already."""
    file, n = path, 1
    while file.exists() and file.read_bytes() != data:
        n += 1
        file = path.with_name(f"{path.stem}-{n}{path.suffix}")
    if not file.exists():
        write_whole(file, data)
    return file


def encode(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object] | None = None) -> bytes:
    """The bytes of a .safetensors; metadata values that are not strings are stored as JSON."""
    facts = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in (metadata or {}).items()}
    data = save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, facts)
    end = 8 + int.from_bytes(data[:8], "little")  # safetensors writes the metadata in a random order
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object] | None = None) -> None:
    write_whole(path, encode(tensors, metadata))


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata. Raises OSError or safetensors' own error when the file is missing or broken."""
    with safe_open(path, framework="pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata() or {})


def facts(path: Path) -> dict[str, str]:
    """The metadata alone."""
    with safe_open(path, framework="pt") as f:
        return dict(f.metadata() or {})


def write_tree(path: Path, tree: object) -> None:
    """A nest of dicts, lists, tensors and plain values (an optimiser's state, say) in one file."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(node):
        if isinstance(node, torch.Tensor):
            tensors[key := str(len(tensors))] = node
            return {"tensor": key}
        if isinstance(node, Mapping):
            return {"items": [[k, strip(v)] for k, v in node.items()]}
        if isinstance(node, (list, tuple)):
            return {"list": [strip(v) for v in node]}
        return {"value": node}

    structure = json.dumps(strip(tree))
    write(path, tensors, {"tree": structure})


def read_tree(path: Path) -> object:
    tensors, metadata = read(path)

    def restore(node):
        ((kind, content),) = node.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "items":
            return {k: restore(v) for k, v in content}
        return [restore(v) for v in content] if kind == "list" else content

    return restore(json.loads(metadata["tree"]))
