"""The file that carries a learned word: what is in it, what it may be called, and that nothing is ever overwritten."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

WORD = {"clip_l": torch.arange(24, dtype=torch.float32).view(3, 8)}
TWO = {"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 20)}


@pytest.fixture
def word(pack):
    """A function that makes an EMBEDDING."""

    def word(vectors=WORD, name="anything", **facts):
        return pack.training.embedding.Embedding({k: v.clone() for k, v in vectors.items()}, name, facts)

    return word


@pytest.fixture
def save(pack):
    return pack.nodes.embedding.save


@pytest.fixture
def root(folders, monkeypatch):
    """models/embeddings, and a second embeddings folder beside it: `root.parent / "more"`."""
    import folder_paths

    for name in ("embeddings", "more"):
        (folders / "models" / name).mkdir(parents=True)
    paths = [str(folders / "models" / name) for name in ("embeddings", "more")]
    moved = {**folder_paths.folder_names_and_paths, "embeddings": (paths, {".safetensors", ".pt", ".bin"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", moved)
    return folders / "models" / "embeddings"


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("vectors", [WORD, TWO, {"t5xxl": torch.zeros(1, 4).half()}], ids=lambda v: "+".join(v))
def test_the_file_holds_comfyuis_keys_and_nothing_else(pack, word, tmp_path, vectors):
    (tmp_path / "x.safetensors").write_bytes(pack.training.embedding.to_bytes(word(vectors, steps=5, method="paper")))
    with safe_open(tmp_path / "x.safetensors", "pt") as f:
        tensors, facts = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    assert tensors.keys() == vectors.keys()
    assert all(t.dtype == torch.float32 and t.equal(vectors[k].float()) for k, t in tensors.items())
    assert (
        facts["modelspec.trigger_phrase"] == "anything"
        and facts["method"] == "paper"
        and json.loads(facts["steps"]) == 5
    )


def test_a_file_comes_back_as_it_was(pack, word, tmp_path):
    facts = {"method": "reference point", "strength": 0.5, "steps": 200, "seed": 0, "start": "picture"}
    (tmp_path / "style.safetensors").write_bytes(pack.training.embedding.to_bytes(word(TWO, "style", **facts)))
    back = pack.training.embedding.load(tmp_path / "style.safetensors")
    assert back.name == "style" and back.facts == facts and back.count == 2
    assert back.vectors.keys() == TWO.keys() and all(back.vectors[k].equal(v) for k, v in TWO.items())


@pytest.mark.parametrize("vectors", [{"emb_params": torch.ones(2, 8)}, {"emb_params": torch.ones(8)}, {"<x>": torch.ones(8)}, {"clip_l": torch.ones(8)}],
                         ids=["emb_params", "one vector", "diffusers", "one dimension"])  # fmt: skip
def test_files_of_other_programs_load(pack, tmp_path, vectors):
    save_file(vectors, tmp_path / "theirs.safetensors")
    theirs = pack.training.embedding.load(tmp_path / "theirs.safetensors")
    (values,) = theirs.vectors.values()
    assert values.ndim == 2 and values.shape[1] == 8 and values.dtype == torch.float32 and theirs.count == len(values)


OLDER = {  # as these programs write them
    "A1111.pt": {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.nn.Parameter(torch.ones(2, 8))},
        "name": "x",
        "step": 9,
    },
    "diffusers.bin": {"<my-style>": torch.ones(8)},
    "kohya.pt": {"emb_params": torch.ones(2, 8)},
    "misspelt.bin": {"emp_params": torch.ones(2, 8)},
}


@pytest.mark.parametrize("name", OLDER)
def test_older_formats_load_without_unpickling_code(pack, tmp_path, name):
    torch.save(OLDER[name], tmp_path / name)
    loaded = pack.training.embedding.load(tmp_path / name)
    ((vectors),) = loaded.vectors.values()
    assert vectors.shape[-1] == 8 and vectors.ndim == 2 and not vectors.requires_grad and (vectors == 1).all()


def test_onetrainers_names_become_comfyuis(pack, tmp_path):
    save_file(
        {"clip_l": torch.ones(2, 8), "t5": torch.zeros(2, 16), "clip_l_out": torch.ones(2, 8)},
        tmp_path / "flux.safetensors",
    )
    vectors = pack.training.embedding.load(tmp_path / "flux.safetensors").vectors
    assert {k: v.shape for k, v in vectors.items()} == {"clip_l": (2, 8), "t5xxl": (2, 16)}


@pytest.mark.parametrize("width, key", [(768, "clip_l"), (1024, "clip_h"), (1280, "clip_g"), (8, None)])
@pytest.mark.parametrize("theirs", ["*", "emb_params", "emp_params", "<my-style>"])
def test_what_names_no_encoder_is_saved_under_comfyuis_key(pack, save, root, tmp_path, theirs, width, key):
    """By its width, where that says it; exactly one tensor, whatever else is known is in the header."""
    state = (
        {"string_to_param": {"*": torch.ones(2, width)}, "step": 9} if theirs == "*" else {theirs: torch.ones(2, width)}
    )
    torch.save(state, tmp_path / "theirs.pt")
    with safe_open(save(pack.training.embedding.load(tmp_path / "theirs.pt"), "ours"), "pt") as f:
        assert list(f.keys()) == [key or theirs] and f.get_tensor(key or theirs).equal(torch.ones(2, width))
        assert f.metadata()["modelspec.title"] == "ours"


@pytest.fixture
def pair(root):
    """Writes diffusers' two files for SDXL; gives a function that loads them by the node."""

    def write(first=(2, 768), second=(2, 1280), keys=("<s>", "<s>")):
        for name, key, shape, value in zip(("one", "two"), keys, (first, second), (1.0, 2.0), strict=True):
            save_file({key: torch.full(shape, value)}, root / f"{name}.safetensors")

    return write


@pytest.mark.parametrize("keys", [("<s>", "<s>"), ("clip_l", "clip_g"), ("clip_l", "<s>")], ids="+".join)
@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")], ids="+".join)
def test_diffusers_two_files_become_one_word(pack, pair, save, root, keys, order):
    pair(keys=keys)
    first, second = (f"{name}.safetensors" for name in order)
    joined = pack.nodes.embedding.LoadEmbedding.execute(first, second).args[0]
    with safe_open(save(joined, "whole"), "pt") as f:
        assert sorted(f.keys()) == ["clip_g", "clip_l"]
        assert (f.get_tensor("clip_l") == 1).all() and f.get_tensor("clip_l").shape == (2, 768)
        assert (f.get_tensor("clip_g") == 2).all() and f.get_tensor("clip_g").shape == (2, 1280)


@pytest.mark.parametrize("given, words", [
    ({"second": (3, 1280)}, "'one' has 2 vectors and 'two' has 3: .* equally many"),
    ({"second": (2, 768)}, "'one' and 'two' are both for clip_l: choose a second file"),
    ({"second": (2, 640)}, "'two' does not say which text encoder its vectors of 640 numbers are for"),
    ({"first": (2, 32)}, "'one' does not say which text encoder its vectors of 32 numbers are for"),
])  # fmt: skip
def test_files_that_are_no_pair_are_refused_in_one_sentence(pack, pair, given, words):
    pair(**given)
    with pytest.raises(ValueError, match=words) as error:
        pack.nodes.embedding.LoadEmbedding.execute("one.safetensors", "two.safetensors")
    assert "\n" not in str(error.value) and str(error.value).count(". ") == 0


def test_a_second_file_that_changes_is_loaded_again(pack, pair, root):
    pair()
    load, files = pack.nodes.embedding.LoadEmbedding, ("one.safetensors", "two.safetensors")
    before, alone = load.fingerprint_inputs(*files), load.fingerprint_inputs(files[0])
    save_file({"<s>": torch.zeros(4, 1280)}, root / "two.safetensors")
    assert load.fingerprint_inputs(*files) != before and load.fingerprint_inputs(files[0]) == alone


def test_code_in_an_embedding_is_not_run(pack, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "hacked"), "w"))

    torch.save({"string_to_param": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt cannot be read: .* more than tensors"):
        pack.training.embedding.load(tmp_path / "evil.pt")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("tensors", [{"unet.weight": torch.ones(2, 3, 3)}, {}], ids=["a weight", "nothing"])
def test_what_is_not_an_embedding_is_refused_by_name(pack, tmp_path, tensors):
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="lora.safetensors is not an embedding"):
        pack.training.embedding.load(tmp_path / "lora.safetensors")


def test_a_broken_file_is_refused_by_name(pack, tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{}")
    with pytest.raises(Exception, match="torn"):
        pack.training.embedding.load(tmp_path / "torn.safetensors")


GOOD = ["style", "my-style", "My_Style.v2", "0", "a.b-c_d"]
BAD = ["", " ", "my style", "a,b", "<style>", "a[1]", "../style", "sub/style", "sub\\style", "/etc/x", "C:style", "..", ".style", "-x",
       "style\n", "a\tb", "été", "a:1.3", "(a)", "a\0b"]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_names(pack, name):
    assert pack.training.embedding.check_name(name) == name


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_refused_with_a_better_one(pack, word, save, root, name):
    with pytest.raises(pack.training.embedding.BadName) as refused:
        save(word(), name)
    *_, better = str(refused.value).rstrip(".").rpartition(" ")
    assert pack.training.embedding.check_name(better.strip("'")) and repr(name) in str(refused.value)
    assert names(root) == [] and names(root.parent) == ["embeddings", "more"]


def test_the_same_word_twice_is_one_file(word, save, root):
    many = {f"fact {i}": i for i in range(8)}
    first = save(word(**many), "style")
    again = [save(word(**many), "style") for _ in range(5)]
    assert set(again) == {first} and names(root) == ["style.safetensors"]


def test_another_word_gets_a_number_and_nothing_is_overwritten(pack, word, save, root):
    save(word(), "style")
    before = (root / "style.safetensors").read_bytes()
    assert [save(word(TWO), "style").name, save(word(seed=3), "style").name] == [
        "style-2.safetensors",
        "style-3.safetensors",
    ]
    assert save(word(TWO), "style").name == "style-2.safetensors", "it is there already"
    assert (root / "style.safetensors").read_bytes() == before
    facts = pack.training.artefact.read(root / "style-2.safetensors")[1]
    assert facts["modelspec.trigger_phrase"] == "style-2", "the file says the name it really has"


@pytest.mark.parametrize(
    "where", ["more/style.safetensors", "more/style.pt", "embeddings/sub/style.safetensors", "more/sub/style.bin"]
)
def test_a_name_that_exists_under_another_root_is_refused(word, save, root, where):
    """ComfyUI would pick one of the two."""
    other = root.parent / where
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(b"theirs")
    with pytest.raises(ValueError, match="'style' exists in .*choose another name"):
        save(word(), "style")
    assert not (root / "style.safetensors").exists() and other.read_bytes() == b"theirs"


def test_a_number_that_exists_under_another_root_is_not_taken(word, save, root):
    (root.parent / "more" / "style-2.safetensors").write_bytes(b"theirs")
    save(word(), "style")
    try:
        assert save(word(TWO), "style").name == "style-3.safetensors"
    except ValueError as refused:
        assert "style-2" in str(refused)


@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_a_file_of_another_format_is_not_put_in_the_shade(word, save, root, ending):
    """ComfyUI prefers .safetensors: prompts that say embedding:style would silently mean our word from now on."""
    (root / f"style{ending}").write_bytes(b"theirs")
    try:
        assert save(word(), "style").stem != "style"
    except ValueError as refused:
        assert "'style'" in str(refused)


def test_the_preview_lies_beside_the_file(word, save, root):
    from PIL import Image

    save(word(), "style.v2", torch.full((2, 4, 6, 3), 0.5))
    assert names(root) == ["style.v2.png", "style.v2.safetensors"]
    assert Image.open(root / "style.v2.png").size == (6, 4)


def test_the_preview_of_another_word_is_not_overwritten(word, save, root):
    save(word(), "style", torch.zeros(1, 2, 2, 3))
    black = (root / "style.png").read_bytes()
    save(word(TWO), "style", torch.ones(1, 2, 2, 3))
    assert (root / "style.png").read_bytes() == black and (root / "style-2.png").exists()


def test_saving_into_a_folder_that_is_not_there_yet(word, save, root):
    root.rmdir()
    assert save(word(), "style", torch.zeros(1, 2, 2, 3)).is_file()
