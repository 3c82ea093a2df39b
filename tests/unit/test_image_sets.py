"""Scenes dealt to objects, and lists of sets on disk: ours and SynCD's."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

OBJECTS, SCENES = ["a red ball", "a blue cube", "a pink ring"], [f"scene {i}" for i in range(8)]


@pytest.fixture
def sets(pack):
    return importlib.import_module(f"{pack.__name__}.training.image_sets")


# Dealing


def test_every_object_has_every_group_of_consecutive_scenes(sets):
    got = sets.deal(OBJECTS, SCENES, 3, sets.IN_ORDER, seed=1)
    groups = [(0, 1, 2), (3, 4, 5), (6, 7, 0)]  # the last one is filled up: no scene is left out
    want = [(name, tuple(SCENES[i] for i in group)) for name in OBJECTS for group in groups]
    assert [(each.object, each.scenes) for each in got] == want
    assert [each.object for each in sets.deal(OBJECTS, SCENES, 4, sets.IN_ORDER, 1, most=1)] == OBJECTS


@pytest.mark.parametrize("order", ["in order", "shuffled for each object"])
def test_a_set_does_not_depend_on_the_others(sets, order):
    many, alone = sets.deal(OBJECTS, SCENES, 3, order, 5), sets.deal(OBJECTS[1:2], SCENES, 3, order, 5, most=2)
    assert alone == many[3:5]
    assert many == sets.deal(OBJECTS, SCENES, 3, order, 5)
    other = sets.deal(OBJECTS, SCENES, 3, order, 6)
    assert not {each.seed for each in many} & {each.seed for each in other}
    seeds = [each.seed for each in many]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**48 for s in seeds)


def test_the_same_object_twice_is_two_different_sets(sets):
    first, second = sets.deal(["a cat", "a cat"], SCENES[:3], 3, sets.IN_ORDER, 1)
    assert first.scenes == second.scenes and first.seed != second.seed


def test_shuffled_every_scene_is_used_and_objects_differ(sets):
    got = sets.deal(OBJECTS, SCENES, 4, sets.SHUFFLED, 1)
    for name in OBJECTS:
        assert sorted(s for each in got if each.object == name for s in each.scenes) == SCENES
    assert len({each.scenes for each in got}) == 6


@pytest.mark.parametrize(
    "objects, scenes, per_set, words",
    [
        (OBJECTS, SCENES, 1, ("per_set to 2", "Generate Set")),
        (OBJECTS, SCENES[:2], 3, ("2 scenes", "sets of 3", "lower per_set")),
        ([], SCENES, 3, ("no objects",)),
    ],
)
def test_too_little_to_deal_is_refused(sets, objects, scenes, per_set, words):
    with pytest.raises(ValueError) as refused:
        sets.deal(objects, scenes, per_set, sets.IN_ORDER, 1)
    assert all(word in str(refused.value) for word in words)


def test_templates_name_object_and_scene(sets):
    (each,) = sets.deal(["a {scene} cat"], ["on sand", "at sea"], 2, sets.IN_ORDER, 1)
    assert each.prompts("{scene}. {object}. wide angle shot")[1] == "at sea. a {scene} cat. wide angle shot"
    assert sets.template_fault("{object}, {scene}") == ""
    assert "needs {object}," in sets.template_fault("{scene}") and "{object} and {scene}" in sets.template_fault("")


# Lists on disk


def paint(file: Path, value: int = 200, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(file)
    return file


def record(*names: str) -> dict:
    return {
        "filenames": list(names),
        "prompts": [f"scene of {n}" for n in names],
        "objaverse_id": "",
        "category": "deformable",
    }


def names(members) -> list[tuple[int, str, str]]:
    return [(m.set, m.entry.name, m.caption) for m in members]


def test_syncds_metadata_is_read_set_by_set(sets, tmp_path):
    for n in range(6):
        paint(tmp_path / f"d{n}.jpg")
    (tmp_path / "metadata_0.json").write_text(json.dumps([record("d0.jpg", "d1.jpg", "d2.jpg")]))
    (tmp_path / "b_metadata.json").write_text(json.dumps([record("/data/somewhere/d3.jpg", "out/d4.jpg", "d5.jpg")]))
    (tmp_path / "metadata_with_scores.json").write_text(
        json.dumps([{**record("d0.jpg", "d1.jpg", "d2.jpg"), "dino_scores": []}])
    )
    members, count, skipped = sets.listed(tmp_path, [tmp_path])
    assert count == 2 and not skipped and [m.set for m in members] == [1, 1, 1, 2, 2, 2]
    assert [m.entry.picture.name for m in members] == ["d3.jpg", "d4.jpg", "d5.jpg", "d0.jpg", "d1.jpg", "d2.jpg"]
    assert [m.caption for m in members[3:]] == ["scene of d0.jpg", "scene of d1.jpg", "scene of d2.jpg"]
    assert names(sets.listed(tmp_path, [tmp_path], first=2, limit=1)[0]) == names(members[3:])
    assert sets.listed(tmp_path, [tmp_path], first=3) == ([], 2, [])


def test_a_file_that_is_missing_is_left_out_by_name(sets, tmp_path):
    paint(tmp_path / "a.jpg")
    (tmp_path / "metadata.json").write_text(json.dumps([record("a.jpg", "gone.jpg")]))
    members, _, skipped = sets.listed(tmp_path, [tmp_path])
    assert [m.entry.name for m in members] == ["a.jpg"]
    assert skipped == ["gone.jpg: set 1 names it, and it is not in the folder"]


@pytest.mark.parametrize("name", ["../secret.jpg", "{outside}/secret.jpg", "sub/../../secret.jpg", "link.jpg"])
def test_names_do_not_lead_out_of_the_folder(sets, tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    paint(tmp_path / "secret.jpg")
    (inside / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (inside / "metadata.json").write_text(json.dumps([record(name.format(outside=tmp_path))]))
    members, _, skipped = sets.listed(inside, [inside])
    assert not members and len(skipped) == 1


def test_a_jpeg_mask_is_cut_at_half(sets, pack, tmp_path):
    """A JPEG's black is not quite black: with everything above 0 the mask would grow."""
    square = np.zeros((64, 64), dtype=np.uint8)
    square[20:45, 15:40] = 255
    (tmp_path / "masks").mkdir()
    paint(tmp_path / "a.jpg", size=(256, 256))
    Image.fromarray(square).save(tmp_path / "masks" / "a.jpg", quality=75)
    (tmp_path / "metadata.json").write_text(json.dumps([record("a.jpg")]))
    ((member,), _, _) = sets.listed(tmp_path, [tmp_path])
    example = member.load(pack.training.folder.How())
    share, loose = example.mask.mean().item(), (np.asarray(Image.open(tmp_path / "masks" / "a.jpg")) > 0).mean()
    assert example.mask.shape == (1, 256, 256) and example.masked and not example.notes
    assert set(example.mask.unique().tolist()) == {0.0, 1.0}
    assert share == pytest.approx(square.mean() / 255, rel=0.03) and loose > 1.1 * share


def test_our_manifest_says_what_belongs_together(sets, pack, tmp_path):
    for name in ("00000.png", "00001.png", "00002.png", "00003.png"):
        paint(tmp_path / name)
    paint(tmp_path / "00001.mask.png", 128, mode="L")
    pictures = [
        {"file": f"0000{i}.png", "prompt": f"p{i}", "set": 1 + i // 2, "object": "o", "scene": "s"} for i in range(4)
    ]
    (tmp_path / "manifest.json").write_text(json.dumps({"pictures": pictures}))
    (tmp_path / "metadata.json").write_text(json.dumps([record("00000.png", "00001.png")]))
    members, count, _ = sets.listed(tmp_path, [tmp_path])
    assert count == 2 and names(members) == [(1 + i // 2, f"0000{i}.png", f"p{i}") for i in range(4)]
    masks = [m.load(pack.training.folder.How()).mask for m in members[:2]]
    assert masks[0].eq(1).all() and torch.allclose(masks[1], torch.tensor(128 / 255))


@pytest.mark.parametrize(
    "text, word",
    [("{", "cannot be read"), ("[]", "no list of sets"), ("[1]", "no list of sets"), ('{"pictures": [{"file": "a.png", "prompt": "p"}]}', "no list"),
     ('[{"filenames": ["a"], "prompts": []}]', "as many prompts"), ('[{"filenames": "a", "prompts": "b"}]', "no list"), (None, "Load Dataset")],
)  # fmt: skip
def test_a_list_that_is_none_is_refused(sets, pack, tmp_path, text, word):
    if text is not None:
        (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(pack.training.folder.FolderError, match=word) as refused:
        sets.listed(tmp_path, [tmp_path])
    assert "\n" not in str(refused.value)


def test_our_metadata_is_in_syncds_layout(sets):
    (each,) = sets.deal(["a cat"], ["on sand", "at sea"], 2, sets.IN_ORDER, 1)
    assert sets.metadata([each], [["00000.png", "00001.png"]]) == [
        {
            "filenames": ["00000.png", "00001.png"],
            "prompts": ["on sand", "at sea"],
            "objaverse_id": "",
            "category": "deformable",
        }
    ]
