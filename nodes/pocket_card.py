"""Pocket's card: what the shipped weights can do, measured through ComfyUI on fixed prompts, with 95 % intervals.

400 prompts name every attribute (half name the medium, half its three factors), picture i has seed i, 20 euler steps,
the shipped CFG. The judge only measures: no checkpoint was chosen by it.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from pathlib import Path

import psutil
import torch

from ..training import artefact
from ..training.intervals import wilson
from ..training.pocket import grammar, instance, pictures, probes, vae
from ..training.pocket import judge as judging
from ..training.pocket.world import ATTRIBUTES, MEDIUMS, VERSION, Scenes, sample_scenes
from ..training.sheet import sheet
from . import pocket_models
from .generate import Recipe, sample

CFG = 4.0
PROMPTS = 400
CARD = pocket_models.MODELS / "pocket-card.json"
EVIDENCE = pocket_models.MODELS.parent / "tests" / "evidence" / "results" / "held_out"  # `dev.py evidence held_out`
log = logging.getLogger("counterpoint.pocket")


def prompts() -> tuple[list[str], Scenes]:
    """The fixed prompts and what they ask for; medium i mod 10, named where i // 10 is even."""
    names = list(MEDIUMS)
    combinations = torch.tensor([MEDIUMS[names[i % 10]] for i in range(PROMPTS)])
    scenes = sample_scenes(
        PROMPTS,
        77,
        shape=torch.arange(PROMPTS) % 8,
        stroke=combinations[:, 0],
        paper=combinations[:, 1],
        line=combinations[:, 2],
    )
    styles = [
        f"in the style of {names[i % 10]}" if i // 10 % 2 == 0 else grammar.factor_words(MEDIUMS[names[i % 10]])
        for i in range(PROMPTS)
    ]
    texts = [
        f"{grammar.content(scenes, i)}{' ' if style.startswith('in') else ', '}{style}"
        for i, style in enumerate(styles)
    ]
    return texts, scenes


def paint(texts: list[str], cfg: float = CFG, batch: int = 16) -> torch.Tensor:
    """(n, 3, 128, 128) through ComfyUI's sampler and VAE."""
    model, clip, decoder = pocket_models.load_model(), pocket_models.load_clip(), pocket_models.load_vae()
    recipe, parts = Recipe("", 128, 128, 0, 20, cfg, "euler", "normal"), []
    with torch.inference_mode():
        encoded = {t: clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in {*texts, ""}}
        for start in range(0, len(texts), batch):
            rows = list(range(start, min(start + batch, len(texts))))
            parts.append(
                decoder.decode(sample(model, [encoded[texts[i]] for i in rows], encoded[""], recipe, rows))
                .movedim(-1, 1)
                .clone()
            )
    return torch.cat(parts)


def measure(folder: Path, cfg: float = CFG) -> dict:
    """Everything on the card, and models/pocket-card.jpg."""
    judge = pocket_models.load_judge()
    texts, scenes = prompts()
    painted = paint(texts, cfg)
    rows = [painted[i : i + 10] for i in range(0, 80, 10)]
    sheet(rows, [""] * len(rows), title="Pocket: the first 80 fixed prompts").save(
        pocket_models.MODELS / "pocket-card.jpg", quality=88
    )

    held_out, truth = pictures.load(folder, "held out", 1)
    real = held_out.float() / 255
    module = pocket_models.load_vae().first_stage_model
    with torch.no_grad():
        rebuilt = vae.decode(module, vae.encode(module, held_out))
    db = vae.psnr(real, rebuilt)
    judged, judged_truth = pictures.load(folder, "judge held out", 1)
    with torch.no_grad():
        judged_rebuilt = vae.decode(module, vae.encode(module, judged))
    return {
        "prompts": PROMPTS, "cfg": cfg, "steps": 20, "sampler": "euler", "scheduler": "normal",
        "followed": with_intervals(judging.accuracy(judge, painted, scenes), PROMPTS),
        "judge on real pictures of all 72 styles": rounded(judging.accuracy(judge, judged.float() / 255, judged_truth)),
        "judge on rebuilt pictures of all 72 styles": rounded(judging.accuracy(judge, judged_rebuilt, judged_truth)),
        "vision": rounded(vision(folder)),
        "same object": same_object(folder, module),
        "held-out styles": held_out_styles(),
        "vae dB": {"mean": round(db.mean().item(), 2), **{s: round(db[truth.stroke == i].mean().item(), 2) for i, s in enumerate(ATTRIBUTES["stroke"])}},
        "seconds for 4 pictures": round(speed(), 2),
    }  # fmt: skip


def files_say() -> dict:
    """What the prior and the image tokens say of themselves, and what all files weigh; a new file changes it and nothing that was measured."""
    prior = pocket_models.MODELS / "clip_priors" / "pocket-prior.safetensors"
    tokens = artefact.facts(pocket_models.MODELS / "image_tokens" / "pocket-tokens.safetensors")
    tensors, said = artefact.read(prior)
    facts = json.loads(said["facts"])
    return {
        "prior": {
            "numbers": sum(x.numel() for name, x in tensors.items() if name.startswith("net.")),
            "pairs": facts["pairs"], "steps": facts["steps"], "figures": rounded(facts["figures"]),
        },
        "image tokens": {k: int(tokens[k]) for k in ("tokens", "rank", "steps")},
        "megabytes": round(sum(f.stat().st_size for f in pocket_models.MODELS.rglob("pocket-*.safetensors")) / 1e6, 2),
    }  # fmt: skip


def vision(folder: Path) -> dict[str, float]:
    """What linear probes, fitted on 5000 training pictures, read off the pooled embedding of 1000 held-out ones, and how
    often the whole caption finds its picture among 100."""
    tower, reader = pocket_models.load_vision(), pocket_models.load_clip()

    def see(images: torch.Tensor) -> torch.Tensor:
        parts = [tower.encode_image(x.movedim(1, -1).float() / 255)["image_embeds"] for x in images.split(100)]
        return torch.cat(parts).clone()

    (known, known_scenes), (asked, asked_scenes) = (
        pictures.load(folder, s, n) for s, n in (("train", 5), ("held out", 1))
    )
    with torch.inference_mode():
        known, asked = see(known), see(asked)
        captions = [
            f"{grammar.content(asked_scenes, i)}, {grammar.factor_words(asked_scenes.combination(i))}"
            for i in range(len(asked))
        ]
        texts = torch.cat([reader.encode_from_tokens(reader.tokenize(c), return_pooled=True)[1] for c in captions])
    with torch.inference_mode(False), torch.enable_grad():
        known, asked, texts = known.clone(), asked.clone(), texts.clone()
        read = probes.probe_all(known, known_scenes, asked, asked_scenes)
    return {**read, "its picture among 100": probes.retrieval(asked, texts)}


def same_object(folder: Path, autoencoder: torch.nn.Module) -> dict[str, dict[str, float]]:
    """How often the instance probe is right about 9500 pairs of objects it never met, painted and through the VAE; of the
    two held-out shards the first gave the threshold."""
    probe, limit = pocket_models.load_instance_probe()
    images, scenes = pictures.load(folder, "instances held out")
    second = torch.arange(pictures.SHARD, 2 * pictures.SHARD)
    images, scenes = images[second], scenes[second]
    with torch.no_grad():
        rebuilt = vae.decode(autoencoder, vae.encode(autoencoder, images))
    sets = {"real": images.float() / 255, "rebuilt": rebuilt}
    return {name: rounded(instance.accuracy(probe.see(x), scenes, limit)) for name, x in sets.items()}


def held_out_styles() -> dict[str, dict[str, float]]:
    """By arm, the mean of each measure over the styles and seeds of the committed evidence."""
    arms: dict[str, list[dict[str, float]]] = {}
    for file in sorted(EVIDENCE.rglob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        arms.setdefault(record["arm"], []).append(record["measures"])
    return {arm: rounded({k: statistics.mean(m[k] for m in runs) for k in runs[0]}) for arm, runs in arms.items()}


def rounded(shares: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 3) for k, v in shares.items()}


def with_intervals(shares: dict[str, float], n: int) -> dict[str, list[float]]:
    """Share, lower and upper end of its 95 % interval."""
    return {k: [round(v, 3), *(round(x, 3) for x in wilson(round(v * n), n))] for k, v in shares.items()}


def speed() -> float:
    """Seconds for 4 pictures of one prompt, 20 steps with CFG, sampling and decoding, on all cores; the best of 3."""
    threads = torch.get_num_threads()  # one, where two processes train
    torch.set_num_threads(psutil.cpu_count(logical=False) or threads)
    texts = ["a red cube on a meadow in the style of comic"] * 4
    times = []
    for _ in range(3):
        model, clip, decoder = pocket_models.load_model(), pocket_models.load_clip(), pocket_models.load_vae()
        with torch.inference_mode():
            positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (texts[0], ""))
            start = time.perf_counter()
            decoder.decode(
                sample(
                    model, [positive] * 4, negative, Recipe("", 128, 128, 0, 20, CFG, "euler", "normal"), [0, 1, 2, 3]
                )
            )
            times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return min(times)


def known() -> dict:
    """The card as it is."""
    return json.loads(CARD.read_text(encoding="utf-8"))


def write(measured: dict) -> None:
    """models/pocket-card.json and models/README.md, which says the same in words."""
    card = measured | files_say()
    artefact.write_whole(CARD, (json.dumps(card, indent=1) + "\n").encode())
    artefact.write_whole(pocket_models.MODELS / "README.md", in_words(card).encode())
    log.info("card: %s", json.dumps(card))


def in_words(card: dict) -> str:
    """The model card; every figure in it comes from `card`."""
    judge_real, judge_rebuilt = (card[f"judge on {k} pictures of all 72 styles"] for k in ("real", "rebuilt"))
    rows = [
        f"| {k} | {100 * p:.0f} % ({100 * low:.0f} to {100 * high:.0f}) | {100 * judge_real[k]:.0f} % | {100 * judge_rebuilt[k]:.0f} % |"
        for k, (p, low, high) in card["followed"].items()
    ]
    learned = [
        f"| {arm} | {' | '.join(f'{100 * v:.0f} %' for v in shares.values())} |"
        for arm, shares in card["held-out styles"].items()
    ]
    measures = next(iter(card["held-out styles"].values()))
    objects = card["same object"]
    by_pattern = ", ".join(f"{k} {100 * v:.0f} %" for k, v in objects["real"].items() if k in ATTRIBUTES["pattern"])
    prior, tokens, figures = card["prior"], card["image tokens"], card["prior"]["figures"]
    decibels = ", ".join(f"{k} {v}" for k, v in card["vae dB"].items() if k != "mean")
    return f"""# Pocket

A text-to-image family for trying things out: 128 x 128 pictures of one coloured object, trained from nothing on pictures
that `training/pocket/painter.py` paints, by `python dev.py pocket`. World {VERSION}. Apache-2.0.

| file | what |
|---|---|
| pocket-unet | noise prediction, 4 x 16 x 16 latents, attention at 8x8, 4x4 and in the last block at 16x16 |
| pocket-vae | autoencoder, {card["vae dB"]["mean"]} dB on held-out pictures ({decibels}) |
| pocket-text, pocket-vision | a CLIP-style pair, 128 numbers, on ComfyUI's tokenizer |
| pocket-judge | says what a picture shows; used to measure, never to select |
| pocket-instance | tells whether two pictures show one and the same object; used to measure |
| clip_priors/pocket-prior | from a text to an image embedding as pocket-vision makes them: {prior["numbers"] / 1e6:.1f} million numbers, {prior["steps"]} steps on {prior["pairs"]} captioned pictures, whitened start, cosine schedule |
| image_tokens/pocket-tokens | from an image embedding to {tokens["tokens"]} words for pocket-unet, with a LoRA of rank {tokens["rank"]}: {tokens["steps"]} steps on pictures without captions |
| embeddings/pocket-ink-and-wash | a learned word, a style that pocket-unet never saw |

All files together: {card["megabytes"]} MB. Four pictures of {card["steps"]} steps with CFG take {card["seconds for 4 pictures"]} s where this was measured.

## Does it follow the prompt?
{card["prompts"]} fixed prompts that name every attribute, {card["sampler"]}, {card["scheduler"]}, {card["steps"]} steps, CFG {card["cfg"]}, seed i for picture i;
95 % intervals. `medium` is the best of the ten names; `all three` is stroke, paper and line together. Beside it the judge's
own accuracy on painted pictures of all 72 styles, and on the same pictures through the VAE: the ceiling.

| | followed | judge, real | judge, rebuilt |
|---|---|---|---|
{chr(10).join(rows)}

![the first 80 fixed prompts](pocket-card.jpg)

## What does its vision tower know?
Linear probes on the pooled embedding (128 numbers), fitted on 5000 training pictures, asked about 1000 held-out ones:
{", ".join(f"{k} {100 * v:.0f} %" for k, v in card["vision"].items() if k != "its picture among 100")}. A whole caption finds its picture
among 100 in {100 * card["vision"]["its picture among 100"]:.0f} % of the cases.

## Can it learn a style it never saw?
Six combinations of stroke, paper and line were never painted for training and have no name. A word for each, learned from
20 captioned pictures by textual inversion with the node's defaults; the judge on 64 pictures for each of 2 seeds, beside the
two ceilings: the judge on painted pictures of that style, and Pocket asked for the three factors in words it knows
(`python dev.py evidence held_out`).

| | {" | ".join(measures)} |
{"|---" * (len(measures) + 1)}|
{chr(10).join(learned)}

## Does it know one object again?
The instance probe on pairs of pictures of objects alike in shape, colour and pattern, none of which it was trained on, in other
places, views and light: right about {100 * objects["real"]["all"]:.0f} % of painted pairs ({100 * objects["real"]["one medium"]:.0f} % in one medium, {100 * objects["real"]["across media"]:.0f} % across media; {by_pattern})
and {100 * objects["rebuilt"]["all"]:.0f} % of the same through the VAE; 50 % is chance. Plain objects have no instance to see.

## What does its prior know?
4 embeddings for the caption of each pair that was held out, 8 steps, no guidance: centred cosine {figures["centred cosine"]:.2f} with the true one, Frechet distance
{figures["frechet"]:.2f} per coordinate (0 is best), diversity {figures["diversity"]:.2f} and length {figures["norm"]:.2f} of true ones. `python dev.py evidence prior` says more.

What it cannot do: more than one object, words outside its grammar, anything real. It is a toy and a laboratory.
"""
