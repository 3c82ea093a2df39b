"""A step of learning a word by contrast: the reference's way, each change on top of the one before, and ours.

    python dev.py bench nsync

SD 1.5's structure at 0.3 of its width (96 channels: a quarter, 80, is no multiple of GroupNorm's 32), text encoder and VAE at a
quarter, random weights, 2 pictures of 256 pixels and their 2 negatives for each step, float32. The reference's step is the order
of work of its code, on the same networks: pictures, negatives and an anchor one after the other, each through the VAE, the text
encoder and the UNet with checkpointing, a gradient for all 49408 words each time, AdamW over the whole table. Peaks are what
comes on top of ComfyUI's loaded models; ours contain its private copies of MODEL and CLIP.

Goals: fast 2.5 times as fast; lean 1.8 times at no more memory; a plain step that sees as many pictures at most 1.1 times as fast
as ours.
"""

import contextlib
import itertools
import tempfile
from pathlib import Path

from harness.boot import ROOT, boot, load_pack, prepare
from harness.timing import Way, command

SMALL_MODELS = ROOT / "tests" / "harness" / "small_models"
PIXELS, BATCH, STEPS = 256, 2, 2
TOKEN_ID = 4314  # any word: its row stands for the one that the reference adds
CONTENTS = (
    "a red house on a hill",
    "a dog",
    "two boats at sea",
    "a cup on a table",
    "trees",
    "a woman",
    "a road",
    "the moon",
)
CAPTIONS = [f"{content} in the style of {{token}}" for content in CONTENTS]
UNET = {
    "model_channels": 96, "context_dim": 192, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
}  # fmt: skip
CLIP_TEXT = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
VAE = {"ch": 32, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "resolution": 256}


def main(argv: list[str]) -> None:
    command("nsync", argv, load, f"{STEPS} steps of {BATCH} pictures of {PIXELS} pixels and as many negatives; seconds")


def load() -> dict[str, Way]:
    prepare(Path(tempfile.mkdtemp(prefix="counterpoint-bench-")))
    boot()
    shop = Workshop(load_pack())
    return {
        "the reference's step": shop.reference(),
        "  and its latents are kept": shop.reference(kept=True),
        "  and no anchor, which it does not use": shop.reference(kept=True, groups=2),
        "  and one word instead of all": shop.reference(kept=True, groups=2, table=False),
        "ours, lean: and one pass for both": shop.ours(lean=True),
        "ours, fast: and no checkpoints": shop.ours(),
        "plain, as many pictures": shop.ours(method="plain", batch=2 * BATCH),
    }


class Workshop:
    """The models, and the ways to make steps with them."""

    def __init__(self, pack):
        import torch

        self.pack, builders = pack, load_pack(SMALL_MODELS, "small_models").builders
        builders.SD15_UNET.update(UNET)
        builders.CLIP_TEXT.update(CLIP_TEXT)
        builders.VAE.update(VAE)
        builders.SmallSD15.unet_extra_config = {"num_heads": 8, "num_head_channels": -1}
        with torch.inference_mode():
            self.model, self.clip, self.vae = builders.sd15_model(), builders.sd15_clip(), builders.sd15_vae()
        self.clip.tokenizer.clip_l.embedding_size = CLIP_TEXT["hidden_size"]
        generator = torch.Generator().manual_seed(1)
        self.pictures = torch.rand(2, 8, 3, PIXELS, PIXELS, generator=generator)  # and negatives

    def privately(self):
        import comfy.model_management

        bridge = self.pack.nodes.bridge
        model, clip = bridge.private_model(self.model), bridge.private_clip(self.clip)
        comfy.model_management.load_models_gpu([model, clip.patcher], force_full_load=True)
        return bridge.ComfyDenoiser(model), clip

    def encoded(self, pictures):
        return self.vae.first_stage_model.encode(2 * pictures - 1) * 0.18215

    def ours(self, lean: bool = False, method: str = "paper", batch: int = BATCH) -> Way:
        training, made, numbers = self.pack.training, [], itertools.count()

        def trainer():
            import torch

            bridge, ti = self.pack.nodes.bridge, training.textual_inversion
            denoiser, clip = self.privately()
            with torch.no_grad():
                latents = [self.encoded(some) for some in self.pictures]
            settings = ti.Settings(method=method, steps=1000, batch=batch, weighting="uniform")
            start = bridge.starting_vectors(clip, "picture", 1)
            made.append(
                ti.TextualInversion(
                    denoiser,
                    bridge.ComfyTextEncoder(clip),
                    latents[0],
                    [[c] for c in CAPTIONS],
                    start,
                    settings,
                    latents[1],
                )
            )
            made[0].watch_every = 0  # it looks at one step of 50

        def work() -> None:
            with self.pack.nodes.bridge.training_mode(), contextlib.ExitStack() as stack:
                if not made:
                    trainer()
                networks = made[0].denoiser.base.diffusion_model, made[0].encoder.clip.cond_stage_model
                if lean:
                    stack.enter_context(training.checkpointing.checkpointed(*networks))
                for _ in range(STEPS):
                    made[0].step(next(numbers))

        return work

    def reference(self, kept: bool = False, groups: int = 3, table: bool = True) -> Way:
        made: list = []

        def work() -> None:
            with self.pack.nodes.bridge.training_mode():
                if not made:
                    made.append(Reference(self, kept, groups, table))
                networks = made[0].denoiser.base.diffusion_model, made[0].clip.cond_stage_model
                with self.pack.training.checkpointing.checkpointed(*networks):
                    for _ in range(STEPS):
                        made[0].step()

        return work


class Reference:
    """The order of work of NSYNC's published code, v4.2 (its default)."""

    def __init__(self, shop: Workshop, kept: bool, groups: int, table: bool):
        import torch

        self.shop, self.groups = shop, groups
        self.denoiser, self.clip = shop.privately()
        self.generator = torch.Generator().manual_seed(2)
        self.kept = None
        if kept:
            with torch.no_grad():
                self.kept = [shop.encoded(some) for some in shop.pictures]
        self.table = self.clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
        if table:
            self.learned, self.encoder = self.table.requires_grad_(), None
        else:
            bridge = shop.pack.nodes.bridge
            self.learned = self.table[TOKEN_ID : TOKEN_ID + 1].detach().clone().requires_grad_()
            self.encoder = bridge.ComfyTextEncoder(self.clip)
            self.table.requires_grad_(False)
        self.optimiser = torch.optim.AdamW([self.learned], lr=1e-3, weight_decay=0.01)

    def step(self) -> None:
        import torch

        found = []
        for group in range(self.groups):  # pictures, negatives, anchors, which are pictures too
            self.loss(group % 2).backward()
            found.append(self.learned.grad.clone())
        row = slice(TOKEN_ID, TOKEN_ID + 1) if self.encoder is None else slice(None)
        positive, negative = found[0][row].flatten(), found[1][row].flatten()
        left = 2 * positive - (positive @ negative) / (negative @ negative) * negative
        with torch.no_grad():
            self.learned.grad.zero_()
            self.learned.grad[row] = left.view_as(found[0][row])
        self.optimiser.step()
        self.optimiser.zero_grad()

    def loss(self, kind: int):
        import torch

        rows = torch.randint(8, (BATCH,), generator=self.generator).tolist()
        with torch.no_grad():
            latents = self.kept[kind][rows] if self.kept else self.shop.encoded(self.shop.pictures[kind][rows])
        noise, sigma = torch.randn(latents.shape, generator=self.generator), self.denoiser.sigmas(BATCH, self.generator)
        return self.denoiser.error(latents, noise, sigma, self.said(rows)).square().mean()

    def said(self, rows: list[int]):
        """What the text encoder says of the captions, one by one as in ours."""
        captions = [CAPTIONS[r] for r in rows]
        if self.encoder is not None:
            return self.encoder.encode(captions, [{"clip_l": self.learned}] * BATCH)
        conditioning = self.shop.pack.training.protocols.Conditioning
        tokens = [self.clip.tokenize(caption.replace("{token}", "picture")) for caption in captions]
        return conditioning.stacked(
            [conditioning(*self.clip.encode_from_tokens(t, return_pooled=True)) for t in tokens]
        )
