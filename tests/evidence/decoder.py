"""Claim: a decoder taught without captions paints what a picture shows, and less of a text than one that learned from captions.

    python dev.py evidence decoder --screen     CFG, one seed (2 minutes of one core)
    python dev.py evidence decoder              every arm, three fresh seeds (35 minutes of one core, half of them six trainings)

The captions are 64 of those that the claim `prior` holds out: what is in a picture, and nothing of style, view or light. Of each a
picture is painted, 10 steps of DPM++ 2M with CFG 4 unless an arm says 2. The decoder is Pocket with the image tokens that ship, which
were taught once, on 2000 pictures without captions; so seeds are fresh noises and pictures, and fresh priors of the claim `prior`, but no
fresh decoder, save in the two arms of 500 steps. All arms of a seed paint from the same noises.

text decoder          Pocket's own UNet, told the caption
tokens                the decoder, told the embedding of a true picture of the caption
tokens and caption    the same, behind the caption
prior, ...            the decoder, told what a prior makes of the caption in 8 steps of DPM++ 2M: Pocket's own prior, with guidance of 1 or of
                      1.5, or one of the claim `prior`, which learned less (a regressor says the mean of what embeddings there may be)
prior and caption     Pocket's own prior (1.5), behind the caption
500 steps, ...        a decoder of each seed's own, Train Image Tokens as it comes on 400 pictures that no caption held out describes, told
                      the embedding of a true picture: with the LoRA, or the projection alone (rank 0)
true picture          nothing is painted: the judge looks at the picture that the others are compared with

colour, pattern, shape, place   share of pictures in which the judge sees what the caption says
all said     all four at once
style        stroke, paper and line are those of the true picture; chance, where only the caption is known
alike        cosine of the embeddings of what was painted and of the true picture, both less the mean of all pictures
CMMD         distance to 16 other true pictures of each caption, as Compare Sets has it with Pocket's features
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from evidence import prior
from harness.boot import DEV, ROOT, boot, load_pack, prepare
from harness.claim import Claim, Plan, command, models_hash

CAPTIONS, TAUGHT, AT_ONCE = 64, 400, 16
OWN = "Pocket's own"
OWN_PRIOR, TOKENS = "clip_priors/pocket-prior", "image_tokens/pocket-tokens"
USED = (*(f"pocket-{part}" for part in ("unet", "text", "vae", "vision", "judge")), OWN_PRIOR, TOKENS)
CONDITION = "content"
SAID = {"colour": "colour", "pattern": "pattern", "shape": "shape", "place": "background"}


class Arm(NamedTuple):
    """What is painted from, and by which decoder."""

    embedding: str = ""  # "true", that of Pocket's own prior (OWN), or an arm of the claim `prior`
    caption: bool = False
    guidance: float = 1.0  # of Pocket's own prior
    rank: int | None = None  # of a decoder that is taught; None takes the tokens that ship
    cfg: float = 4.0


PRIOR = Arm(OWN, guidance=1.5)
CONFIRMED = {
    "true picture": None,
    "text decoder": Arm(caption=True),
    "tokens": Arm("true"),
    "tokens, CFG 2": Arm("true", cfg=2.0),
    "tokens and caption": Arm("true", caption=True),
    "prior, guidance 1": Arm(OWN),
    "prior, guidance 1.5": PRIOR,
    "prior, guidance 1.5, CFG 2": PRIOR._replace(cfg=2.0),
    "prior and caption": PRIOR._replace(caption=True),
    "prior, N(0, I)": Arm("none"),
    "prior, whitened": Arm("whitened"),
    "prior, regressor": Arm("regressor"),
    "500 steps, LoRA": Arm("true", rank=8),
    "500 steps, projection alone": Arm("true", rank=0),
}
AT_CFG_2 = ("text decoder, CFG 2", "tokens, CFG 2", "prior, guidance 1.5, CFG 2")
ARMS = CONFIRMED | {AT_CFG_2[0]: Arm(caption=True, cfg=2.0)}
CLAIM = Claim(
    name="decoder",
    about=__doc__,
    screen=Plan((CONDITION,), ("text decoder", "tokens", "prior, guidance 1.5", *AT_CFG_2), (0,)),
    confirm=Plan((CONDITION,), tuple(CONFIRMED), (1, 2, 3)),
    measures=(*SAID, "all said", "style", "alike", "CMMD"),
    baseline="tokens",
    seconds=60,
    digits=3,
)
README = ("all said", "style", "alike", "CMMD")


def main(argv: list[str]) -> int:
    return command(CLAIM, argv, open_laboratory)


def open_laboratory():
    prepare(Path(tempfile.mkdtemp(prefix="counterpoint-evidence-")))
    boot()
    laboratory = Laboratory(load_pack())
    return models_hash(*USED), lambda _, arm, seed: laboratory.record(ARMS[arm], seed)


class Laboratory(prior.Laboratory):
    """That of the claim `prior`, with the rest of Pocket: what paints and what judges."""

    def __init__(self, pack):
        super().__init__(pack)
        nodes = pack.nodes
        self.nodes, of = nodes, nodes.pocket_models
        self.model, self.clip, self.vae, self.vision = of.load_model(), of.load_clip(), of.load_vae(), of.load_vision()
        self.judge, self.features = of.load_judge(), nodes.features.pocket()
        each = prior.REAL + prior.MADE
        self.rows = [each * i for i in range(CAPTIONS)]  # of each caption's first picture
        self.captions = [self.world.grammar.content(self.scenes()[0], row) for row in self.rows]

    def record(self, arm: Arm | None, seed: int) -> dict:
        import torch

        started = time.process_time()
        order = torch.randperm(prior.REAL + prior.MADE, generator=torch.Generator().manual_seed(seed)).tolist()
        shown, others = ([row + k for row in self.rows for k in some] for some in (order[-1:], order[: prior.REAL]))
        scenes, facts = self.scenes()[0][shown], {}
        if arm is None:
            pictures = self.world.painter.paint(scenes).image
        else:
            pictures, facts = self.painted_by(arm, shown, seed)
        with torch.inference_mode():
            measures = self.judged(pictures, scenes, self.test.images[shown], self.test.images[others])
        return {"measures": measures, **facts, "cpu seconds": round(time.process_time() - started, 1)}

    def judged(self, pictures, scenes, true, others) -> dict[str, float]:
        import torch
        import torch.nn.functional as F
        from counterpoint.training.distances import cmmd

        seen, embeddings = self.judge.see(pictures), self.features.pictures(pictures.movedim(1, -1)).float().cpu()
        right = {k: seen[name] == getattr(scenes, name) for k, name in SAID.items()}
        style = [seen[k] == getattr(scenes, k) for k in self.world.world.FACTORS]
        mean = self.pairs.images.mean(0)
        figures = {k: v.float() for k, v in right.items()} | {
            "all said": torch.stack(list(right.values())).all(0).float(),
            "style": torch.stack(style).all(0).float(),
            "alike": F.cosine_similarity(embeddings - mean, true - mean),
            "CMMD": torch.tensor(cmmd(embeddings, others)[0]),
        }
        return {k: round(v.mean().item(), 4) for k, v in figures.items()}

    def painted_by(self, arm: Arm, shown: list[int], seed: int):
        """A picture for each caption, and what the training of its decoder said."""
        import torch

        images, model, facts = self.nodes.image_tokens, self.model, {}
        told = self.captions if arm.caption else [""] * CAPTIONS
        with torch.inference_mode():
            read = {text: self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text)) for text in {*told, ""}}
        positives, negative = [read[text] for text in told], read[""]
        if arm.embedding:
            projector, facts = self.taught(arm, seed)
            tokens = projector.tokens(self.embeddings(arm, shown, seed))
            positives = [images.with_tokens(c, each[None]) for c, each in zip(positives, tokens, strict=True)]
            negative = images.with_tokens(negative, projector.nothing())
            model = self.with_lora(projector)
        recipe = self.nodes.generate.Recipe("", 128, 128, 10_000 * (seed + 1), 10, arm.cfg, "dpmpp_2m", "normal")
        parts = []
        with torch.inference_mode():
            for i in range(0, len(told), AT_ONCE):
                rows = list(range(i, min(i + AT_ONCE, len(told))))
                latents = self.nodes.generate.sample(model, [positives[r] for r in rows], negative, recipe, rows)
                parts.append(self.vae.decode(latents).movedim(-1, 1).clone())
        return torch.cat(parts), facts

    def with_lora(self, projector):
        import comfy.sd

        if not projector.lora:
            return self.model
        return comfy.sd.load_lora_for_models(self.model, None, projector.lora, 1.0, 0.0)[0]

    def embeddings(self, arm: Arm, shown: list[int], seed: int):
        """(captions, d)."""
        import torch

        if arm.embedding == "true":
            return self.test.images[shown]
        if arm.embedding == OWN:
            return self.of_pockets_prior(arm.guidance, seed)
        other = prior.ARMS[arm.embedding]
        network, _ = self.prior(other, seed)
        with torch.no_grad():
            return self.drawn(other, network, seed, 8, "dpm++ 2m")[:CAPTIONS, 0] * other.smaller

    def of_pockets_prior(self, guidance: float, seed: int):
        import torch
        from counterpoint.training.prior.prior import Sampling, sampled

        own, texts = self.pockets_prior, self.test.texts(self.rows)
        with torch.inference_mode():
            nothing = self.nodes.prior.text.text_of(self.clip, [""], own.network.shape.text_dim).texts
            return sampled(own, texts, nothing, [seed], Sampling(guidance=guidance))[:, 0]

    @cached_property
    def pockets_prior(self):
        from counterpoint.training.prior.prior import load

        made = load(ROOT / "models" / f"{OWN_PRIOR}.safetensors")
        made.network.float()
        return made

    def taught(self, arm: Arm, seed: int):
        """Image tokens, kept in .dev/, and the mean loss of their last 100 steps."""
        from counterpoint.training import artefact, image_tokens

        if arm.rank is None:
            return image_tokens.load(ROOT / "models" / f"{TOKENS}.safetensors"), {}
        wanted = {"rank": arm.rank, "seed": seed}
        key = hashlib.sha256(f"{wanted} {models_hash()} {models_hash(*prior.TOWERS)} {TAUGHT}".encode()).hexdigest()[
            :16
        ]
        file = DEV / "evidence" / "decoder" / f"{key}{artefact.SUFFIX}"
        if not file.exists():
            started = time.process_time()
            node = self.nodes.train_image_tokens
            values = self.nodes.training_job.defaults(node.TrainImageTokens)
            values |= {"clip_vision": self.vision, "preview_every": 0, "snapshot_every": 0, **wanted}
            parts, images = (self.model, self.clip, self.vae), self.pictures(seed)
            learned, records, *_ = node.TokenJob(*parts, images, None, None, values).run()
            learned.facts |= {
                "training": round(time.process_time() - started, 1),
                "last losses": round(statistics.mean(r["loss"] for r in records[-100:]), 5),
            }
            artefact.write_whole(file, image_tokens.to_bytes(learned))
        learned = image_tokens.load(file)
        return learned, {k: learned.facts[k] for k in ("training", "last losses")}

    def pictures(self, seed: int) -> list:
        """Other ones for each seed."""
        scenes = self.scenes()[1][seed * TAUGHT : (seed + 1) * TAUGHT]
        return [picture for picture, _ in self.painted(scenes)]
