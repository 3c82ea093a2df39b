"""Everything that can be dragged onto the canvas, by family."""

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import (
    attention,
    caption,
    compare,
    curves,
    dataset,
    embedding,
    features,
    filter_set,
    generate,
    guidance,
    image_sets,
    inspect_dataset,
    metrics,
    pocket,
    progress,
    prompts,
    similarity,
    snapshots,
    train_embedding,
    train_lora,
    views,
)

FAMILIES = (
    pocket,
    dataset,
    caption,
    inspect_dataset,
    generate,
    image_sets,
    filter_set,
    train_embedding,
    train_lora,
    embedding,
    compare,
    snapshots,
    curves,
    features,
    metrics,
    similarity,
    guidance,
    prompts,
    attention,
    views,
)


class Counterpoint(ComfyExtension):
    async def on_load(self) -> None:
        progress.register_routes()
        words = Path(__file__).resolve().parents[1] / "models" / "embeddings"  # found after the user's own
        folder_paths.add_model_folder_path("embeddings", str(words))
        for name in (features.FOLDER, caption.FOLDER, filter_set.FOLDER):
            folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]
