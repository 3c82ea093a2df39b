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
    image_tokens,
    inspect_dataset,
    metrics,
    pocket,
    prior,
    progress,
    prompts,
    similarity,
    snapshots,
    train_embedding,
    train_image_tokens,
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
    train_image_tokens,
    image_tokens,
    prior,
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
        ours = Path(__file__).resolve().parents[1] / "models"  # found after the user's own
        folder_paths.add_model_folder_path("embeddings", str(ours / "embeddings"))
        for name in (features.FOLDER, caption.FOLDER, filter_set.FOLDER, image_tokens.FOLDER, *prior.FOLDERS):
            folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
        for name in (prior.files.FOLDER, image_tokens.FOLDER):
            folder_paths.add_model_folder_path(name, str(ours / name))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for family in FAMILIES for node in family.NODES]
