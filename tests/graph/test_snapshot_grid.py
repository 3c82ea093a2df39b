"""Snapshot Grid in whole prompts, on the small SD1.5 and on Pocket."""

import nodes
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from harness.executor import Graph
from harness.training import node, one_sentence, prompt, vectors

GRID = "CounterpointSnapshotGrid"
SMALL = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "width": 64, "height": 64, "steps": 2}
PROMPTS = "a red cat in the style of {token}\na dog, {token}"


def grid(train: dict | None = None, **inputs) -> dict[str, dict]:
    """1 to 5 a training of six steps with a snapshot of every second, 6 the grid."""
    given = {**SMALL, "learned": ["4", 0], "run": "mine", "prompts": PROMPTS, **inputs}
    return {**prompt(**{"run": "mine", "snapshot_every": 2, **(train or {})}), "6": node(GRID, **given)}


def lora(train: dict | None = None, **inputs) -> dict[str, dict]:
    """The same with a LoRA; its trigger is "cat"."""
    job = grid(train, **inputs)
    asked = {**job["4"]["inputs"], "trigger": "cat", "rank": 2, "learning_rate": 0.05}
    known = {each.id for each in nodes.NODE_CLASS_MAPPINGS["CounterpointTrainStyleLora"].GET_SCHEMA().inputs}
    return {**job, "4": node("CounterpointTrainStyleLora", **{k: v for k, v in asked.items() if k in known})}


def painted(folders) -> dict[str, int]:
    """Every picture of the grids, and when it was written."""
    root = folders / "output" / "counterpoint"
    return {str(file.relative_to(root)): file.stat().st_mtime_ns for file in root.glob("*/grid/*/*.png")}


def rows(folders, run: str = "mine") -> dict[int, torch.Tensor]:
    """Step -> pictures (n, H, W, 3) as they lie on disk."""
    found = {}
    for folder in sorted((folders / "output" / "counterpoint" / run / "grid").iterdir()):
        pictures = [numpy.asarray(Image.open(file), dtype=numpy.float32) / 255 for file in sorted(folder.glob("*.png"))]
        found[int(folder.name.split("-")[1])] = torch.from_numpy(numpy.stack(pictures))
    return found


# What is seen


@pytest.mark.parametrize("whole", [grid, lora], ids=["word", "lora"])
def test_every_snapshot_is_a_row_and_only_the_snapshot_differs(graph, folders, whole):
    run = graph(whole())
    found = rows(folders)
    assert list(found) == [0, 2, 4, 6] and all(len(row) == 2 for row in found.values())
    steps = list(found)
    assert all(not found[a].equal(found[b]) for a in steps for b in steps if a < b)
    height, width = run.value("6", 1).shape[1:3]
    assert (height, width) == (16 + 4 * (14 + 8 + 66), 16 + 2 * 66)
    assert run.ui["6"]["images"] and run.ui["6"]["text"] == ["Step 6 of mine is taken; there are 2, 4, 6."]
    shown = run.value("6", 1)[0]
    for number, step in enumerate(steps):
        top = 8 + number * 88 + 22
        assert (shown[top : top + 64, 8:72] - found[step][0]).abs().max() < 1 / 255, step


def test_a_row_is_what_core_paints_with_that_snapshot(graph, folders):
    """Column number 1 starts from the noise of seed + 1, whoever paints it."""
    run = graph(grid(take=4, seed=10, cfg=2.0))
    core = {
        "1": node("SmallModelsLoadSD15"),
        "2": node("CounterpointLoadEmbedding", embedding="run: mine/snapshots/step-000004.safetensors"),
        "3": node("CounterpointUseEmbedding", clip=["1", 1], embedding=["2", 0], name="style"),
        "4": node("CLIPTextEncode", clip=["3", 0], text="a dog, embedding:style"),
        "5": node("CLIPTextEncode", clip=["1", 1], text=""),
    }
    painting = _core(graph, core, model=["1", 0], positive=["4", 0], negative=["5", 0], seed=11)
    assert (rows(folders)[4][1] - painting).abs().max() <= 2 / 255
    assert vectors(run, "6").equal(vectors(graph({"1": core["2"], "2": node("PreviewAny", source=["1", 0])}), "1"))


def test_a_lora_reaches_the_model_by_cores_loader(graph, folders):
    job = lora(take=4, seed=10, cfg=2.0)
    core = {
        **job,
        "7": node("LoraModelLoader", model=["1", 0], lora=["6", 0], strength_model=1.0, bypass=False),
        "8": node("CLIPTextEncode", clip=["1", 1], text="a dog, cat"),
        "9": node("CLIPTextEncode", clip=["1", 1], text=""),
    }
    painting = _core(graph, core, model=["7", 0], positive=["8", 0], negative=["9", 0], seed=11)
    assert (rows(folders)[4][1] - painting).abs().max() <= 2 / 255


def _core(graph, job: dict, **wanted) -> torch.Tensor:
    """(H, W, 3) by KSampler."""
    how = {"steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    run = graph({
        **job,
        "c1": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "c2": node("KSampler", latent_image=["c1", 0], **how, **wanted),
        "c3": node("VAEDecode", samples=["c2", 0], vae=["1", 2]),
        "c4": node("SaveImage", images=["c3", 0], filename_prefix="core"),
    })  # fmt: skip
    return run.value("c3")[0]


def test_step_0_is_what_the_training_started_from(graph, folders):
    """For a word its first vectors, here those of "red cat"; for a LoRA the model without it."""
    graph(grid(cfg=2.0))
    plain = {
        "1": node("SmallModelsLoadSD15"),
        "4": node("CLIPTextEncode", clip=["1", 1], text="a dog, red cat"),
        "5": node("CLIPTextEncode", clip=["1", 1], text=""),
    }
    painting = _core(graph, plain, model=["1", 0], positive=["4", 0], negative=["5", 0], seed=2)
    assert (rows(folders)[0][1] - painting).abs().max() <= 2 / 255
    graph(lora({"run": "lora"}, run="lora", prompts="x\na dog, red {token}", cfg=2.0))
    assert (rows(folders, "lora")[0][1] - painting).abs().max() <= 2 / 255


def test_pocket_can_be_chosen_from(graph, folders):
    job = grid({"size": 128, "steps": 4, "start": "picture", "vectors": 0}, width=0, height=0, steps=0)
    del job["6"]["inputs"]["prompts"]
    job = {**job, "1": node("CounterpointLoadPocketModels"), "6": node(GRID, **job["6"]["inputs"])}
    graph(job)
    found = rows(folders)
    assert list(found) == [0, 2, 4] and found[4].shape == (3, 128, 128, 3)


# Evenly spread


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 50])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 20, 33])
def test_snapshots_are_spread_evenly(pack, count, most):
    steps = [10 * (i + 1) for i in range(count)]
    shown = pack.nodes.snapshots.spread(steps, most)
    assert len(shown) == min(count, most) == len(set(shown)) and shown[-1] == steps[-1] and set(shown) <= set(steps)
    gaps = [b - a for a, b in zip([0, *shown], shown, strict=False)]
    assert max(gaps) - min(gaps) <= 10, "as even as whole snapshots allow"


def test_a_few_of_many_are_shown(graph, folders):
    graph(grid({"snapshot_every": 1}, most=2, untrained=False))
    assert list(rows(folders)) == [3, 6]


def test_the_result_is_the_last_row_even_without_a_snapshot_of_its_own(graph, folders):
    run = graph(grid({"snapshot_every": 4}, untrained=False))
    assert list(rows(folders)) == [4, 6] and run.value("6").vectors["clip_l"].equal(vectors(run))


# What is taken


@pytest.mark.parametrize("whole", [grid, lora], ids=["word", "lora"])
def test_another_snapshot_is_taken_and_nothing_is_painted_again(graph, folders, whole):
    first = graph(whole())
    before, result = painted(folders), tensors(first.value("4"))
    assert len(before) == 8 and equal(tensors(first.value("6")), result)
    again = graph(whole(take=2))
    assert painted(folders) == before and again.executed == ["6"]
    assert [each["max"] for each in again.sent("progress")] == [1], "no sampler ran"
    kept = load_file(folders / "output" / "counterpoint" / "mine" / "snapshots" / "step-000002.safetensors")
    assert equal(tensors(again.value("6")), kept) and not equal(kept, result)
    assert again.ui["6"]["text"][0].startswith("Step 2 of mine is taken") and "5" not in again.executed


def test_a_word_that_was_taken_says_its_step(graph):
    taken, whole = (graph(grid(take=take)).value("6") for take in (4, 0))
    assert taken.facts == {**whole.facts, "steps": 4} and taken.name == whole.name == "mine"


def test_what_was_taken_is_used_as_the_result_would_be(graph):
    """The output has the type of what came in, so both kinds go on to their own nodes."""
    word = {**grid(take=2), "7": node("CounterpointUseEmbedding", clip=["1", 1], embedding=["6", 0], name="x")}
    assert graph({**word, "8": node("PreviewAny", source=["7", 1])}).value("7", 1) == "embedding:x"
    graph({**lora({"run": "lora"}, run="lora", take=2), "7": node("SaveLoRA", lora=["6", 0], prefix="loras/mine")})


def tensors(learned) -> dict[str, torch.Tensor]:
    return getattr(learned, "vectors", learned)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in one.items())


# Going on


@pytest.mark.parametrize("whole", [grid, lora], ids=["word", "lora"])
def test_a_continued_training_paints_only_the_new_rows(graph, folders, whole):
    graph(whole())
    before = painted(folders)
    run = graph(whole({"steps": 10}))
    after = painted(folders)
    assert before.items() <= after.items() and list(rows(folders)) == [0, 2, 4, 6, 8, 10]
    assert run.ui["6"]["text"] == ["Step 10 of mine is taken; there are 2, 4, 6, 8, 10."]


def test_a_result_from_before_the_run_went_on_is_still_the_last_row(graph):
    """ComfyUI keeps results in memory: back at 6 steps it gives out the old one."""
    early = Graph()
    early(grid())
    Graph()(grid({"steps": 8}))
    run = early(grid(take=2))
    assert run.executed == ["6"] and run.ui["6"]["text"] == ["Step 2 of mine is taken; there are 2, 4, 6."]


def test_cancelled_it_goes_on_with_the_next_row(graph, folders):
    graph({**prompt(run="mine", snapshot_every=2)})

    def cancel(name, data):
        if name == "progress" and len(painted(folders)) >= 4:
            nodes.interrupt_processing()

    cut = graph(grid(), check=False, on_event=cancel)
    before = painted(folders)
    assert cut.interrupted and "6" not in cut.outputs and 4 <= len(before) < 8
    graph(grid())
    assert before.items() <= painted(folders).items() and len(painted(folders)) == 8


def test_another_recipe_is_another_grid(graph, folders):
    """And the old one is there when it is wanted again."""
    for seed in (1, 2, 1):
        graph(grid(seed=seed))
    assert len(painted(folders)) == 16


# What can go wrong


BAD = (
    ({"run": " "}, ("name of the run is empty", "output run")),
    ({"run": "other"}, ("no run 'other'", "output run")),
    ({"run": "../mine"}, ("would leave ComfyUI's output folder",)),
    ({"take": 5}, ("no snapshot of step 5", "take 2, 4, 6", "0 for the last")),
    ({"take": 8}, ("no snapshot of step 8", "take 2, 4, 6")),
    ({"prompts": " \n"}, ("no prompts to paint", "one prompt per line")),
    ({"prompts": "a dog, {token}\na red cat"}, ("'a red cat' has no {token}", "same picture")),
    ({"prompts": "a {token:dog}, {token}"}, ("asks for a word 'dog'", "was not learned")),
)


def test_bad_input_is_one_clear_sentence(graph, folders):
    for inputs, words in BAD:
        one_sentence(graph(grid(**inputs), check=False), *words)
    assert not painted(folders)


def test_a_prompt_without_the_trigger_is_no_mistake(graph, folders):
    graph(lora(prompts="a dog"))
    assert not rows(folders)[0].equal(rows(folders)[6]), "a LoRA changes every picture"


def test_a_run_without_snapshots(graph):
    one_sentence(
        graph(grid({"snapshot_every": 0}), check=False), "'mine' has kept no snapshots", "snapshot_every", "50"
    )


def test_the_run_of_another_training(graph, folders):
    """Of another kind, and of the same kind with another seed."""
    graph(lora({"run": "lora"}, run="lora"))
    graph(grid({"run": "seed", "seed": 3}, run="seed"))
    for run in ("lora", "seed"):
        said = graph(grid(run=run), check=False)
        one_sentence(said, f"not from the run '{run}'", "same training node")


def test_a_broken_snapshot(graph, folders):
    graph(grid(most=1))
    file = folders / "output" / "counterpoint" / "mine" / "snapshots" / "step-000004.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    one_sentence(graph(grid(), check=False), "step-000004.safetensors", "broken", "delete")
    file.unlink()
    assert graph(grid()).ui["6"]["text"] == ["Step 6 of mine is taken; there are 2, 6."]


def test_another_kind_of_model_than_it_was_learned_on(graph, folders):
    other = {"model": ["7", 0], "clip": ["7", 1], "vae": ["7", 2]}
    word = {**grid(**other), "7": node("CounterpointLoadPocketModels")}
    one_sentence(graph(word, check=False), "embedding 'mine'", "another kind of model")
    changed = {**lora({"run": "lora"}, run="lora", **other), "7": node("SmallModelsLoadFamily", family="FLUX.1")}
    one_sentence(graph(changed, check=False), "This LoRA changes a layer", "learned on")
    assert not painted(folders)


def test_two_words_that_were_learned_together(graph, given, folders):
    """{token:dog} is a word of its own, and step 0 shows it as "dog"."""
    job = grid(
        {"captions": ["8", 0], "caption_use": "caption", "vectors": 1, "start": "cat"},
        prompts="a {token:dog}, {token}",
        cfg=2.0,
    )
    job["8"] = given("STRING", ["a {token:dog}, {token}"] * 3)
    graph(job)
    plain = {
        "1": node("SmallModelsLoadSD15"),
        "4": node("CLIPTextEncode", clip=["1", 1], text="a dog, cat"),
        "5": node("CLIPTextEncode", clip=["1", 1], text=""),
    }
    painting = _core(graph, plain, model=["1", 0], positive=["4", 0], negative=["5", 0], seed=1)
    assert (rows(folders)[0][0] - painting).abs().max() <= 2 / 255
