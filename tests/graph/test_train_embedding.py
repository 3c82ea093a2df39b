"""Train, save, load and use a word through ComfyUI's executor, on the small SD1.5."""

import errno
import math
import subprocess
import sys

import comfy.model_management
import nodes
import pytest
import torch

from harness.executor import Graph

METHODS = ("plain", "paper", "reference point")
HOLD = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"


def node(class_type: str, **inputs) -> dict:
    """A node of a prompt, what is not given at its default."""
    schema = getattr(nodes.NODE_CLASS_MAPPINGS[class_type], "GET_SCHEMA", None)  # core's older nodes have none
    known = schema().inputs if schema else []
    defaults = {i.id: i.default for i in known if getattr(i, "default", None) is not None}
    return {"class_type": class_type, "inputs": {**defaults, **inputs}}


def prompt(**inputs) -> dict[str, dict]:
    """1 models, 2 three pictures, 3 three negatives, 4 training, 5 the loss plot."""
    given = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], "captions": ["2", 1], "negatives": ["3", 0],
        "size": 64, "steps": 6, "batch": 2, "preview_every": 0, "vectors": 2, "start": "red cat", **inputs,
    }  # fmt: skip
    pictures = {"count": 3, "captions": "content"}
    return {
        "1": node("SmallModelsLoadSD15"),
        "2": node("CounterpointPocketPictures", **pictures, style="comic"),
        "3": node("CounterpointPocketPictures", **pictures, style="photo", seed=2),
        "4": node("CounterpointTrainEmbedding", **{k: v for k, v in given.items() if v is not None}),
        "5": node("LossGraphNode", loss=["4", 1]),
    }


@pytest.fixture
def given(monkeypatch):
    """`given("IMAGE", [a, b])` is a node that gives out these values as a list."""

    def given(kind: str, values: list) -> dict:
        class Given:
            RETURN_TYPES, OUTPUT_IS_LIST, FUNCTION, CATEGORY = (kind,), (True,), "give", "test"

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {}}

            def give(self):
                return (values,)

        name = f"Given{kind}{id(values)}"
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, Given)
        return {"class_type": name, "inputs": {}}

    return given


@pytest.fixture
def every_step(pack, monkeypatch):
    """An event for every step, however quick."""
    monkeypatch.setattr(pack.nodes.progress, "EVERY", -1.0)


def vectors(run, id: str = "4") -> torch.Tensor:
    return run.value(id).vectors["clip_l"]


def steps(run) -> list[int]:
    return [said["step"] for said in run.sent("counterpoint.progress")]


def at_step(step: int, do):
    """An on_event that does something once, when a step is reported."""
    done = []

    def on_event(name, data):
        if name == "counterpoint.progress" and data["step"] == step and not done:
            done.append(step)
            do()

    return on_event


def one_sentence(run, *words: str) -> None:
    """Exactly one thing went wrong, and it says what, where and what to do."""
    assert len(run.errors) == 1, run.errors
    said = run.errors[0]
    assert all(word in said for word in words), said
    assert len(said) < 500 and "\n" not in said and "Traceback" not in said


def sound(text: str) -> None:
    assert not comfy.model_management.in_training, f"{text} left ComfyUI in training mode"


# The whole way


@pytest.mark.parametrize("method", METHODS)
def test_a_word_is_learned(graph, every_step, method):
    run = graph(prompt(method=method))
    learned = run.value("4")
    assert learned.vectors.keys() == {"clip_l"} and learned.vectors["clip_l"].shape == (2, 32) and learned.count == 2
    assert learned.vectors["clip_l"].isfinite().all() and not learned.vectors["clip_l"].is_inference()
    facts = {"method": method, "steps": 6, "seed": 0, "strength": 1.0, "start": "red cat"}
    assert facts.items() <= learned.facts.items()
    loss = run.value("4", 1)["loss"]
    assert len(loss) == 6 and all(math.isfinite(x) and x > 0 for x in loss)
    assert method in run.value("4", 2) and "6 steps" in run.value("4", 2) and "3 pictures" in run.value("4", 2)
    assert len(run.outputs["4"]) == 3 and run.ui["4"]["counterpoint_loss"] == loss and run.ui["5"]["images"]
    sound("training")


def test_progress_is_told_step_by_step(graph, every_step):
    """record() in the harness refuses anything that is not finite JSON."""
    run = graph(prompt())
    said = run.sent("counterpoint.progress")
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    for each in said:
        assert each["prompt_id"] == "in-process" and each["node_id"] == "4" and each["steps"] == 6
        assert each["loss"] > 0 and each["eta_s"] >= 0 and {"cosine", "removed", "norm"} <= each["stats"].keys()
    assert said[-1]["eta_s"] == 0 and run.sent("progress")[-1]["value"] == 6


@pytest.mark.parametrize("cut", [False, True], ids=["to the end", "interrupted"])
def test_model_and_clip_are_bit_identical_afterwards(graph, every_step, cut):
    shown = {**prompt(), "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red cat"}}}
    shown["7"] = node("PreviewAny", source=["6", 0])
    alone = {key: shown[key] for key in ("1", "6", "7")}
    first = graph(alone)
    modules = {
        "model": first.value("1", 0).model,
        "clip": first.value("1", 1).cond_stage_model,
        "vae": first.value("1", 2).first_stage_model,
    }
    before = {name: {k: t.clone() for k, t in m.state_dict().items()} for name, m in modules.items()}
    said = first.value("6")[0][0].clone()
    run = graph(shown, check=not cut, on_event=at_step(3, nodes.interrupt_processing) if cut else None)
    assert run.interrupted == cut and "1" not in run.executed
    for name, module in modules.items():
        assert all(torch.equal(t, before[name][k]) for k, t in module.state_dict().items()), name
    clip = first.value("1", 1)
    with torch.inference_mode():
        assert said.equal(clip.encode_from_tokens_scheduled(clip.tokenize("a red cat"))[0][0])
    sound("the run")


def test_strength_nothing_is_plain_bit_for_bit(graph):
    plain = vectors(graph(prompt(method="plain", negatives=None)))
    for method in METHODS[1:]:
        assert plain.equal(vectors(graph(prompt(method=method, strength=0.0))))
    assert not plain.equal(vectors(graph(prompt(method="paper"))))


def test_looking_at_it_changes_nothing(graph, folders):
    """Previews and snapshots on the way: the samplers use the global generator, the training must not notice."""
    plain = graph(prompt(run="plain"))
    seen = graph(prompt(run="seen", preview_every=2, snapshot_every=3))
    assert vectors(plain).equal(vectors(seen))
    folder = folders / "output" / "counterpoint" / "seen"
    assert sorted(f.name for f in (folder / "snapshots").iterdir()) == [
        "step-000003.safetensors",
        "step-000006.safetensors",
    ]
    assert sorted(f.name for f in (folder / "previews").iterdir()) == ["step-000002.jpg", "step-000004.jpg"]
    assert len(seen.sent("preview")) == 2
    last = graph(
        {
            "1": node("CounterpointLoadEmbedding", embedding="run: seen/snapshots/step-000006.safetensors"),
            "2": node("PreviewAny", source=["1", 0]),
        }
    )
    assert vectors(last, "1").equal(vectors(seen))


def test_one_picture_is_enough(graph, given):
    one = {**prompt(), "2": given("IMAGE", [torch.rand(1, 80, 64, 3)]), "3": given("IMAGE", [torch.rand(1, 64, 64, 3)])}
    one["4"]["inputs"].pop("captions")
    assert vectors(graph(one)).isfinite().all()


def test_a_batch_and_a_list_of_pictures_are_the_same(graph, given):
    pictures, negatives = torch.rand(3, 64, 64, 3), torch.rand(3, 64, 64, 3)
    learned = []
    for cut in (1, 2, 3):
        both = {"2": given("IMAGE", list(pictures.split(cut))), "3": given("IMAGE", list(negatives.split(cut)))}
        job = {**prompt(run=f"cut-{cut}"), **both}
        job["4"]["inputs"].pop("captions")
        learned.append(vectors(graph(job)))
    assert learned[0].equal(learned[1]) and learned[0].equal(learned[2])


@pytest.mark.parametrize("use", ["caption", "dropout"])
@pytest.mark.parametrize(
    "template", ["a picture in the style of {token}", "{token} art", "{token}, painted in the style of a child"]
)
def test_captions_can_be_used(graph, use, template):
    assert vectors(graph(prompt(caption_use=use, template=template))).isfinite().all()


@pytest.mark.parametrize("use", ["template", "caption", "dropout"])
@pytest.mark.parametrize(
    "template", ["a picture in the style of {token}", "{token} art", "{token} in the style of a child"]
)
def test_every_way_of_captioning_has_the_word_once(pack, use, template):
    ways = pack.nodes.train_embedding.ways_to_caption(["a red cube", " a dog. ", ""], template, use)
    assert len(ways) == 3 and [len(w) for w in ways] == [2 if use == "dropout" else 1] * 3
    assert all(caption.count("{token}") == 1 for each in ways for caption in each), ways
    assert (template in ways[0]) == (use != "caption") and any("a red cube" in caption for caption in ways[0]) == (
        use != "template"
    )


# Saved, loaded, used


def _conditioning(run, id: str) -> torch.Tensor:
    return run.value(id)[0][0]


def test_a_word_means_the_same_from_memory_and_from_disk(graph):
    text = "a cat in the style of embedding:{}, (embedding:{}:1.2) on grass"
    job = {
        **prompt(),
        "6": node("CounterpointUseEmbedding", clip=["1", 1], embedding=["4", 0], name="fresh"),
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["6", 0], "text": text.format("fresh", "fresh")}},
        "8": node("CounterpointSaveEmbedding", embedding=["4", 0], name="saved", preview=["2", 0]),
        "9": node("PreviewAny", source=["7", 0]),
    }
    first = graph(job)
    assert first.value("6", 1) == "embedding:fresh"
    assert set(first.outputs["8"][0]) == {"saved"}, "three previews are three calls with the same word: one file"
    later = {  # as after a restart: another executor, other loaders
        "1": node("SmallModelsLoadSD15"),
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text.format("saved", "saved")}},
        "3": node("CounterpointLoadEmbedding", embedding="saved.safetensors"),
        "4": node("CounterpointUseEmbedding", clip=["1", 1], embedding=["3", 0], name="again"),
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 0], "text": text.format("again", "again")}},
        "6": node("PreviewAny", source=["2", 0]),
        "7": node("PreviewAny", source=["5", 0]),
    }
    second = Graph()(later)
    for id in ("2", "5"):
        assert (_conditioning(first, "7") - _conditioning(second, id)).abs().max() <= 1e-6
    assert second.value("3").facts["method"] == "reference point" and second.value("3").facts["steps"] == 6


@pytest.mark.parametrize("name", ["my style", "../style", "a/b", "style,", ""])
@pytest.mark.parametrize("which", ["CounterpointUseEmbedding", "CounterpointSaveEmbedding"])
def test_a_name_that_prompts_cannot_say_is_refused(graph, pack, given, which, name):
    word = pack.training.embedding.Embedding({"clip_l": torch.zeros(1, 32)}, "x")
    job = {
        "1": given("EMBEDDING", [word]),
        "2": node("SmallModelsLoadSD15"),
        "3": node(which, embedding=["1", 0], name=name),
    }
    if which == "CounterpointUseEmbedding":
        job["3"]["inputs"]["clip"] = ["2", 1]
        job["4"] = node("PreviewAny", source=["3", 1])
    one_sentence(graph(job, check=False), "cannot be used as an embedding", "for example")


# Stopping, resuming, finishing


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
    assert vectors(snapshot, "1").equal(kept["state"]["vectors"]["clip_l"])
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


# Bad input


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
    one_sentence(graph(prompt(start=start), check=False), "initialiser", "word")
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
