"""`python dev.py pocket`: train Pocket on its own world through ComfyUI's classes, stage by stage, resumable.

    python dev.py pocket                    every stage that is not done
    python dev.py pocket --stages vae judge only these

Two processes of one thread each share the work on two cores (`--rank 0` and `--rank 1`); a GPU is used when there is one.
Progress, logs and sample sheets lie in .dev/pocket/<stage>; what ships is written to models/.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import logging
import os
import re
import time
from pathlib import Path

import torch
import torch.distributed

from ..training import artefact, embedding
from ..training.loop import train
from ..training.pocket import clip, grammar, instance, judge, painter, pictures, unet, vae, world
from ..training.pocket.fit import Fit, in_shares, initialise, processes, rank
from ..training.run import Run
from ..training.saved_tensors import mutation_allowed
from ..training.sheet import save_sheet
from . import pocket_card, pocket_models, pocket_prior, train_embedding, training_job

ROOT = Path(__file__).resolve().parents[1]
VISION_STEPS, INSTANCE_STEPS = 6_000, 3_000
EXAMPLE, EXAMPLE_WORD = world.HELD_OUT[1], "pocket-ink-and-wash"
log = logging.getLogger("counterpoint.pocket")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="dev.py pocket", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="default: all, in order"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".dev" / "pocket", help="where runs and pictures are kept"
    )
    parser.add_argument("--rank", type=int, help="this process of two; without it one process does everything")
    parser.add_argument(
        "--so-far", action="store_true", help="write the UNet as far as it is trained to models/, and stop"
    )
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.so_far:
        return ship_so_far(options.folder)
    if options.rank is not None:
        torch.set_num_threads(1)
        store = options.folder / f"processes-{os.getppid()}"  # both are children of the same dev.py
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{store.as_posix()}",
            rank=options.rank,
            world_size=2,
            timeout=datetime.timedelta(hours=2),
        )
    try:
        for stage in options.stages:
            start = time.monotonic()
            STAGES[stage](options.folder)
            if rank() == 0:
                log.info("%s: done after %.1f min", stage, (time.monotonic() - start) / 60)
    finally:
        if options.rank is not None:
            torch.distributed.destroy_process_group()


def fit(folder: Path, name: str, trainer: Fit, config: dict) -> None:
    """Run the loop on a trainer; only the first process writes, all resume from what it wrote."""
    run = Run(
        folder / name,
        {"stage": name, "world": pictures.VERSION, **config},
        {"steps": trainer.steps, "processes": processes()},
    )
    stored = run.load_checkpoint()
    start = stored[0] if stored else 0
    if stored:
        trainer.load_state_dict(stored[1])
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(run)
            steps = train(trainer, run, trainer.steps)
        else:
            steps = train(trainer, None, trainer.steps, start)
        stack.enter_context(contextlib.closing(steps))
        said = time.monotonic()
        for progress in steps:
            if rank() == 0 and (time.monotonic() - said > 30 or progress.step == progress.steps):
                said = time.monotonic()
                scalars = " ".join(f"{k} {v:.4f}" for k, v in progress.scalars.items())
                log.info("%s %d/%d %s, %.0f min left", name, progress.step, progress.steps, scalars, progress.eta / 60)
    trainer.module.load_state_dict(trainer.ema)
    barrier()


def barrier() -> None:
    if processes() > 1:
        torch.distributed.barrier()


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def paint_pictures(folder: Path) -> None:
    for name in pictures.paint_all(folder, rank(), processes()):
        log.info("painted %s", name)
    barrier()


def train_vae(folder: Path) -> None:
    images, _ = pictures.load(folder, "train")
    module = initialise(pocket_models.vae_module(), 0)
    model = vae.Autoencoding(module)
    fit(folder, "vae", Fit(module, vae.encoder_loss(model, images, 4), steps=14_000, lr=2e-3, weight_decay=1e-4,
                           warmup=100, decay=1.0, ema=0.998), {"crop": vae.CROP, "batch": 4})  # fmt: skip
    vae.whiten(module, vae.encode(module, images[:2000]))
    report_vae(folder, module, "vae")
    ship_vae(module, images)


def train_decoder(folder: Path) -> None:
    """The encoder is final: latents, and with them UNet and judge, stand on it. The decoder can go on."""
    images, _ = pictures.load(folder, "train")
    module = shipped_vae()
    for part in (module.decoder, module.post_quant_conv):
        part.requires_grad_(True)
    latents = vae.encode(module, images[:6000]).half()
    fit(folder, "decoder", Fit(module, vae.decoder_loss(module, images, latents, 2), steps=1_200, lr=6e-4, weight_decay=1e-4,
                               warmup=50, decay=1.0, ema=0.99), {"batch": 2})  # fmt: skip
    report_vae(folder, module, "decoder")
    ship_vae(module, images)


def ship_vae(module: torch.nn.Module, images: torch.Tensor) -> None:
    if rank() == 0:
        ship(
            "vae",
            half(module.state_dict()),
            preview_factors=preview_factors(vae.encode(module, images[:500]), images[:500]),
        )
    barrier()


def preview_factors(latents: torch.Tensor, images: torch.Tensor) -> list[list[float]]:
    """(4 + 1, 3): what ComfyUI's live previews multiply latents with to see colours in -1..1; the last row is the bias."""
    colours = torch.nn.functional.avg_pool2d(images.float() / 127.5 - 1, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    known = torch.cat([flat, torch.ones(len(flat), 1)], 1)
    return [[round(v, 4) for v in row] for row in torch.linalg.lstsq(known, colours).solution.tolist()]


def report_vae(folder: Path, module: torch.nn.Module, name: str) -> None:
    if rank() > 0:
        return
    held_out, scenes = pictures.load(folder, "held out")
    x = held_out[:400].float() / 255
    z = vae.encode(module, held_out[:400])
    y = vae.decode(module, z)
    db = vae.psnr(x, y)
    by_stroke = {
        s: round(db[scenes.stroke[:400] == i].mean().item(), 1) for i, s in enumerate(pictures.ATTRIBUTES["stroke"])
    }
    log.info("%s: %.2f dB on 400 held-out pictures, by stroke %s; latent std %s", name, db.mean(), by_stroke,
             [round(v, 2) for v in z.std((0, 2, 3)).tolist()])  # fmt: skip
    save_sheet(folder / name / "sheet.png", torch.stack([x[:32], y[:32]], 1).flatten(0, 1), 16)


def ship(part: str, tensors: dict[str, torch.Tensor], **facts) -> None:
    """Write models/pocket-<part>.safetensors (fp16) with what was trained and how."""
    file = ROOT / "models" / f"pocket-{part}.safetensors"
    artefact.write(file, tensors, {"modelspec.title": f"Pocket {part}", "pocket_version": pictures.VERSION, **facts})
    log.info("wrote %s, %.1f MB", file.relative_to(ROOT), file.stat().st_size / 1e6)


def train_clip(folder: Path) -> None:
    images, scenes = pictures.load(folder, "train")
    vocabulary = Words()
    words, lengths = vocabulary.read(folder, "train", scenes, variants=6)
    pair = clip_pair(len(vocabulary.ids))
    fit(folder, "clip", Fit(pair, clip.pair_loss(pair, images, scenes, words, lengths, 40), steps=1_200, lr=1e-3, betas=(0.9, 0.98),
                            weight_decay=0.02, warmup=100, decay=1.0, ema=0.99,
                            around=mutation_allowed), {"batch": 40})  # fmt: skip
    if rank() == 0:
        held_out, held_scenes = pictures.load(folder, "held out")
        seen = clip.accuracy(pair, held_out, held_scenes, *vocabulary.read(folder, "held out", held_scenes, variants=1))
        log.info("clip: %s", {k: round(v, 3) for k, v in seen.items()})
        text = {
            **half(pair.text.state_dict()),
            "token_rows": pair.rows.detach().half(),
            "token_ids": vocabulary.ids.int(),
        }
        del text["text_model.embeddings.token_embedding.weight"]
        ship("text", text)
        ship("vision", half(pair.vision.state_dict()))


def train_vision(folder: Path) -> None:
    """The vision tower needs ten times the pictures that the text tower does, and only it goes on here."""
    images, scenes = pictures.load(folder, "train")
    vocabulary = Words()
    words, lengths = vocabulary.read(folder, "train", scenes, variants=6)
    pair = shipped_text(len(vocabulary.ids))
    file = folder / "vision" / "texts.safetensors"
    texts = kept(
        file, lambda rows: _pooled(pair, words[:, rows], lengths[:, rows]).movedim(0, 1), torch.arange(len(images))
    )
    pair.vision.load_state_dict(pocket_models.read_part("vision")[0])
    sight = clip.Sight(pair.vision.requires_grad_(True))
    loss = clip.sight_loss(sight, images, scenes, texts.movedim(0, 1), 48)
    fit(folder, "vision", Fit(sight, loss, steps=VISION_STEPS, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, warmup=100, decay=0.8,
                              ema=0.998, around=mutation_allowed), {"batch": 48})  # fmt: skip
    if rank() == 0:
        ship("vision", half(sight.vision.state_dict()))


def _pooled(pair: clip.Pair, words: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(variants, n, 77) and (variants, n) -> (variants, n, 128) half."""
    with torch.no_grad():
        parts = [
            pair.encode_text(w.long(), n)[1]
            for w, n in zip(words.flatten(0, 1).split(200), lengths.flatten().split(200), strict=True)
        ]
    return torch.cat(parts).view(*lengths.shape, -1).half()


def clip_pair(words: int) -> clip.Pair:
    text, vision = initialise(pocket_models.text_module(), 1), initialise(pocket_models.vision_module(), 2)
    text.text_model.embeddings.token_embedding.weight.requires_grad_(False)  # its rows are trained in `Pair.rows`
    with torch.no_grad():
        vision.vision_model.embeddings.class_embedding.copy_(torch.zeros(pocket_models.WIDTH))
    return clip.Pair(text, vision, words)


class Words:
    """The grammar's tokens as rows 0..n of a small table, and captions as rows of it."""

    LENGTH = 77

    def __init__(self):
        self.tokenizer = pocket_models.tokenizer()
        start, end = self.tokenizer.start_token, self.tokenizer.end_token
        used = {start, end}.union(*(self._tokens(w) for w in [*grammar.vocabulary(), ",", "-"]))
        self.ids = torch.tensor(sorted(used))
        row = {int(t): i for i, t in enumerate(self.ids)}
        self.start, self.end, self.row = row[start], row[end], row
        self.empty = torch.tensor([self.start] + [self.end] * (self.LENGTH - 1), dtype=torch.int16)

    @functools.cache  # noqa: B019 - one instance per process
    def _tokens(self, piece: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.tokenizer(piece)["input_ids"][1:-1])

    def rows(self, caption: str) -> list[int]:
        """Start, words, end. CLIP's byte pairs never cross the border of a word, so words can be looked up one by one."""
        pieces = re.findall(r"[a-z]+|[^\sa-z]+", caption)
        return [self.start, *(self.row[t] for piece in pieces for t in self._tokens(piece)), self.end]

    def read(self, folder: Path, split: str, scenes, variants: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(variants, n, 77) int16 rows and (variants, n) lengths of the captions of a split, kept on disk."""
        file = folder / f"world-{pictures.VERSION}" / f"captions-{split.replace(' ', '-')}-{variants}.safetensors"
        if not file.exists() and rank() == 0:
            all_rows = [[self.rows(c) for c in captions] for captions in pictures.caption_variants(scenes, variants)]
            lengths = torch.tensor([[len(r) for r in rows] for rows in all_rows])
            padded = [[r + [self.end] * (self.LENGTH - len(r)) for r in rows] for rows in all_rows]
            artefact.write(file, {"words": torch.tensor(padded, dtype=torch.int16), "lengths": lengths})
        if split == "train":
            barrier()
        stored, _ = artefact.read(file)
        return stored["words"], stored["lengths"]


def train_judge(folder: Path) -> None:
    images, scenes = pictures.load(folder, "judge")
    module = shipped_vae()
    file = folder / "judge" / "rebuilt.safetensors"
    rebuilt = kept(
        file, lambda x: (vae.decode(module, vae.encode(module, x)) * 255 + 0.5).to(torch.uint8), images[:3000]
    )
    network = initialise(judge.Judge(), 3)
    fit(folder, "judge", Fit(network, judge.judge_loss(network, images, rebuilt, scenes, 32), steps=2_000, lr=2e-3, warmup=50,
                             decay=1.0, ema=0.99), {"batch": 32})  # fmt: skip
    if rank() == 0:
        network.eval()
        ship("judge", half(network.state_dict()))
        held_out, held_scenes = pictures.load(folder, "judge held out")
        x = held_out.float() / 255
        for name, pictures_seen in (("real", x), ("rebuilt", vae.decode(module, vae.encode(module, held_out)))):
            log.info(
                "judge on %s pictures: %s",
                name,
                {k: round(v, 3) for k, v in judge.accuracy(network, pictures_seen, held_scenes).items()},
            )


def train_instance(folder: Path) -> None:
    images, scenes = pictures.load(folder, "instances")
    module = shipped_vae()
    file = folder / "instance" / "rebuilt.safetensors"
    rebuilt = kept(
        file, lambda x: (vae.decode(module, vae.encode(module, x)) * 255 + 0.5).to(torch.uint8), images[:8000]
    )
    lesson = initialise(instance.Lesson(instance.InstanceProbe()), 6)
    fit(folder, "instance", Fit(lesson, instance.instance_loss(lesson, images, rebuilt, scenes, 3), steps=INSTANCE_STEPS, lr=2e-3,
                                warmup=50, decay=1.0, ema=0.99), {"groups": 3})  # fmt: skip
    if rank() == 0:
        probe = lesson.probe.eval()
        known, _ = pictures.load(folder, "instances held out", 1)  # the card measures on the second shard
        limit = instance.threshold(probe.see(known.float() / 255))
        ship("instance", half(probe.state_dict()), threshold=round(limit, 4))
        log.info("same object: %s", pocket_card.same_object(folder, module))
    barrier()


def kept(file: Path, compute, items: torch.Tensor) -> torch.Tensor:
    """compute(items) shared among the processes, from disk if it was done before."""
    if not file.exists():
        made = in_shares(compute, items)
        if rank() == 0:
            artefact.write(file, {"items": made})
        barrier()
    return artefact.read(file)[0]["items"]


def shipped_vae() -> torch.nn.Module:
    module = pocket_models.vae_module()
    module.load_state_dict(
        {k: v.float() for k, v in artefact.read(pocket_models.MODELS / "pocket-vae.safetensors")[0].items()}
    )
    return module.eval().requires_grad_(False)


def train_unet(folder: Path) -> None:
    images, scenes = pictures.load(folder, "train")
    file = folder / "unet" / "latents.safetensors"
    module = shipped_vae()
    latents = kept(file, lambda x: vae.encode(module, x).half(), images)
    vocabulary = Words()
    words, lengths = vocabulary.read(folder, "train", scenes, variants=6)
    encode = text_encoder(len(vocabulary.ids))

    def loss(network):
        return unet.noise_loss(network, latents, words, lengths, encode, 12, vocabulary.empty)

    small = unet.start_at_zero(initialise(pocket_models.unet_module("small"), 4))
    fit(folder, "unet-small", Fit(small, loss(small), steps=4_000, lr=1.5e-3, decay=0.1, floor=0.6), {"batch": 12})
    full = initialise(pocket_models.unet_module("full"), 5)
    full.load_state_dict(unet.grow(small.state_dict(), full))
    fit(folder, "unet", Fit(full, loss(full), steps=6_000, lr=1.2e-3, decay=0.6, seed=1), {"batch": 12})
    if rank() == 0:
        ship("unet", half(full.state_dict()))


def ship_so_far(folder: Path) -> None:
    """The running average of a UNet in training, so that it can be looked at, or committed and resumed from elsewhere."""
    step, state = Run(folder / "unet", {}).load_checkpoint()
    ship("unet", half(state["ema"]), steps=step)


def text_encoder(words: int):
    """(words, lengths) -> (B, 77, 128) states of the shipped text tower."""
    pair = shipped_text(words)
    return lambda w, n: pair.encode_text(w, n)[0]


def shipped_text(words: int) -> clip.Pair:
    """A pair whose text tower is the one that ships."""
    stored, _ = artefact.read(pocket_models.MODELS / "pocket-text.safetensors")
    pair = clip_pair(words).eval().requires_grad_(False)
    pair.rows.data = stored.pop("token_rows").float()
    del stored["token_ids"]
    pair.text.load_state_dict({k: v.float() for k, v in stored.items()}, strict=False)
    return pair


def write_card(folder: Path) -> None:
    if rank() == 0:
        pocket_card.write(pocket_card.measure(folder))
    barrier()


def learn_word(folder: Path) -> None:
    """The word that `01 learn a style` paints with first: a held-out style, from pictures of anything, captioned."""
    if rank() == 0:
        scenes = world.sample_scenes(24, 1, **dict(zip(world.FACTORS, EXAMPLE, strict=True)))
        images = [i[None].movedim(1, -1) for i in painter.paint(scenes).image]
        captions = [grammar.content(scenes, i) for i in range(24)]
        models = pocket_models.load_model(), pocket_models.load_clip(), pocket_models.load_vae()
        values = {**training_job.defaults(train_embedding.TrainEmbedding), "preview_every": 0}
        learned, _, said, _ = train_embedding.WordJob(*models, images, captions, None, values).run()
        log.info(said)
        file = pocket_models.MODELS / "embeddings" / f"{EXAMPLE_WORD}.safetensors"
        named = embedding.Embedding(learned.vectors, EXAMPLE_WORD, learned.facts)
        artefact.write_whole(file, embedding.to_bytes(named))
    barrier()


STAGES = {
    "pictures": paint_pictures,
    "vae": train_vae,
    "clip": train_clip,
    "vision": train_vision,
    "judge": train_judge,
    "instance": train_instance,
    "unet": train_unet,
    "decoder": train_decoder,
    "word": learn_word,
    "prior": lambda folder: rank() == 0 and pocket_prior.train_prior(folder),
    "tokens": lambda folder: rank() == 0 and pocket_prior.train_tokens(folder),
    "card": write_card,
}
