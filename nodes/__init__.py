"""Everything that can be dragged onto the canvas, by family."""

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import (
    compare,
    dataset,
    embedding,
    features,
    generate,
    guidance,
    inspect_dataset,
    metrics,
    pocket,
    progress,
    similarity,
    train_embedding,
    train_lora,
)

FAMILIES = (
    pocket,
    dataset,
    inspect_dataset,
    generate,
    train_embedding,
    train_lora,
    embedding,
    compare,
    features,
    metrics,
    similarity,
    guidance,
)


class Counterpoint(ComfyExtension):
    async def on_load(self) -> None:
        progress.register_routes()
        words = Path(__file__).resolve().parents[1] / "models" / "embeddings"  # found after the user's own
        folder_paths.add_model_folder_path("embeddings", str(words))
        folder_paths.add_model_folder_path(features.FOLDER, str(Path(folder_paths.models_dir) / features.FOLDER))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]
