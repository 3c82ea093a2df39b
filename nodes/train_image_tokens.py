"""Train Image Tokens: from pictures alone to a projection of their embeddings, and a LoRA where one is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import comfy.supported_models
import torch
from comfy_api.latest import io

from ..training.contrast import Tensors
from ..training.image_tokens import (
    MEAN,
    STD,
    ImageTokens,
    Projector,
    cross_attention,
    moments,
    starting_projection,
    to_bytes,
)
from ..training.lora import DOWN, UP, applied, starting_matrices
from .bridge import Conditioning, check_belong_together, plain
from .features import of_clip_vision
from .image_tokens import CATEGORY, ImageTokensType, empty_prompt, with_tokens
from .metrics import CONNECTED, measure
from .train_lora import named
from .training_inputs import last_inputs, later_inputs, loss_outputs, time_inputs
from .training_job import Job, output

READS = (comfy.supported_models.SD15, comfy.supported_models.SD20, comfy.supported_models.SDXL)
PLAIN = {"method": "plain", "strength": 0.0}  # there are no negatives
RATE = "0 takes 0.001; Pocket, which is small, takes 0.01. A LoRA learns at 0.3 of it."
SHARED = {each.id: each for each in (*time_inputs(RATE, snapshots=500), *last_inputs(), *later_inputs())}


class TrainImageTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointTrainImageTokens",
            display_name="Train Image Tokens",
            category=CATEGORY,
            description="Teaches the model to paint from image embeddings, from pictures without captions: each embedding becomes a few words "
            "of its own. Then any picture, or a text by way of a prior, can be painted from.",
            search_aliases=["ip-adapter training", "unclip", "language-free", "image prompt", "shifted diffusion", "corgi"],
            is_experimental=True,
            is_input_list=True,
            not_idempotent=True,
            inputs=[
                io.Model.Input("model", tooltip="SD 1.5, SD 2, SDXL or Pocket; it is not changed. 1 model."),
                io.Clip.Input("clip", tooltip="From the same checkpoint; only what it says of the empty prompt is used. 1 CLIP."),
                io.Vae.Input("vae", tooltip="From the same checkpoint; 1 VAE."),
                io.ClipVision.Input("clip_vision", tooltip="Sees the pictures; the 1 you will paint with: ViT-H gives 1024 numbers for each, Pocket's own 128."),
                io.Image.Input("images", tooltip="Pictures of what you want to paint from, no captions. The tokens that ship with Pocket saw 2000; the more, the better. 1 is the least."),
                io.Int.Input("tokens", default=4, min=1, max=64, tooltip="How many words an embedding becomes; 4 as in IP-Adapter, up to 64."),
                io.Int.Input("rank", default=8, min=0, max=256, tooltip="0 learns the tokens alone. With 8 the layers by which pictures look at words learn too, as a LoRA; up to 256."),
                io.Int.Input("steps", default=0, min=0, max=200000, tooltip="0 takes 500 for Pocket, which show that it learns; 2500 made the tokens that ship. 5000 elsewhere, which was not measured: look at the previews."),
                io.Int.Input("batch", default=8, min=1, max=64, tooltip="Pictures per step; 8 is usual. Made smaller if memory is short."),
                SHARED["learning_rate"],
                io.Float.Input("noise", default=0.1, min=0.0, max=2.0, step=0.05, tooltip="Noise of up to this many standard deviations on the embeddings, so that those of a prior serve too; 0 is none."),
                io.Float.Input("empty", default=0.1, min=0.0, max=0.9, step=0.05, tooltip="Share of pictures that are left out; they teach the tokens for no picture, from which CFG leads away. 0.1 is usual."),
                *(SHARED[name] for name in ("seed", "preview_every", "snapshot_every", "weighting", "size", "run", "mirror", "memory")),
            ],
            outputs=[
                ImageTokensType.Output(display_name="image_tokens", tooltip="To Apply Image Tokens and Save Image Tokens."),
                *loss_outputs(),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return output(TokenJob, **inputs)


def check_reads_tokens(model) -> None:
    """Raises ValueError for a MODEL in which more tokens behind the prompt were never tried."""
    config = model.model.model_config
    if not isinstance(config, READS):
        raise ValueError(
            f"Image tokens cannot be trained for {type(config).__name__}: use SD 1.5, SD 2, SDXL or a model made from them."
        )


class TokenJob(Job):
    kind = "train-image-tokens"

    def __init__(self, model, clip, vae, images, captions, negatives, values, masks=None):
        check_reads_tokens(model)
        self.extractor = of_clip_vision(values["clip_vision"])
        super().__init__(model, clip, vae, images, None, None, {**values, **PLAIN})

    def run(self):
        pictures = self._both(self.images)
        self.embeddings = plain(measure(self.extractor, "images", pictures, CONNECTED, False).values)
        self.moments = moments(self.embeddings)
        with torch.no_grad():
            self.empty = Conditioning(*self.clip.encode_from_tokens(self.clip.tokenize(""), return_pooled=True))
        return super().run()

    def own_values(self) -> dict:
        small = self.family.name == "Pocket"
        return {"steps": 500 if small else 5000, "learning_rate": 0.01 if small else 0.001}

    def decides(self) -> dict:
        own = {k: self.values[k] for k in ("tokens", "rank", "noise")}
        return {**own, "clip_vision": self.extractor.identity}

    def captioned(self) -> list:
        return []

    def caption_settings(self) -> dict:
        return {}

    def each_with(self) -> str:
        return f"its own embedding of {self.embeddings.shape[1]} numbers"

    def how(self) -> dict:
        return {"noise": self.values["noise"], "empty": self.settings.empty}

    def trainer(self, denoiser, model, clip, latents, ways, negatives, masks) -> ImageTokens:
        empty = Conditioning(*(None if x is None else plain(x).to(latents.device) for x in self.empty[:2]))
        check_belong_together(model, empty)
        network, rank, seed = model.model.diffusion_model, self.values["rank"], self.settings.seed
        start = starting_projection(self.embeddings.shape[1], self.values["tokens"], empty.states.shape[-1], seed)
        start = {k: v.to(latents.device) for k, v in start.items()}
        if rank:
            start |= starting_matrices(network, cross_attention(network), rank, seed)
        whitened = ((self.embeddings - self.moments[MEAN]) / self.moments[STD]).to(latents.device)
        return ImageTokens(denoiser, network, empty, latents, whitened, start, self.settings, self.values["noise"])

    @contextlib.contextmanager
    def previewed(self, learned: Tensors, model, clip) -> Iterator[tuple]:
        with applied(model.model.diffusion_model, [learned]):
            yield self.projector({k: v.cpu() for k, v in learned.items()}, "preview", {}), ""

    def conditionings(self, projector: Projector, _) -> tuple[list, list]:
        """Four of the training pictures, from everywhere in the set."""
        n, empty = len(self.embeddings), empty_prompt(projector)
        tokens = projector.tokens(self.embeddings[[i * n // 4 for i in range(4)]])
        return [with_tokens(empty, each[None]) for each in tokens], with_tokens(empty, projector.nothing())

    def unmoved(self, name: str) -> str:
        return f"{name} was not learned" + (": no picture was left out." if name == "null" else ".")

    def projector(self, learned: Tensors, name: str, facts: dict) -> Projector:
        said = {
            **facts, **self.decides(), "clip_vision_name": self.extractor.name, "family": self.family.name,
            "dim": self.embeddings.shape[1], "width": self.empty.states.shape[-1],
        }  # fmt: skip
        lora = named({k: v for k, v in learned.items() if k.endswith((DOWN, UP))})
        return Projector.of(learned, self.moments, self.empty, name, lora, said)

    def file(self, learned: Tensors, name: str, facts: dict) -> bytes:
        return to_bytes(self.projector(learned, name, facts))

    def result(self, learned: Tensors, name: str, facts: dict) -> tuple[Projector, str]:
        made = self.projector(learned, name, facts)
        layers = sum(key.endswith(UP) for key in learned)
        also = f", {layers} layers of rank {self.values['rank']}" if layers else ""
        return made, f"{made.count} tokens{also}, learning rate {self.settings.learning_rate:g}"


NODES = [TrainImageTokens]
