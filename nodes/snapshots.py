"""Snapshot Grid: what a training had learned by each snapshot, side by side, and the one that is taken."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.sd
import folder_paths
import numpy
import torch
from comfy_api.latest import io, ui
from safetensors import SafetensorError

from ..training import artefact
from ..training.contrast import Tensors
from ..training.embedding import Embedding
from ..training.loop import Progress
from ..training.lora import DOWN, UP
from ..training.sheet import sheet
from .bridge import TOKEN, TOKENS, check_embedding_fits, family, spell, with_embeddings
from .generate import Recipe, generate_set, shrunk
from .progress import Reporter
from .train_embedding import EmbeddingType, starting_words
from .train_lora import named
from .training_job import run_folder

STEPS = 20  # of sampling, where 0 is given
LARGEST = 512  # pixels of a picture on the sheet
NAME = "snapshot"  # what the word is called in the prompts
PROMPTS = f"a red sphere in the style of {TOKEN}\na blue cube on a meadow in the style of {TOKEN}\na star at night in the style of {TOKEN}"


class SnapshotGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        learned = io.MatchType.Template("learned", [EmbeddingType, io.LoraModel])
        own = "0 takes the model's own: 128 for Pocket, 512 for SD 1.5, 1024 for SDXL."
        return io.Schema(
            node_id="CounterpointSnapshotGrid",
            display_name="Snapshot Grid",
            category="Counterpoint/metrics",
            description="Paints your prompts with every snapshot of a training, from the same noise, so that you see when the style was "
            "learned and when too much was. Take the snapshot you like: the last is not always the best.",
            search_aliases=["xy plot", "checkpoint grid", "compare snapshots", "choose epoch"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model as it was before the training; 1 model."),
                io.Clip.Input("clip", tooltip="From the same checkpoint, without the new word; 1 CLIP."),
                io.Vae.Input("vae", tooltip="From the same checkpoint; 1 VAE."),
                io.MatchType.Input(
                    "learned",
                    template=learned,
                    tooltip="The result of 1 training: embedding of Train Embedding, or lora of Train Style LoRA. It is the last row.",
                ),
                io.String.Input(
                    "run",
                    force_input=True,
                    tooltip="The output run of the same training node, which says where its snapshots lie; 1 name. Empty is refused, as a "
                    "guess could show another training.",
                ),
                io.String.Input(
                    "prompts",
                    default=PROMPTS,
                    multiline=True,
                    tooltip="1 prompt per line, each a column. {token} stands for the word, or for the trigger of a LoRA.",
                ),
                io.Int.Input(
                    "most",
                    default=5,
                    min=1,
                    max=50,
                    tooltip="How many snapshots are shown, 5 by default: evenly spread, the last always among them.",
                ),
                io.Int.Input(
                    "take",
                    default=0,
                    min=0,
                    max=20000,
                    tooltip="The step whose snapshot is given out, shown or not; 0 takes the last.",
                ),
                io.Int.Input(
                    "seed",
                    default=1,
                    min=0,
                    max=2**53,
                    control_after_generate=False,  # the same grid again is taken from disk
                    tooltip="Column number i starts from the noise of seed + i in every row, counted from 0.",
                ),
                io.Boolean.Input(
                    "untrained",
                    default=True,
                    tooltip="Shows step 0 as the first row: the word it started from, or the model without the LoRA.",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=200, advanced=True, tooltip=f"Sampling steps; 0 takes {STEPS}."
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    advanced=True,
                    tooltip="How strictly prompts are followed; 0 takes the model's own: 4 for Pocket, 7 for SD 1.5 and SDXL.",
                ),
                io.Int.Input(
                    "width", default=0, min=0, max=8192, step=8, advanced=True, tooltip=f"Pixels of a picture. {own}"
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=8192, step=8, advanced=True, tooltip=f"Pixels of a picture. {own}"
                ),
            ],
            outputs=[
                io.MatchType.Output(learned, display_name="learned", tooltip="The snapshot that was taken."),
                io.Image.Output(
                    display_name="sheet", tooltip="One picture: a row for each snapshot, a column for each prompt."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, clip, vae, learned, run, prompts, most, take, seed, untrained, **recipe) -> io.NodeOutput:
        kind = Word(learned) if isinstance(learned, Embedding) else Lora(learned)
        kind.check_fits(model, clip)
        snapshots = Snapshots(run, kind)
        taken = snapshots.take(take)
        shown = [0] * untrained + spread(snapshots.steps, most)
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        how = _recipe(model, seed, **recipe)
        rows = [snapshots.paint(step, model, clip, vae, lines, how) for step in shown]
        labels = [f"step {step}" + " (taken)" * (step == (take or snapshots.last)) for step in shown]
        picture = sheet(rows, labels)
        reporter = Reporter(1)
        reporter.update(Progress(1, 1, {}, 0, 0), picture)  # else the last row's preview would stay on the node
        said = f"Step {take or snapshots.last} of {snapshots.name} is taken; there are {listed(snapshots.steps)}."
        reporter.say(said)
        out = torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32) / 255)[None]
        return io.NodeOutput(taken, out, ui={**ui.PreviewImage(out, cls=cls).as_dict(), "text": [said]})


def _recipe(model, seed: int, steps: int, cfg: float, width: int, height: int) -> Recipe:
    own = family(model)
    return Recipe("", width or own.size, height or own.size, seed, steps or STEPS, cfg or own.cfg, "euler", "normal")


def spread(steps: list[int], most: int) -> list[int]:
    """At most `most` of them at equal distances; the last is among them."""
    count = min(most, len(steps))
    return [steps[round((i + 1) * len(steps) / count) - 1] for i in range(count)]


class Word:
    """A learned word (or several, learned together) reaches the model through the prompts."""

    def __init__(self, embedding: Embedding):
        self.embedding = embedding
        self.tensors = {
            f"{other}/{key}" if other else key: vectors
            for other, word in {"": embedding.vectors, **embedding.others}.items()
            for key, vectors in word.items()
        }

    def check_fits(self, model, clip) -> None:
        check_embedding_fits(clip, self.embedding)

    def stored(self, learned: Tensors) -> Tensors:
        """What a checkpoint calls learned, as in a snapshot."""
        return learned

    def made(self, tensors: Tensors, step: int) -> Embedding:
        return Embedding.of(tensors, self.embedding.name, {**self.embedding.facts, "steps": step})

    def start(self, clip, config: dict) -> Tensors:
        return starting_words(clip, config["start"], self.embedding.others, config["vectors"])

    def prompts(self, lines: list[str], config: dict) -> list[str]:
        for line in lines:
            asked = set(TOKENS.findall(line))
            if not asked:
                raise ValueError(
                    f"The prompt {line!r} has no {TOKEN}, and without the word every row would show the same picture: write {TOKEN} "
                    "where the word is to stand."
                )
            if unknown := asked - {"", *self.embedding.others}:
                raise ValueError(
                    f"The prompt {line!r} asks for a word {unknown.pop()!r}, which was not learned: use {TOKEN}."
                )
        return [spell(line, NAME) for line in lines]

    def given_to(self, model, clip, tensors: Tensors):
        return model, with_embeddings(clip, self.made(tensors, 0).words(NAME))


class Lora:
    """A LoRA changes the model itself; the trigger is a plain word, and a prompt may do without."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors

    def check_fits(self, model, clip) -> None:
        """ComfyUI leaves out what does not fit with a warning in the log; this says it where it is seen."""
        shapes = {name: tuple(weight.shape) for name, weight in model.model.state_dict().items()}
        for layer in (key.removesuffix(UP) for key in self.tensors if key.endswith(UP)):
            changed = (len(self.tensors[layer + UP]), *self.tensors[layer + DOWN].shape[1:])
            if shapes.get(f"{layer}.weight") != changed:
                raise ValueError(
                    f"This LoRA changes a layer {layer} of shape {changed}, and the model has none such: connect the model that it was "
                    "learned on."
                )

    def stored(self, learned: Tensors) -> Tensors:
        return named(learned)

    def made(self, tensors: Tensors, step: int) -> Tensors:
        return tensors

    def start(self, clip, config: dict) -> Tensors:
        return {}

    def prompts(self, lines: list[str], config: dict) -> list[str]:
        return [TOKENS.sub(lambda found: found[1] or config["trigger"].strip(), line) for line in lines]

    def given_to(self, model, clip, tensors: Tensors):
        return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0], clip


class Snapshots:
    """The states of a run by step, up to the one that came in."""

    def __init__(self, run: str, learned: Word | Lora):
        self.folder, self.learned, self.name = existing_run(run), learned, run.strip()
        self.config = json.loads((self.folder / "config.json").read_text())["config"]
        found = sorted(self.folder.glob("snapshots/step-*.safetensors"))
        kept = {int(digits): file for file in found if (digits := file.stem.removeprefix("step-")).isdecimal()}
        if not kept:
            raise ValueError(
                f"The run {self.name!r} has kept no snapshots: give snapshot_every of its training node a number such as 50, then train "
                "under another run name, or for more steps."
            )
        self.last = self._step_that_came(kept)
        self.files = {step: file for step, file in kept.items() if step < self.last}
        self.steps = [*self.files, self.last]

    def _step_that_came(self, kept: dict[int, Path]) -> int:
        """The run's last step, or an earlier one where the run has gone on since."""
        checkpoint = self._read(self.folder / "checkpoint.safetensors", artefact.read_tree)
        if same(self.learned.stored(checkpoint["state"]["learned"]), self.learned.tensors):
            return checkpoint["step"]
        for step in reversed(kept):
            if same(self._read(kept[step]), self.learned.tensors):
                return step
        raise ValueError(
            f"What came in as learned is not from the run {self.name!r}: connect learned and run to the same training node."
        )

    def _read(self, file: Path, how=lambda file: artefact.read(file)[0]):
        try:
            return how(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file.name} of the run {self.name!r} is missing or broken ({error}): delete it if it is a snapshot, or train under "
                "another run name."
            ) from error

    def tensors(self, step: int) -> Tensors:
        return self.learned.tensors if step == self.last else self._read(self.files[step])

    def take(self, step: int):
        """The snapshot of a step, as the training node would give it out."""
        if step and step not in self.steps:
            raise ValueError(
                f"The run {self.name!r} has no snapshot of step {step}: take {listed(self.steps)}, or 0 for the last."
            )
        return self.learned.made(self.tensors(step or self.last), step or self.last)

    def paint(self, step: int, model, clip, vae, lines: list[str], recipe: Recipe) -> torch.Tensor:
        """(n, 3, h, w), one for each line, from disk where they were painted before."""
        tensors = self.tensors(step) if step else self.learned.start(clip, self.config)
        equipped = self.learned.given_to(model, clip, tensors)
        place = self.folder / "grid" / f"step-{step:06d}"
        kind = place.relative_to(Path(folder_paths.get_output_directory()).resolve()).as_posix()
        pictures, _ = generate_set(*equipped, vae, self.learned.prompts(lines, self.config), recipe, "", kind)
        return torch.stack([shrunk(picture[0], LARGEST) for picture in pictures])


def listed(steps: list[int]) -> str:
    """All of them, or where they are very many those at the ends."""
    names = [str(step) for step in steps]
    return ", ".join(names if len(names) <= 40 else [*names[:4], "...", *names[-2:]])


def existing_run(name: str) -> Path:
    if not name.strip():
        raise ValueError("The name of the run is empty: connect run to the output run of the training node.")
    folder = run_folder(name, "", {})
    if not (folder / "config.json").exists():
        raise ValueError(
            f"There is no run {name!r} in output/counterpoint: connect run to the output run of the training node."
        )
    return folder


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


NODES = [SnapshotGrid]
