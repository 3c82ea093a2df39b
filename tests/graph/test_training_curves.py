"""Training Curves in whole prompts, on the small SD1.5."""

import json

import pytest

from harness.training import node, one_sentence, prompt

NODE = "CounterpointTrainingCurves"
PLOT = (440, 220)  # pixels of one


def whole(train: dict | None = None, trainer: str = "CounterpointTrainEmbedding", **inputs) -> dict[str, dict]:
    """1 to 5 a training of six steps, 6 its curves."""
    job = prompt(**{"run": "mine", **(train or {})})
    known = node(trainer)["inputs"].keys() | {"model", "clip", "vae", "images", "captions", "negatives"}
    job["4"] = node(trainer, **{k: v for k, v in job["4"]["inputs"].items() if k in known})
    return {**job, "6": node(NODE, **{"run": ["4", 3], **inputs})}


def logged(folders) -> list[dict]:
    lines = (folders / "output" / "counterpoint" / "mine" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method, plots", [("plain", 4), ("reference point", 6)])
def test_a_plot_for_each_thing_that_was_logged(graph, folders, method, plots):
    """Loss, signal and two lengths; with negatives the cosine and what was removed, too."""
    run = graph(whole({"method": method}))
    assert tuple(run.value("6").shape) == (1, PLOT[1] * plots // 2, PLOT[0] * 2, 3)
    assert len(run.ui["6"]["images"]) == 1
    losses = [record["loss"] for record in logged(folders)]
    mean = f"{sum(losses) / 6:.3g}"
    assert run.ui["6"]["text"] == [
        f"6 steps of mine, 0 of them skipped. Loss {mean} in the first 6 steps, {mean} in the last 6."
    ]


def test_what_the_window_is_of(graph, folders):
    run = graph(whole(window=2))
    losses = [record["loss"] for record in logged(folders)]
    first, last = (f"{sum(part) / 2:.3g}" for part in (losses[:2], losses[-2:]))
    assert f"Loss {first} in the first 2 steps, {last} in the last 2." in run.ui["6"]["text"][0]


def test_a_training_without_a_single_loss(graph, folders):
    graph(whole())
    log = folders / "output" / "counterpoint" / "mine" / "log.jsonl"
    log.write_text("".join(f'{{"time": 1.0, "step": {i}, "skipped": {i}.0}}\n' for i in (1, 2)))
    run = graph({"6": node(NODE, run="mine")})
    assert run.ui["6"]["text"] == ["2 steps of mine, 2 of them skipped. No loss was a number."]
    assert tuple(run.value("6").shape) == (1, PLOT[1], PLOT[0], 3)


def test_a_lora_has_a_size_and_no_length(graph):
    run = graph(whole({"method": "plain"}, trainer="CounterpointTrainStyleLora"))
    assert tuple(run.value("6").shape) == (1, PLOT[1], PLOT[0] * 2, 3)
    word = graph(whole({"method": "plain", "run": "other"}))
    right = (slice(None), slice(0, 40), slice(PLOT[0], None))
    assert not run.value("6")[right].equal(word.value("6")[right])


def test_more_steps_are_drawn_when_the_training_goes_on(graph):
    before = graph(whole())
    after = graph(whole({"steps": 9}))
    assert after.ui["6"]["text"][0].startswith("9 steps of mine")
    assert not after.value("6").equal(before.value("6"))


@pytest.mark.parametrize("name, words", [
    ("", ("is empty", "connect run")), ("nobody", ("no run 'nobody'", "connect run")), ("../away", ("would leave", "plain name")),
])  # fmt: skip
def test_a_run_that_is_not_there(graph, name, words):
    one_sentence(graph({"6": node(NODE, run=name)}, check=False), *words)


def test_a_run_without_a_step(graph, folders):
    graph(whole())
    (folders / "output" / "counterpoint" / "mine" / "log.jsonl").write_text('{"time": 1, "st')
    one_sentence(graph({"6": node(NODE, run="mine")}, check=False), "'mine' has logged no step", "run the graph again")
