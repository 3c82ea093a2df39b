"""Bad input to the nodes of a prior: one clear sentence each, before anything long begins."""

from importlib import import_module

import comfy.clip_vision
import comfy.ldm.flux.redux
import comfy.model_management
import comfy.sd
import folder_paths
import nodes
import pytest
import torch
from PIL import Image

from harness.priors import captions, made, pictures, sampling, small_prior, small_vision, training
from harness.small_nets import numbers
from harness.training import node, one_sentence


@pytest.fixture
def learn(small_models, given):
    """`learn(shown, said, **inputs)`: training on these pictures and captions."""

    def learn(shown=None, said=None, **inputs):
        seen = given("CLIP_VISION", [small_vision(small_models.builders)])
        shown = given("IMAGE", pictures() if shown is None else shown)
        return training(seen, shown, given("STRING", captions() if said is None else said), **inputs)

    return learn


@pytest.fixture
def ask(pack, graph, given):
    """`ask(prior, more nodes, **inputs)`: what became of sampling a small prior."""

    def ask(prior=None, more=None, check=False, **inputs):
        whole = {"1": node("SmallModelsLoadFamily", family="SD1.5"), "6": given("PRIOR", [prior or small_prior(pack)])}
        return graph({**whole, **sampling(**inputs), **(more or {})}, check=check)

    return ask


def core_embedding(dim: int, **facts):
    made = comfy.clip_vision.Output()
    made.image_embeds = numbers(1, dim)
    for name, value in facts.items():
        setattr(made, name, value)
    return made


# Training


def test_pictures_without_captions(graph, learn):
    none = learn()
    del none["5"]["inputs"]["captions"]
    one_sentence(graph(none, check=False), "0 captions for 48 pictures", "give 1 each")
    one_sentence(graph(learn(said=captions(47)), check=False), "47 captions for 48 pictures")
    one_sentence(
        graph(learn(said=[" "] * 48), check=False), "None of the 48 pictures has a caption", "use Caption Images"
    )
    one_sentence(graph(learn(shown=[]), check=False), "There are no pictures", "choose a folder")


def test_a_folder_without_captions(graph, learn, folders):
    (folders / "input" / "set").mkdir()
    Image.new("RGB", (32, 32)).save(folders / "input" / "set" / "a.png")
    whole = learn()
    whole["5"]["inputs"] |= {"images_folder": "input/set"}
    one_sentence(graph(whole, check=False), "None of the 1 pictures has a caption", ".txt files")
    (folders / "input" / "set" / "a.txt").write_text("a cat")
    (folders / "input" / "set" / "a.png").write_bytes(b"broken")
    one_sentence(graph(whole, check=False), "None of the pictures could be read")


def test_some_captions_may_be_empty(graph, learn):
    some = learn(said=["", " ", *captions(46)])
    run = graph({**some, "v": node("PreviewAny", source=["5", 1])})
    assert run.value("5", 1).endswith("2 captions are empty.") and len(run.value("5")) == 48


def test_fewer_pairs_than_a_batch(graph, learn):
    one_sentence(
        graph(learn(batch=64), check=False),
        "44 pairs to learn from and a step takes 64",
        "choose a batch of at most 44",
    )


def test_pictures_that_are_all_the_same(graph, learn):
    same = [torch.full((1, 32, 32, 3), 0.5)] * 48
    one_sentence(graph(learn(shown=same), check=False), "are the same, so there is nothing to learn")


def test_a_text_encoder_without_its_projection(graph, learn, given, small_models):
    with torch.inference_mode():
        clip = small_models.families.FAMILIES["SD1.5"].clip()
        clip.cond_stage_model.clip_l.transformer.text_projection.weight.zero_()
    whole = learn()
    whole["c"] = given("CLIP", [clip])
    whole["5"]["inputs"]["clip"] = ["c", 0]
    one_sentence(
        graph(whole, check=False), "text encoder clip_l of this CLIP came without its text_projection", "with Load CLIP"
    )


def test_the_papers_rule_needs_one_clip(graph, learn):
    one_sentence(
        graph(learn(preset="paper"), check=False),
        "Text embeddings of 32 numbers have no cosine with image embeddings of 24",
    )


def test_more_clusters_than_captions(graph, learn):
    fit = {
        "f": node("CounterpointFitStartDistribution", pairs=["5", 0], kind="clusters", clusters=100),
        "v": node("PreviewAny", source=["f", 1]),
    }
    one_sentence(graph({**learn(), **fit}, check=False), "different texts for 100 clusters", "or more pairs")


def test_a_start_of_other_pairs(pack, graph, learn, given):
    starts = import_module(f"{pack.__name__}.training.prior.starts")
    start = starts.fit("whitened", numbers(9, 32), numbers(9, 20))
    whole = {**learn(start=["9", 0]), "9": given("START_DISTRIBUTION", [start])}
    one_sentence(
        graph(whole, check=False), "embeddings of 20 numbers and these pairs have 24", "fit it to the same pairs"
    )


def test_a_batch_that_does_not_fit(pack, graph, learn, monkeypatch):
    """Memory of a GPU cannot run out here, so the trainer says what torch would."""

    def full(*_):
        raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory")

    trainer = import_module(f"{pack.__name__}.training.prior.trainer")
    monkeypatch.setattr(trainer.PriorTrainer, "loss", full)
    one_sentence(
        graph(learn(), check=False),
        "A step of 8 captions",
        "does not fit into memory: choose a batch of 4, or a smaller network",
    )


def test_a_run_outside_of_the_output_folder(graph, learn):
    one_sentence(graph(learn(run="../out"), check=False), "would leave ComfyUI's output folder")


# Sampling


@pytest.mark.parametrize(("family", "words"), [
    ("SDXL", ("24 numbers (small CLIP)", "(SmallSDXL) takes 1280: use the prior of Kandinsky 2.2")),
    ("SD1.5", ("(SmallSD15) takes no image embedding: use SD 2.1 unCLIP, SDXL (ReVision) or Stable Cascade's stage C",)),
    ("FLUX.1", ("takes no image embedding", "Apply Image Tokens")),
])  # fmt: skip
def test_a_model_that_does_not_take_it(ask, family, words):
    """Said before anything is encoded or made."""
    run = ask(more={"m": node("SmallModelsLoadFamily", family=family)}, model=["m", 0])
    one_sentence(run, *words)


def test_a_consumer_that_wants_patches(ask, given):
    redux = comfy.sd.StyleModel(comfy.ldm.flux.redux.ReduxImageEncoder(8, 8))
    more = {
        "r": given("STYLE_MODEL", [redux]),
        "u": node("StyleModelApply", conditioning=["t", 0], style_model=["r", 0], clip_vision_output=["s", 0], strength=1.0,
                  strength_type="multiply"),
    }  # fmt: skip
    one_sentence(
        ask(more=more), "one vector of 24 numbers and has no patches", "Redux, Wan and Hunyuan3D need a real picture"
    )


def test_an_empty_prompt_is_allowed_and_said(ask):
    run = ask(prompt=" \n", check=True)
    assert "The prompt is empty, so these are of any picture." in run.value("s", 2) and made(run).isfinite().all()
    assert "empty" not in ask(check=True).value("s", 2)
    assert "more than 77 tokens" in ask(check=True, prompt="word " * 90).value("s", 2)


def test_a_prior_of_another_text_encoder(pack, ask):
    one_sentence(
        ask(small_prior(pack, text="ffffffffffff")), "trained with another text encoder", "small CLIP", "without a LoRA"
    )
    one_sentence(ask(small_prior(pack, text="ffffffffffff", space="")), "seen by one it does not name")
    wide = small_prior(pack)
    wide.network = import_module(f"{pack.__name__}.training.prior.network").empty(
        import_module(f"{pack.__name__}.training.prior.network").Shape(24, 1280, 1280, 32, 2, 2, 77)
    )
    one_sentence(
        ask(wide), "reads texts of 1280 numbers, and this CLIP gives 32 (clip_l)", "load the CLIP of an SDXL checkpoint"
    )


def test_the_right_text_encoder_in_another_dress(pack, graph, learn, given):
    """Trained for real: clip skip and a second loader are the same encoder, a LoRA on it is not."""
    prior = graph(learn()).value("6")
    base = {"1": node("SmallModelsLoadFamily", family="SD1.5"), "6": given("PRIOR", [prior]),
            "k": node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-2)}  # fmt: skip
    plain, skipping = (made(graph({**base, **sampling(clip=clip)})) for clip in (["1", 1], ["k", 0]))
    assert torch.equal(plain, skipping)
    clip = graph({**base, "v": node("PreviewAny", source=["1", 1])}).value("1", 1).clone()
    name = "clip_l.transformer.text_model.final_layer_norm.bias"
    with torch.inference_mode():
        clip.add_patches({name: ("diff", (torch.full((32,), 0.25),))})
    run = graph({**base, "k": given("CLIP", [clip]), **sampling(clip=["k", 0])}, check=False)
    one_sentence(
        run, "trained with another text encoder (its pictures were seen by CLIP vision, 32 pixels, 24 numbers)"
    )


@pytest.mark.parametrize(("picture", "words"), [
    (lambda: core_embedding(32), ("has 32 numbers and 24 are needed",)),
    (lambda: core_embedding(24, image="ffff", space="ViT-L"), ("seen by another CLIP (ViT-L)", "(small CLIP)")),
    (lambda: core_embedding(24, image_embeds=numbers(1, 9, 24)), ("without one pooled vector (SigLIP, DINO): use a CLIP",)),
    (lambda: core_embedding(24, image_embeds=numbers(3, 24)), ("is a batch of 3: give 1 picture",)),
])  # fmt: skip
def test_a_picture_that_cannot_be_varied(ask, given, picture, words):
    one_sentence(ask(more={"p": given("CLIP_VISION_OUTPUT", [picture()])}, image=["p", 0]), *words)


def test_the_best_in_two_spaces(ask):
    one_sentence(ask(best_of=2), "the text has 32 numbers and the embedding 24", "set best_of to 1")


def test_embeddings_of_two_spaces_are_not_mixed(graph, given):
    def mixed(**facts):
        one = given("CLIP_VISION_OUTPUT", [core_embedding(24, image="aaaa", space="ViT-L")])
        other = given("CLIP_VISION_OUTPUT", [core_embedding(**facts)])
        mix = node("CounterpointMixImageEmbeddings", a=["a", 0], b=["b", 0])
        return graph({"a": one, "b": other, "m": mix, "v": node("PreviewAny", source=["m", 0])}, check=False)

    one_sentence(
        mixed(dim=24, image="bbbb", space="ViT-H"),
        "lie in different spaces (ViT-L and ViT-H)",
        "make both with one CLIP",
    )
    one_sentence(mixed(dim=32), "b has 32 numbers and 24 are needed")
    assert not mixed(dim=24).errors


# Files


@pytest.fixture
def load(pack, graph, folders):
    """`load(name, **tensors)`: what Load Prior makes of a saved prior with some tensors changed."""
    artefact, prior = pack.training.artefact, import_module(f"{pack.__name__}.training.prior.prior")
    place = folders / "models" / "clip_priors"
    place.mkdir(parents=True)

    def load(**changed):
        (place / "mine.safetensors").write_bytes(prior.to_bytes(small_prior(pack)))
        tensors, header = artefact.read(place / "mine.safetensors")
        tensors = {k: v.clone() for k, v in tensors.items()} | {k.replace("__", "."): v for k, v in changed.items()}
        artefact.write(place / "mine.safetensors", {k: v for k, v in tensors.items() if v is not None}, header)
        whole = {"l": node("CounterpointLoadPrior", prior="mine.safetensors"), "v": node("PreviewAny", source=["l", 1])}
        return graph(whole, check=False)

    return load


def test_statistics_that_are_missing_or_zero(load):
    assert not load().errors
    one_sentence(load(norm__std=None), "mine.safetensors cannot be used", "lacks norm.std")
    one_sentence(
        load(norm__std=torch.zeros(24)), "mine.safetensors cannot be used", "24 of 24 numbers that are not above 0"
    )


def test_files_of_something_else(graph, folders, load):
    def loaded(kind: str, input: str, name: str):
        whole = {"l": node(kind, **{input: name}), "v": node("PreviewAny", source=["l", 0])}
        return graph(whole, check=False)

    load()
    priors, embeddings = folders / "models" / "clip_priors", folders / "models" / "image_embeddings"
    embeddings.mkdir()
    (priors / "bad.safetensors").write_bytes(b"x" * 100)
    (embeddings / "bad.safetensors").write_bytes(b"x" * 100)
    (embeddings / "prior.safetensors").write_bytes((priors / "mine.safetensors").read_bytes())
    one_sentence(
        loaded("CounterpointLoadPrior", "prior", "bad.safetensors"), "bad.safetensors cannot be read: it is broken"
    )
    one_sentence(
        loaded("CounterpointLoadImageEmbedding", "embedding", "bad.safetensors"), "cannot be read: it is broken"
    )
    one_sentence(
        loaded("CounterpointLoadImageEmbedding", "embedding", "prior.safetensors"),
        "is no image embedding: choose another",
    )


@pytest.mark.parametrize(("kind", "input", "what"), [
    ("CounterpointLoadPrior", "prior", "There is no prior yet"),
    ("CounterpointLoadImageEmbedding", "embedding", "There is no image embedding yet"),
])  # fmt: skip
def test_nothing_to_choose(graph, folders, monkeypatch, kind, input, what):
    for folder in ("clip_priors", "image_embeddings"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(folders / "nowhere")], set()))
    (chosen,) = [i.options for i in nodes.NODE_CLASS_MAPPINGS[kind].define_schema().inputs]
    assert len(chosen) == 1
    whole = {"l": node(kind, **{input: chosen[0]}), "v": node("PreviewAny", source=["l", 0])}
    one_sentence(graph(whole, check=False), what, "press R")


@pytest.mark.parametrize("kind", ["CounterpointSavePrior", "CounterpointSaveImageEmbedding"])
def test_a_name_that_leads_elsewhere(pack, graph, given, kind):
    values = {"prior": small_prior(pack)} if kind.endswith("Prior") else {"embedding": core_embedding(24)}
    ((input, value),) = values.items()
    socket = "PRIOR" if input == "prior" else "CLIP_VISION_OUTPUT"
    whole = {"g": given(socket, [value]), "k": node(kind, **{input: ["g", 0], "name": "../out"})}
    one_sentence(graph(whole, check=False), "cannot be used")
