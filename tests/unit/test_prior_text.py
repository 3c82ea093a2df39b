"""What a prior reads of a prompt, against transformers' CLIPTextModelWithProjection on the same weights."""

from importlib import import_module

import pytest
import torch
import transformers

from harness.small_nets import conditioning, snapshot, unchanged

PROMPTS = ["", "a red cat", "a (red:1.5) cat, ((very)) \\(odd\\)", "word " * 75, "word " * 76]
WIDTH = 32
ENCODERS = {  # how it was made: token key, attribute, activation
    "SD1.5": ("l", "clip_l", "quick_gelu"),
    "SD2": ("h", "clip_h", "gelu"),
    "SDXL": ("g", "clip_g", "gelu"),
    "FLUX.1": ("l", "clip_l", "quick_gelu"),
}


@pytest.fixture
def text(pack):
    return import_module(f"{pack.__name__}.nodes.prior.text")


@pytest.fixture
def clips(small_models):
    def build(family: str):
        with torch.inference_mode():
            return small_models.families.FAMILIES[family].clip()

    return build


def reference(state: dict, layers: int, activation: str) -> transformers.CLIPTextModelWithProjection:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPTextConfig(
        **sizes, projection_dim=WIDTH, hidden_act=activation, vocab_size=49408, eos_token_id=49407, bos_token_id=49406
    )
    model = transformers.CLIPTextModelWithProjection(config).eval()
    missing, unexpected = model.load_state_dict({k: v.clone() for k, v in state.items()}, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    return model


@pytest.mark.parametrize("family", ENCODERS)
def test_it_is_what_transformers_reads(text, clips, family):
    key, name, activation = ENCODERS[family]
    clip = clips(family)
    encoder = getattr(clip.cond_stage_model, name)
    got, warnings = text.text_of(clip, PROMPTS)
    ids = torch.tensor([[t for t, _ in clip.tokenize(p, disable_weights=True)[key][0]] for p in PROMPTS])
    end = (ids == 49407).int().argmax(1)
    model = reference(encoder.transformer.state_dict(), encoder.num_layers, activation)
    with torch.no_grad():
        want = model(ids)
    assert got.states.shape == (5, 77, WIDTH) and got.pooled.shape == (5, WIDTH)
    assert torch.allclose(got.states, want.last_hidden_state, atol=1e-5)
    assert torch.allclose(got.pooled, want.text_embeds, atol=1e-5)
    assert want.text_embeds.std() > 0.1 and not torch.allclose(got.pooled[0], got.pooled[1], atol=1e-2)
    assert got.mask.equal(torch.arange(77) <= end[:, None])
    assert got.mask.sum(1).tolist()[:2] == [2, 5] and len(warnings) == 1 and "more than 77 tokens" in warnings[0]


def test_weights_are_plain_characters(text, clips):
    """The tokens are those of the tokenizer itself, as in the pipelines of Karlo and Kandinsky."""
    clip = clips("SD1.5")
    theirs = clip.tokenizer.clip_l.tokenizer
    for prompt in PROMPTS[:2] + ["a (red:1.5) cat, ((very)) odd", "word " * 75]:
        ours = [t for t, _ in clip.tokenize(prompt, disable_weights=True)["l"][0]]
        assert ours == theirs(prompt, padding="max_length", max_length=77, truncation=True)["input_ids"]
    plain, weighted = text.text_of(clip, ["red", "(red:1.5)"]).texts.mask.sum(1).tolist()
    assert weighted > plain + 3


def test_many_prompts_are_read_as_each_alone(text, clips):
    clip = clips("SDXL")
    prompts = [f"{n} cats" for n in range(text.TEXTS + 3)]
    together = text.text_of(clip, prompts).texts
    for n in (0, text.TEXTS - 1, text.TEXTS + 2):
        alone = text.text_of(clip, [prompts[n]]).texts
        assert torch.allclose(together.pooled[n], alone.pooled[0], atol=1e-6)
        assert torch.allclose(together.states[n], alone.states[0], atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_clip_stays_as_it_was(text, clips, family):
    """Weights, settings, and what core makes of it afterwards; and clip skip has no say here."""
    clip = clips(family)
    encoder = getattr(clip.cond_stage_model, ENCODERS[family][1])
    settings = ("layer", "layer_idx", "return_projected_pooled")
    before, was = snapshot(clip.cond_stage_model), [getattr(encoder, s) for s in settings]
    states, pooled = conditioning(clip, "a (red:1.5) cat")
    read = text.text_of(clip, ["a red cat"]).texts
    assert unchanged(before, clip.cond_stage_model) and [getattr(encoder, s) for s in settings] == was
    again = conditioning(clip, "a (red:1.5) cat")
    assert again[0].equal(states) and again[1].equal(pooled)
    skipping = clip.clone()
    skipping.clip_layer(-2)
    assert text.text_of(skipping, ["a red cat"]).texts.states.equal(read.states)


def test_a_lora_of_the_text_encoder_is_read_with(text, clips):
    clip = clips("SD1.5")
    with torch.inference_mode():
        moved = clip.clone()
        name = "clip_l.transformer.text_model.final_layer_norm.bias"
        assert moved.add_patches({name: ("diff", (torch.full((WIDTH,), 0.25),))})
    before, after = (text.text_of(c, ["a cat"]).texts for c in (clip, moved))
    assert torch.allclose(after.states, before.states + 0.25, atol=1e-5)
    assert text.text_of(clip, ["a cat"]).texts.states.equal(before.states)


def test_learned_words_count_as_they_are_long(text, clips, bridge):
    clip = bridge.with_embeddings(clips("SD1.5"), {"word": {"clip_l": torch.ones(3, WIDTH)}})
    plain, learned = text.text_of(clip, ["a cat", "a embedding:word cat"]).texts.mask.sum(1).tolist()
    assert learned == plain + 3


def test_whose_text_it_is(text, clips, bridge):
    """The encoder's own weights and their LoRAs count; clip skip, learned words, and what is beside it do not."""
    clip = clips("SDXL")
    own = text.identity(clip)
    skipping = clip.clone()
    skipping.clip_layer(-2)
    worded = bridge.with_embeddings(clip, {"word": {"clip_g": torch.ones(1, WIDTH)}})
    with torch.inference_mode():
        beside, moved = clip.clone(), clip.clone()
        for other, encoder in ((beside, "clip_l"), (moved, "clip_g")):
            name = f"{encoder}.transformer.text_model.final_layer_norm.bias"
            assert other.add_patches({name: ("diff", (torch.full((WIDTH,), 0.25),))})
    assert (
        own
        == text.identity(clips("SDXL"), WIDTH)
        == text.identity(skipping)
        == text.identity(worded)
        == text.identity(beside)
    )
    assert text.identity(moved) != own != text.identity(clips("SD2"))
    text.text_of(moved, ["a cat"])  # its LoRA now lies in the weights that all three share
    assert text.identity(clip) == own != text.identity(moved)


def test_pocket(text, pack):
    """Its pooled text is projected already."""
    clip = pack.nodes.pocket_models.load_clip()
    read = text.text_of(clip, ["a red circle"]).texts
    _, pooled = clip.encode_from_tokens(clip.tokenize("a red circle"), return_pooled=True)
    assert read.pooled.shape == (1, 128) and torch.allclose(read.pooled, pooled, atol=1e-6)


def test_of_several_encoders_the_one_of_the_width(text, clips):
    clip = clips("SDXL")
    projection = clip.cond_stage_model.clip_l.transformer.text_projection
    assert text.chosen_encoder(clip, None)[0] == "clip_g"
    projection.out_features = 16  # as 768 beside 1280
    assert text.chosen_encoder(clip, 16)[0] == "clip_l" and text.chosen_encoder(clip, None)[0] == "clip_g"
    with pytest.raises(
        ValueError,
        match=r"reads texts of 1280 numbers, and this CLIP gives 16 .clip_l. and 32 .clip_g.: load the CLIP of an SDXL",
    ):
        text.text_of(clip, ["a"], 1280)


def test_a_language_model_is_no_clip(text, clips):
    with pytest.raises(
        ValueError, match="has no text encoder of CLIP's own kind.*load the one that belongs to the prior"
    ):
        text.text_of(clips("FLUX.2"), ["a cat"])


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        ("text_projection", 0.0, "text_projection"),
        ("text_projection", float("nan"), "text_projection"),
        ("text_projection", 1e30, "text_projection"),
        ("text_model.encoder.layers.2.mlp.fc2", 0.0, "last layer"),
        ("text_model.final_layer_norm", 0.0, "last norm"),
    ],
)
def test_an_encoder_without_its_last_parts_is_refused(text, clips, part, value, named):
    clip = clips("SD2")
    weight = clip.cond_stage_model.clip_h.transformer.get_submodule(part).weight
    with torch.inference_mode():
        weight.fill_(value)
    with pytest.raises(ValueError, match=f"text encoder clip_h of this CLIP came without its {named} .*with Load CLIP"):
        text.text_of(clip, ["a cat"])


def test_a_checkpoint_without_the_projection_is_refused(text):
    """As core loads it from a file: a whole ViT-L but for one matrix."""
    import comfy.sd
    import comfy.sd1_clip
    from comfy.clip_model import CLIPTextModel
    from comfy.ops import disable_weight_init
    from comfy.supported_models_base import ClipTarget

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": WIDTH,
             "hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407}  # fmt: skip
    file = {
        k: torch.full_like(v, 0.01)
        for k, v in CLIPTextModel(sizes, torch.float32, "cpu", disable_weight_init).state_dict().items()
    }
    for whole in (True, False):
        if not whole:
            del file["text_projection.weight"]
        clip = comfy.sd.CLIP(
            ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
            state_dict={f"clip_l.transformer.{k}": v for k, v in file.items()},
            model_options={"clip_l_model_config": sizes, "dtype": torch.float32},
        )
        if whole:
            assert text.text_of(clip, ["a cat"]).texts.pooled.isfinite().all()
    projection = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    with torch.inference_mode():
        projection.zero_()  # core hands out memory as it is, which is nearly always this
    with pytest.raises(ValueError, match=r"checkpoints of SD 1\.5 and SDXL leave ViT-L's projection out"):
        text.text_of(clip, ["a cat"])
