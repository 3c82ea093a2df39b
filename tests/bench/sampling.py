"""Four pictures of Pocket on the CPU: ComfyUI's default attention there, and the one that our demo and server ask for.

    python dev.py bench sampling

ComfyUI started without flags on a CPU takes sub-quadratic attention; `--use-pytorch-cross-attention` takes torch's own.
"""

import tempfile
from pathlib import Path

from harness.boot import boot, load_pack, prepare
from harness.timing import Way, command

PICTURES = 4
ATTENTIONS = {"ComfyUI's default on a CPU": "sub_quad", "split": "split", "torch's own": "pytorch"}


def main(argv: list[str]) -> None:
    command("sampling", argv, load, f"{PICTURES} pictures of 128 pixels, 20 steps, CFG 4, decoded; seconds", rounds=7)


def load() -> dict[str, Way]:
    prepare(Path(tempfile.mkdtemp(prefix="counterpoint-bench-")))
    boot()
    pack = load_pack()
    import torch
    from comfy.ldm.modules.attention import get_attention_function

    models, generate = pack.nodes.pocket_models, pack.nodes.generate
    model, clip, vae = models.load_model(), models.load_clip(), models.load_vae()
    recipe = generate.Recipe("", 128, 128, 0, 20, 4.0, "euler", "normal")
    texts = ["a red cube on a meadow in the style of comic", ""]
    with torch.inference_mode():
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in texts)

    def paint(name: str) -> None:
        chosen, patched = get_attention_function(name), model.clone()

        def instead(_, *args, **options):
            return chosen(*args, **options)

        patched.model_options["transformer_options"]["optimized_attention_override"] = instead
        with torch.inference_mode():
            numbers = list(range(PICTURES))
            vae.decode(generate.sample(patched, [positive] * PICTURES, negative, recipe, numbers))

    return {title: lambda name=name: paint(name) for title, name in ATTENTIONS.items()}
