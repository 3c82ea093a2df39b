"""Training that is cancelled, finished early, resumed, full of NaN, or out of disk."""

import errno
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
def poisoned(given, small_models):
    """A job in which one of three pictures becomes no number in the VAE, as dark ones do in half precision; one picture
    is drawn for each step, the bad one for the first time after `good` steps."""
    with torch.inference_mode():
        vae = small_models.builders.sd15_vae()
    encode = vae.encode
    vae.encode = lambda picture: encode(picture) * (math.nan if picture.mean() < 0.01 else 1)
    pictures = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    pictures[1] = 0

    def poisoned(good: int, **inputs) -> dict:
        seed = next(s for s in range(200) if [_drawn(s, i) == 1 for i in range(good + 1)] == [False] * good + [True])
        job = prompt(
            batch=1, steps=20, captions=None, method="plain", negatives=None, vae=["6", 0], seed=seed, **inputs
        )
        del job["3"]
        return {**job, "2": given("IMAGE", [pictures]), "6": given("VAE", [vae])}

    return poisoned


def _drawn(seed: int, step: int) -> int:
    """The picture that a step of one picture takes, as latents.draw draws it."""
    return int(torch.randperm(3, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))[0])


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(graph, poisoned, every_step):
    job = poisoned(3, run="mine")
    job["5"] = node("PreviewAny", source=["4", 2])
    first = graph(job)
    assert steps(first) == [1, 2, 3]
    said = first.value("4", 2)
    assert "not a number" in said and "step 3" in said and "smaller learning rate" in said
    assert vectors(first).isfinite().all() and first.value("4").facts["steps"] == 3
    assert len(first.value("4", 1)["loss"]) == 3
    sound("divergence")


def test_queued_again_a_diverged_run_says_the_same(graph, poisoned, every_step):
    job = poisoned(3, run="mine")
    job["5"] = node("PreviewAny", source=["4", 2])
    first, again = graph(job), Graph()(job)
    assert vectors(again).equal(vectors(first)) and again.value("4").facts["steps"] == 3
    assert "step 3" in again.value("4", 2) and again.value("4", 1) == first.value("4", 1)


def test_divergence_at_the_first_step_does_not_break_the_plot(graph, poisoned, every_step):
    run = graph(poisoned(0), check=False)
    assert steps(run) == [] and vectors(run).isfinite().all()
    assert not run.errors, "no losses at all reached core's plot"
