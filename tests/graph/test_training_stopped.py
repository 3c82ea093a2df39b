"""Training that is cancelled, finished early, resumed, full of NaN, or out of disk."""

import errno
import itertools
import math

import nodes
import pytest
import torch

from harness.executor import Graph
from harness.training import at_step, node, one_sentence, prompt, sound, steps, vectors

METHODS = ("plain", "paper", "reference point")


@pytest.mark.parametrize("method", METHODS)
def test_cancel_stops_within_a_step_and_resuming_is_as_if_it_had_not(graph, pack, folders, every_step, method):
    whole = graph(prompt(run="whole", method=method, steps=9))
    cut = graph(prompt(run="cut", method=method, steps=9), check=False, on_event=at_step(4, nodes.interrupt_processing))
    assert cut.interrupted and "4" not in cut.outputs and steps(cut)[-1] in (4, 5)
    sound("cancelling")
    folder = folders / "output" / "counterpoint" / "cut"
    kept = pack.training.artefact.read_tree(folder / "checkpoint.safetensors")
    assert kept["step"] in (4, 5)
    snapshot = graph(
        {
            "1": node("CounterpointLoadEmbedding", embedding="run: cut/checkpoint.safetensors"),
            "2": node("PreviewAny", source=["1", 0]),
        }
    )
    assert vectors(snapshot, "1").equal(kept["state"]["learned"]["clip_l"])
    rest = Graph()(prompt(run="cut", method=method, steps=9))
    assert steps(rest) == list(range(kept["step"] + 1, 10))
    assert vectors(rest).equal(vectors(whole)) and rest.value("4", 1) == whole.value("4", 1)


def test_finish_now_goes_on_with_what_there_is(graph, pack, every_step):
    def finish():
        pack.nodes.progress.finish("in-process", "4")

    run = graph(prompt(steps=50), on_event=at_step(3, finish))
    assert steps(run) == [1, 2, 3] and "step 3 of 50" in run.value("4", 2)
    assert len(run.value("4", 1)["loss"]) == 3 and run.value("4").facts["steps"] == 3 and "5" in run.executed
    again = graph(prompt(steps=5))
    assert steps(again) == [4, 5], "the wish to finish belonged to the first run"
    sound("finishing")


def test_finish_now_at_once_does_not_break_the_plot(graph, pack, every_step):
    """Core's plot divides by the range of the losses; one point has none."""
    run = graph(
        prompt(steps=50), check=False, on_event=at_step(1, lambda: pack.nodes.progress.finish("in-process", "4"))
    )
    assert not run.errors and steps(run) == [1]


def test_a_complete_run_is_taken_from_disk(graph, every_step):
    first = graph(prompt())
    again = Graph()(prompt())
    assert steps(again) == [] and vectors(again).equal(vectors(first)) and "from disk" in again.value("4", 2)
    assert again.value("4", 1) == first.value("4", 1) and again.value("4").facts == first.value("4").facts


def test_more_steps_continue_a_run(graph, every_step):
    graph(prompt(run="mine", steps=4))
    assert steps(graph(prompt(run="mine", steps=6))) == [5, 6]


@pytest.mark.parametrize("kind", ["CounterpointTrainEmbedding", "CounterpointTrainStyleLora"])
def test_a_finished_run_goes_on_at_the_pace_of_its_new_length(graph, pack, folders, every_step, kind):
    """Continue for 200 more, in small: what was done stays, and the learning rate is that of a training of 18 steps."""

    def training(steps: int) -> dict:
        job = prompt(run="mine", steps=steps)
        known = {each.id for each in nodes.NODE_CLASS_MAPPINGS[kind].GET_SCHEMA().inputs}
        asked = {k: v for k, v in job["4"]["inputs"].items() if k in known}
        return {**job, "4": node(kind, **{**asked, "learning_rate": 0.01})}

    folder = folders / "output" / "counterpoint" / "mine"
    first = graph(training(12))
    before = (folder / "log.jsonl").read_text()
    more = graph(training(18))
    assert first.ui["4"]["counterpoint_steps"] == [12] and more.ui["4"]["counterpoint_steps"] == [18]
    assert steps(more) == list(range(13, 19)) and (folder / "log.jsonl").read_text().startswith(before)
    assert len(more.ui["4"]["counterpoint_loss"]) == 18
    assert more.ui["4"]["counterpoint_loss"][:12] == first.ui["4"]["counterpoint_loss"]
    a, b = (getattr(run.value("4"), "vectors", run.value("4")) for run in (first, more))
    assert a.keys() == b.keys() and not all(torch.equal(a[k], b[k]) for k in a)
    kept = pack.training.artefact.read_tree(folder / "checkpoint.safetensors")
    assert kept["step"] == 18
    rate = kept["state"]["optimiser"]["param_groups"][0]["lr"]
    assert math.isclose(rate, 0.01 * (1 - 0.9 * 17 / 18)), "ten steps of warm-up, then a line down to a tenth"


def test_a_changed_setting_is_a_new_run(graph, folders, every_step):
    changes = [
        {},
        {"seed": 3},
        {"method": "paper"},
        {"start": "dog"},
        {"learning_rate": 0.01},
        {"template": "{token}"},
        {"caption_use": "caption"},
    ]
    for change in changes:
        assert steps(graph(prompt(steps=2, **change))) == [1, 2], change
    assert len(list((folders / "output" / "counterpoint").iterdir())) == len(changes)
    for id, what in {"1": "models", "2": "pictures", "3": "negatives"}.items():
        other = prompt(steps=2)
        other[id]["inputs"]["seed"] = 9
        assert steps(graph(other)) == [1, 2], f"other {what}"


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_full_disk_stops_with_one_sentence_and_the_run_can_go_on(graph, pack, every_step, monkeypatch, at):
    whole = graph(prompt(run="whole"))
    with monkeypatch.context() as patched:

        def fill():
            def full(*_):
                raise OSError(errno.ENOSPC, "No space left on device")

            patched.setattr(pack.training.artefact.os, at, full)

        run = graph(prompt(run="cut"), check=False, on_event=at_step(3, fill))
    one_sentence(run, "could not be written", "No space left on device", "free some disk space")
    sound("the full disk")
    assert vectors(Graph()(prompt(run="cut"))).equal(vectors(whole))


@pytest.fixture
def overflows(pack, monkeypatch):
    """From so many good steps on the network's answer is no number for so many steps, as in half precision."""

    def overflows(good: int, bad: int = 1000) -> None:
        error, calls = pack.nodes.bridge.ComfyDenoiser.error, itertools.count(-2)  # two passes measure memory

        def spoiled(self, *given):
            return error(self, *given) * (math.nan if good <= next(calls) < good + bad else 1)

        monkeypatch.setattr(pack.nodes.bridge.ComfyDenoiser, "error", spoiled)

    return overflows


def alone(**inputs) -> dict:
    """Plain, 20 steps; 5 shows the report."""
    return {**prompt(method="plain", steps=20, **inputs), "5": node("PreviewAny", source=["4", 2])}


def test_a_step_that_is_no_number_is_skipped_and_told(graph, overflows, every_step):
    overflows(3, bad=2)
    run = graph(alone(run="mine"))
    assert steps(run) == list(range(1, 21)) and "2 steps were skipped" in run.value("4", 2)
    assert vectors(run).isfinite().all() and len(run.value("4", 1)["loss"]) == 18
    sound("a skipped step")


def test_a_training_that_diverges_stops_and_keeps_the_last_good_state(graph, overflows, every_step):
    overflows(3)
    first = graph(alone(run="mine"))
    said = first.value("4", 2)
    assert "10 steps in a row" in said and "smaller learning rate" in said
    assert vectors(first).isfinite().all() and len(first.value("4", 1)["loss"]) == 3
    sound("divergence")
    again = Graph()(alone(run="mine"))
    assert vectors(again).equal(vectors(first)) and again.value("4", 1) == first.value("4", 1)


def test_divergence_at_the_first_step_does_not_break_the_plot(graph, overflows):
    overflows(0)
    run = graph(prompt(method="plain", steps=20), check=False)
    assert vectors(run).isfinite().all() and len(run.value("4", 1)["loss"]) == 2
    assert not run.errors, "no losses at all reached core's plot"


def test_a_picture_that_the_vae_makes_no_number_of_is_named(graph, given, small_models):
    """Dark ones do so in half precision."""
    with torch.inference_mode():
        vae = small_models.builders.sd15_vae()
    encode = vae.encode
    vae.encode = lambda picture: encode(picture) * (math.nan if picture.mean() < 0.01 else 1)
    pictures = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    pictures[1] = 0
    job = prompt(captions=None, method="plain", negatives=None, vae=["6", 0])
    del job["3"]
    run = graph({**job, "2": given("IMAGE", [pictures]), "6": given("VAE", [vae])}, check=False)
    one_sentence(run, "picture 2", "VAE", "32 bit")
