"""Filter Set in whole prompts, on Pocket's pictures and its probe of objects."""

import json

import pytest
import torch
from safetensors.torch import save_file

from harness.training import node, one_sentence

OBJECTS, POCKET = "Pocket's objects", "Pocket"


def painted(graph, count: int, **inputs) -> tuple[list, list, list]:
    """Pictures, captions and masks of Pocket's world."""
    run = graph(
        {
            "1": node("CounterpointPocketPictures", count=count, style="photo", **inputs),
            "2": node("PreviewAny", source=["1", 1]),
        }
    )
    return tuple(run.outputs["1"][slot] for slot in range(3))


@pytest.fixture
def collection(graph):
    """Four sets: one object three times; three objects; a picture twice; a picture alone."""
    same, other, twin = painted(graph, 3, seed=1, same_object=4), painted(graph, 3, seed=2), painted(graph, 1, seed=5)
    images, captions, masks = (a + b + c + c + c for a, b, c in zip(same, other, twin, strict=True))
    return images, captions, masks, [1, 1, 1, 2, 2, 2, 3, 3, 4]


@pytest.fixture
def filtered(given, collection):
    """A prompt: 1 the filter, 2 identity, 3 to 6 what it filters, 7 to 9 whoever wants it."""

    def prompt(of=None, identity=OBJECTS, clip=None, masks=False, **inputs) -> dict:
        images, captions, own, sets = of or collection
        wires = {"images": ["3", 0], "captions": ["4", 0], "sets": ["5", 0]}
        job = {"3": given("IMAGE", images), "4": given("STRING", captions), "5": given("INT", sets)}
        if identity:
            wires["identity"], job["2"] = ["2", 0], node("CounterpointLoadFeatures", extractor=identity)
        if clip:
            wires["clip_features"], job["8"] = ["8", 0], node("CounterpointLoadFeatures", extractor=clip)
        if masks:
            wires["masks"], job["6"] = ["6", 0], given("MASK", own)
        return {
            **job,
            "1": node("CounterpointFilterSet", **{**wires, **inputs}),
            "7": node("PreviewImage", images=["1", 4]),
        }

    return prompt


def kept(run) -> list[torch.Tensor]:
    return run.outputs["1"][0]


def seen(run, id: str, *pictures: torch.Tensor) -> torch.Tensor:
    """(n, d) as the extractor of a node sees single pictures."""
    with torch.inference_mode():
        return torch.cat([run.value(id).pictures(picture) for picture in pictures]).double()


def scores(folders, run) -> dict:
    where = run.value("1", 9).rsplit("scores in ", 1)[1]
    return json.loads((folders / where).read_text())


def test_the_same_object_stays_and_the_rest_is_named(graph, folders, filtered, collection):
    run = graph(filtered(most=0.999))
    images, captions, masks, sets = collection
    assert torch.cat(kept(run)).equal(torch.cat(images[:3])) and run.outputs["1"][1] == captions[:3]
    assert run.outputs["1"][2] == [1, 1, 1] and all(mask.eq(1).all() for mask in run.outputs["1"][3])
    assert torch.cat(run.outputs["1"][4]).equal(torch.cat(images[3:])) and run.outputs["1"][5] == captions[3:]
    reasons = run.outputs["1"][6]
    assert sum(r.startswith("another object: ") for r in reasons) == 3
    assert [r.split(":")[0] for r in reasons[3:]] == ["too alike", "too alike", "alone in its set"]
    report = run.value("1", 9)
    assert report.startswith(
        "3 of 9 pictures kept, 1 of 4 sets; dropped: 3 another object, 2 too alike, 1 alone in its set; scores in "
    )
    assert run.ui["1"]["text"] == [report] or run.ui["1"]["text"][0] == report
    assert len(run.ui["7"]["images"]) == 6


def test_every_score_is_written_down_and_is_the_cosine(graph, folders, filtered, collection):
    run = graph(filtered(most=0.999, clip=POCKET))
    told, images = scores(folders, run), collection[0]
    see = seen(run, "2", *images)
    want = torch.nn.functional.cosine_similarity(see[:3, None], see[None, :3], dim=-1)
    assert torch.allclose(torch.tensor(told["sets"][0]["cosines"], dtype=torch.float64), want, atol=1e-5)
    fidelity = node("CounterpointPromptFidelity", features=["8", 0], images=["3", 0], captions=["4", 0])
    alone = graph({**filtered(clip=POCKET), "9": fidelity}).outputs["9"][0]
    assert [p["fidelity"] for each in told["sets"] for p in each["pictures"]] == pytest.approx(alone, abs=1e-4)
    assert [p["kept"] for p in told["sets"][1]["pictures"]] == [False] * 3
    assert (
        told["bounds"] == {"least": 0.7, "most": 0.999, "fidelity": 0}
        and told["features"]["identity"]["name"] == "Pocket's instance probe"
    )


def test_the_sheet_shows_in_colours_what_became_of_each(graph, filtered, pack):
    run = graph(filtered(most=0.999))
    sheet = (run.value("1", 8)[0] * 255).round().int().flatten(0, 1)
    colours, frame = pack.nodes.filter_set, 128**2 - 116**2
    want = {colours.KEPT[1]: 3, colours.COLOURS["another object"][1]: 3, colours.COLOURS["too alike"][1]: 2}
    for colour, count in want.items():
        found = int((sheet == torch.tensor(colour, dtype=torch.int32)).all(1).sum())
        assert found == pytest.approx(count * frame, rel=0.02), colour
    assert run.value("1", 7).shape[1:] == (200, 560, 3)


def test_masks_cut_the_object_out_before_it_is_compared(graph, folders, filtered, collection, pack):
    run = graph(filtered(masks=True, identity=POCKET, least=-1.0, most=1.0))
    images, _, masks, _ = collection
    cut = [pack.training.similarity.cut_out(i, m) for i, m in zip(images[:2], masks[:2], strict=True)]
    a, b = seen(run, "2", *cut)
    got = scores(folders, run)["sets"][0]["cosines"][0][1]
    assert got == pytest.approx(torch.nn.functional.cosine_similarity(a, b, 0).item(), abs=1e-5)
    assert run.outputs["1"][3][0].equal(masks[0])
    whole = graph(filtered(identity=POCKET, least=-1.0, most=1.0))
    assert scores(folders, whole)["sets"][0]["cosines"][0][1] != pytest.approx(got, abs=1e-4)


def test_white_masks_compare_whole_pictures_and_empty_ones_nothing(graph, folders, filtered, collection):
    images, captions, _, sets = collection
    masks = [torch.ones(1, 128, 128)] * 9
    masks[1] = torch.zeros(1, 128, 128)
    run = graph(filtered((images, captions, masks, sets), masks=True, most=0.999))
    plain = scores(folders, graph(filtered(most=0.999, least=-1.0)))["sets"][0]["cosines"]
    cosines = scores(folders, run)["sets"][0]["cosines"]
    assert cosines[0][2] == pytest.approx(plain[0][2], abs=1e-5) and cosines[1] == [None] * 3
    assert len(kept(run)) == 2 and run.outputs["1"][6][0].startswith("an empty mask")


def test_with_nothing_dropped_what_wants_it_does_not_run(graph, filtered, collection):
    some = tuple(column[:3] for column in collection)
    run = graph(filtered(some))
    assert len(kept(run)) == 3 and "7" not in run.ui
    assert "3 of 3 pictures kept, 1 of 1 sets; scores" in run.value("1", 9)


def test_prompts_that_were_not_followed(graph, filtered, collection):
    images, captions, masks, sets = collection
    wrong = [*captions[:2], captions[5], *captions[3:]]
    run = graph(filtered((images, wrong, masks, sets), clip=POCKET, fidelity=30.0))
    assert len(kept(run)) == 2 and run.outputs["1"][6][0].startswith("off its prompt: ")


# The aesthetic head


def head(folders, name: str, width: int = 128, **more) -> torch.Tensor:
    weight = torch.randn(1, width, generator=torch.Generator().manual_seed(3))
    folder = folders / "models" / "aesthetics"
    folder.mkdir(parents=True, exist_ok=True)
    state = {"weight": weight, "bias": torch.tensor([6.0]), **more}
    save_file(state, folder / name) if name.endswith(".safetensors") else torch.save(state, folder / name)
    return weight[0].double()


@pytest.mark.parametrize("name", ["head.safetensors", "head.pth"])
def test_an_aesthetic_head_scores_unit_features(graph, folders, filtered, collection, name):
    weight = head(folders, name)
    run = graph(filtered(clip=POCKET, aesthetic_head=name, aesthetic=5.0, least=-1.0, most=1.0))
    want = (torch.nn.functional.normalize(seen(run, "8", *collection[0]), dim=1) @ weight + 6).tolist()
    told = [p for each in scores(folders, run)["sets"] for p in each["pictures"]]
    assert [p["aesthetic"] for p in told] == pytest.approx(want, abs=1e-4)
    assert [any(r.startswith("not pretty") for r in p["reasons"]) for p in told] == [value < 5 for value in want]
    assert run.value("1", 7).shape[1] == 600, "three histograms"


class Sly:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def test_aesthetic_files_that_do_not_fit(graph, folders, filtered, capsys):
    head(folders, "narrow.safetensors", width=64)
    head(folders, "deep.pth", layer=torch.zeros(1))
    torch.save({"weight": Sly()}, folders / "models" / "aesthetics" / "sly.pth")
    capsys.readouterr()
    for name, words in {
        "narrow.safetensors": ("64 numbers", "these have 128", "Load Features"),
        "deep.pth": ("deep.pth", "no linear aesthetic head"),
        "sly.pth": ("sly.pth in models/aesthetics cannot be read", "code"),
    }.items():
        one_sentence(graph(filtered(clip=POCKET, aesthetic_head=name), check=False), *words)
    assert "unpickled" not in capsys.readouterr().out
    assert "not in list" in graph(filtered(clip=POCKET, aesthetic_head="../x.pth"), check=False).errors[0]


# Where the scores go, and what is refused


def test_scores_lie_in_the_folder_of_the_set(graph, folders, filtered, given):
    for where in ("output/mine", "input/theirs"):
        (folders / where).mkdir()
    for said, where in (("mine", "output/mine"), ("input/theirs", "input/theirs")):
        run = graph({**filtered(folder=["9", 0]), "9": given("STRING", [said])})
        assert scores(folders, run)["sets"] and (folders / where / "scores.json").is_file()
        assert run.value("1", 9).endswith(f"scores in {where}/scores.json")
    one_sentence(graph({**filtered(folder=["9", 0]), "9": given("STRING", ["../.."])}, check=False), "outside")


def test_nothing_kept_says_which_bound_to_move(graph, folders, filtered, collection):
    one_sentence(
        graph(filtered(least=0.995, most=0.999), check=False),
        "6 of 9",
        "'another object'",
        "lower `least`",
        "output/counterpoint/filters/",
    )
    assert len(list((folders / "output" / "counterpoint" / "filters").glob("*.json"))) == 1


@pytest.mark.parametrize(
    "cut, words",
    [
        ((9, 8, 9, 9), ("8 captions", "9 pictures")),
        ((9, 9, 2, 9), ("2 masks", "9 pictures")),
        ((9, 9, 9, 7), ("7 sets", "9 pictures")),
    ],
)
def test_columns_of_another_length(graph, filtered, collection, cut, words):
    columns = tuple(column[:n] for column, n in zip(collection, cut, strict=True))
    one_sentence(graph(filtered(columns, masks=True), check=False), *words)


def test_sets_of_one_picture(graph, filtered, collection):
    images, captions, masks, _ = collection
    one_sentence(
        graph(filtered((images, captions, masks, list(range(9)))), check=False),
        "Every set has 1 picture",
        "Load Image Sets",
    )


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"identity": None}, ("nothing to judge by", "identity")),
        ({"least": 0.9, "most": 0.8}, ("between 0.9 and 0.8",)),
        ({"fidelity": 20.0}, ("no features for prompts", "clip_features")),
        ({"clip": OBJECTS, "fidelity": 20.0}, ("sees and cannot read",)),
    ],
)
def test_what_cannot_be_judged(graph, filtered, inputs, words):
    one_sentence(graph(filtered(**inputs), check=False), *words)


def test_masks_that_are_all_empty(graph, filtered, collection):
    images, captions, _, sets = collection
    one_sentence(
        graph(filtered((images, captions, [torch.zeros(1, 128, 128)] * 9, sets), masks=True), check=False),
        "All masks are empty",
        "white",
    )


def test_from_painting_to_keeping_on_pocket(graph, folders):
    """Sets are painted with shared attention, filtered, read back from their folder, and filtered to the same scores."""
    paint = {
        "objects": "a red striped cube\na blue spotted ball",
        "scenes": "on a meadow\nin the snow\nat night",
        "template": "{object} {scene}",
    }
    wires = {"images": 0, "captions": 1, "folder": 2, "sets": 3, "masks": 4}
    job = {
        "1": node("CounterpointLoadPocketModels"),
        "2": node("CounterpointSharedAttention", model=["1", 0]),
        "3": node(
            "CounterpointMultiImageSet", model=["2", 0], clip=["1", 1], vae=["1", 2], steps=4, name="pocket", **paint
        ),
        "4": node("CounterpointLoadFeatures", extractor=OBJECTS),
        "5": node("CounterpointLoadFeatures"),
    }
    judge = {"identity": ["4", 0], "clip_features": ["5", 0], "least": -1.0, "most": 0.98, "fidelity": 5.0}
    job["6"] = node("CounterpointFilterSet", **judge, **{k: ["3", slot] for k, slot in wires.items()})
    run = graph(job)
    first = json.loads((folders / "output" / "pocket" / "scores.json").read_text())
    assert [each["set"] for each in first["sets"]] == [1, 2] and len(run.outputs["6"][0]) == 6
    assert run.value("6", 9).endswith("scores in output/pocket/scores.json")
    shares = [mask.mean().item() for mask in run.outputs["3"][4]]
    assert min(shares) < 0.7 and sum(s < 1 for s in shares) == len(
        list((folders / "output" / "pocket").glob("*.mask.png"))
    )
    (folders / "output" / "pocket" / "scores.json").unlink()
    again = {**job, "3": node("CounterpointLoadImageSets", folder="output/pocket")}
    again["6"]["inputs"]["least"] = 0.99  # nothing is kept, and the scores are there all the same
    again["6"]["inputs"]["most"] = 1.0
    one_sentence(graph(again, check=False), "No picture is kept", "output/pocket/scores.json")
    second = json.loads((folders / "output" / "pocket" / "scores.json").read_text())
    for a, b in zip(first["sets"], second["sets"], strict=True):
        assert torch.allclose(torch.tensor(a["cosines"]), torch.tensor(b["cosines"]), atol=1e-4)


def test_without_set_numbers_all_pictures_are_one_set(graph, filtered, collection):
    images, captions, masks, _ = (part[:3] for part in collection)
    prompt = filtered(of=(images, captions, masks, [1, 1, 1]))
    numbered = kept(graph(prompt))
    del prompt["1"]["inputs"]["sets"]
    assert len(numbered) == 3 and [p.equal(q) for p, q in zip(kept(graph(prompt)), numbered, strict=True)] == [True] * 3
