"""Why contrast keeps no object out of the word: where the object goes, and where the negatives point.

    python dev.py evidence why_no_contrast --seeds 1 2 3

For the demo's style, a word is learned plainly with and without captions. The first has the style and no object, the
second both; their difference is where the object is. It is compared with the mean gradient of the negatives at the
start, which is what `reference point` removes, and the object is looked for after that direction is taken out of the
finished word. One JSON file per seed; about 3 minutes each on two cores.
"""

from __future__ import annotations

import argparse
import json

from evidence import learn_style
from harness import claim

RESULTS = claim.RESULTS / "why_no_contrast"
TEMPLATE = "a picture in the style of {token}"
BATCHES = 48  # of 8, for a mean gradient


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py evidence why_no_contrast", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(learn_style.SEEDS))
    options = parser.parse_args(argv)
    laboratory = learn_style.Laboratory.open()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        file = RESULTS / f"seed-{seed}.json"
        if not file.exists():
            file.write_text(json.dumps({"seed": seed, **measure(laboratory, seed)}, indent=1) + "\n", encoding="utf-8")
        print(file.read_text(encoding="utf-8"), flush=True)
    return 0


def measure(laboratory, seed: int) -> dict[str, float]:
    style = learn_style.STYLE
    shape, images, captions = laboratory.pictures(style, seed)
    words = {arm: laboratory.learn(arm, seed, images, captions)[0] for arm in ("plain", "plain, captions")}
    without, described = (words[arm].vectors["clip_l"].flatten() for arm in ("plain", "plain, captions"))
    bridge = laboratory.nodes.bridge
    start = bridge.starting_vectors(laboratory.clip, "picture", 1)["clip_l"].flatten()
    positive, negative = gradients(laboratory, images, laboratory.negatives_of(seed, captions), seed)
    towards, moved, where = -negative.mean(0), without - start, without - described
    direction = towards / towards.norm()
    freed = without - (moved @ direction).clamp_min(0) * direction
    clip = bridge.with_embeddings(laboratory.clip, {"word": {"clip_l": freed[None]}})
    seen = laboratory.look(clip, "embedding:word", laboratory.world.HELD_OUT[style], shape, seed)
    found = {
        "signal over noise of a step's gradient, positive": signal_over_noise(positive),
        "signal over noise of a step's gradient, negative": signal_over_noise(negative),
        "cosine of positive and negative at the start": cosine(positive.mean(0), negative.mean(0)),
        "how far the word moves, over its length": (moved.norm() / start.norm()).item(),
        "cosine of that move and the negatives' direction": cosine(moved, towards),
        "cosine of where the object is and the negatives' direction": cosine(where, towards),
        "leak after the direction is taken out": seen["leak"],
        "style after the direction is taken out": seen["style"],
    }
    return {k: round(v, 3) for k, v in found.items()}


def gradients(laboratory, images: list, negatives: list, seed: int):
    """(batches, width) each: gradients at the start on the pictures and, with the same noise, on their negatives."""
    import comfy.model_management
    import torch
    from counterpoint.nodes import bridge, training_job
    from counterpoint.training.latents import draw
    from counterpoint.training.textual_inversion import Settings, TextualInversion

    latents = [training_job.encode_pictures(laboratory.vae, each, 128) for each in (images, negatives)]
    with bridge.training_mode():
        model, clip = bridge.private_model(laboratory.model), bridge.private_clip(laboratory.clip)
        comfy.model_management.load_models_gpu([model, clip.patcher], force_full_load=True)
        positive, negative = (model.model.process_latent_in(bridge.plain(each)) for each in latents)
        start, ways = bridge.starting_vectors(clip, "picture", 1), [[TEMPLATE]] * len(images)
        settings = Settings(method="reference point", seed=seed)
        denoiser, encoder = bridge.ComfyDenoiser(model), bridge.ComfyTextEncoder(clip)
        trainer = TextualInversion(denoiser, encoder, positive, ways, start, settings, negative)
        pairs = []
        for i in range(BATCHES):
            generator = torch.Generator().manual_seed(1000 * seed + i)
            batch = draw(positive, denoiser, settings.batch, generator)
            _, (plus,), (minus,), _ = trainer._gradients(batch, [TEMPLATE] * settings.batch)
            pairs.append((plus.flatten(), minus.flatten()))
    return [torch.stack(side) for side in zip(*pairs, strict=True)]


def signal_over_noise(rows) -> float:
    """Squared length of the mean over the variance of one row, the bias of few rows taken off."""
    variance = rows.var(0).sum()
    return ((rows.mean(0).square().sum() - variance / len(rows)) / variance).item()


def cosine(a, b) -> float:
    return (a @ b / (a.norm() * b.norm())).item()
