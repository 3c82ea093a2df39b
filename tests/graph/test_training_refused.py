"""Bad input to Train Embedding: one clear sentence, before anything is lost."""

import re
import subprocess
import sys

import comfy.model_management
import pytest
import torch

from harness.training import node, one_sentence, prompt, sound, vectors

HOLD = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"


def test_a_name_that_exists_with_other_settings_is_refused(graph):
    graph(prompt(run="mine", steps=2))
    one_sentence(
        graph(prompt(run="mine", steps=2, seed=3), check=False), "'mine'", "seed was 0 and is now 3", "'mine-2'"
    )


@pytest.mark.parametrize("template", ["a picture", "", "a {token} and a {token}", "{Token}"])
def test_a_template_without_the_word_is_refused_before_anything_runs(graph, template):
    run = graph(prompt(template=template), check=False)
    one_sentence(run, "{token}", "once")
    assert run.executed == [] and list(run.node_errors) == ["4"]


def _linked(template: str) -> dict:
    return {**prompt(template=["6", 0]), "6": node("PrimitiveString", value=template)}


def test_a_template_from_another_node_works(graph):
    assert vectors(graph(_linked("a picture in the style of {token}"))).equal(vectors(graph(prompt())))


def test_a_template_from_another_node_is_checked_too(graph):
    one_sentence(graph(_linked("a picture"), check=False), "{token}", "once")


@pytest.mark.parametrize("start", ["", "  "])
def test_an_empty_initialiser_is_refused(graph, start):
    one_sentence(graph(prompt(start=start), check=False), "does not know the start", "word")


def test_a_start_that_pocket_never_read_is_refused_and_said_of_prompts(graph, caplog):
    pocket = {
        "1": node("CounterpointLoadPocketModels"),
        "6": node("CLIPTextEncode", clip=["1", 1], text="a purple dragon"),
    }
    graph({**pocket, "7": node("PreviewAny", source=["6", 0])})
    assert [r.getMessage() for r in caplog.records if "never read 'dragon' (in 'a purple dragon')" in r.getMessage()]
    run = graph({**prompt(start="dragon", size=128), **pocket}, check=False)
    one_sentence(run, "does not know the start 'dragon'", "word")
    sound("the refusal")


@pytest.mark.parametrize("run", ["../out", "/tmp/x", "..", "a/../../b", "."])
def test_a_run_stays_in_the_output_folder(graph, folders, run):
    one_sentence(graph(prompt(run=run), check=False), "output folder", "name")
    assert not (folders / "out").exists()


def _wider_clip(small_models, monkeypatch):
    monkeypatch.setattr(small_models.builders, "CLIP_TEXT", {**small_models.builders.CLIP_TEXT, "hidden_size": 48})
    with torch.inference_mode():
        clip = small_models.builders.sd15_clip()
    clip.tokenizer.clip_l.embedding_size = 48
    return clip


def test_model_and_clip_that_do_not_belong_together(graph, given, small_models, monkeypatch):
    job = {**prompt(clip=["6", 0]), "6": given("CLIP", [_wider_clip(small_models, monkeypatch)])}
    one_sentence(graph(job, check=False), "MODEL and CLIP do not belong together", "32", "48", "same checkpoint")
    sound("the refusal")


BAD = {
    "negatives missing": (None, {"negatives": None}, ["negative", "0 for 3", "plain"]),
    "negatives of another count": ("3", [torch.rand(2, 64, 64, 3)], ["negative", "2 for 3", "Negative Set"]),
    "negatives of several sizes": (
        "3",
        [torch.rand(2, 64, 64, 3), torch.rand(1, 64, 96, 3)],
        ["different sizes", "64x64", "96x64"],
    ),
    "no pictures": ("2", [], ["no pictures"]),
    "no captions to use": (
        None,
        {"captions": None, "caption_use": "caption"},
        ["'caption'", "0 captions for 3 pictures"],
    ),
}


def test_a_word_that_no_caption_says_is_refused(graph):
    template = "a {token:cat} in the style of {token}"
    one_sentence(
        graph(prompt(template=template, method="plain", caption_use="caption"), check=False),
        "{token:cat}",
        "its caption",
        "caption_use",
    )
    assert graph(prompt(template=template, method="plain", caption_use="dropout")).value("4").others.keys() == {"cat"}


MASKS = {
    "black": (torch.zeros(3, 64, 64), ["Mask 1 is black", "without transparency"]),
    "black where it is cut": (
        torch.cat([torch.zeros(3, 64, 64).index_fill_(2, torch.arange(14), 1.0)]),
        ["Mask 1 is black"],
    ),
    "of another size": (torch.ones(3, 32, 64), ["Mask 1 is 64x32", "64x128"]),
    "of another count": (torch.ones(2, 128, 64), ["2 masks for 3 pictures"]),
}


@pytest.mark.parametrize("what", MASKS)
def test_masks_that_leave_nothing(graph, given, what):
    masks, words = MASKS[what]
    wide = what == "black where it is cut"
    pictures = torch.rand(3, 64, 128, 3) if wide else torch.rand(3, 128, 64, 3)
    masks = (
        torch.nn.functional.pad(masks, (0, 64)) if wide else masks
    )  # only the outermost of a wide picture, which is cut off
    job = {**prompt(captions=None, method="plain", negatives=None, masks=["6", 0]), "2": given("IMAGE", [pictures])}
    del job["3"]
    one_sentence(graph({**job, "6": given("MASK", [masks])}, check=False), *words)


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_sentence(graph, given, what):
    id, value, words = BAD[what]
    job = prompt(**value) if id is None else {**prompt(captions=None), id: given("IMAGE", value)}
    one_sentence(graph(job, check=False), *words)
    sound("the refusal")


def test_negatives_of_another_size_than_the_pictures_are_fitted(graph, given):
    assert vectors(graph({**prompt(), "3": given("IMAGE", [torch.rand(3, 96, 128, 3)])})).isfinite().all()


def test_a_run_that_another_process_trains_is_refused(graph, folders):
    folder = folders / "output" / "counterpoint" / "busy"
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    one_sentence(graph(prompt(run="busy", steps=2), check=False), "'busy'", "being trained right now", "'busy-2'")
    holder.kill()
    holder.communicate()
    assert vectors(graph(prompt(run="busy", steps=2))).isfinite().all()


def _short_of_memory(monkeypatch, free: float) -> None:
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: free)


def _needed(graph, caplog, memory: str) -> float:
    caplog.clear()
    graph(prompt(batch=3, memory=memory, run=memory))
    return float(re.search(r"steps of 3 pictures, about (\d+) MB", caplog.text)[1]) * 1e6


def test_where_memory_is_short_it_computes_twice_and_learns_the_same(graph, monkeypatch, caplog):
    caplog.set_level("INFO")
    fast = graph(prompt(batch=3))
    need = {memory: _needed(graph, caplog, memory) for memory in ("fast", "lean")}
    assert need["lean"] < 0.8 * need["fast"]
    _short_of_memory(monkeypatch, need["fast"] * 0.9)
    caplog.clear()
    lean = graph(prompt(batch=3, run="short"))
    assert "with gradient checkpointing" in caplog.text and "instead of" not in lean.value("4", 2)
    assert torch.allclose(vectors(lean), vectors(fast), atol=1e-5)


def test_fewer_pictures_per_step_where_memory_is_shorter_still(graph, monkeypatch, caplog):
    caplog.set_level("INFO")
    _short_of_memory(monkeypatch, _needed(graph, caplog, "lean") * 0.8)
    run = graph(prompt(batch=3, seed=1))
    assert "2 instead of 3 pictures per step, to fit into memory" in run.value("4", 2)


def test_too_little_memory_for_one_picture_is_refused(graph, monkeypatch):
    _short_of_memory(monkeypatch, 1000.0)
    one_sentence(graph(prompt(), check=False), "64 pixels needs about", "choose a smaller size")
