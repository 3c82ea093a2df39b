"""A prompt for each picture of a batch: what each row says, on every family."""

import importlib

import comfy.sample
import pytest
import torch

from harness.small_nets import numbers

NAMES = ("SD1.5", "SD2", "SDXL", "SD3.5", "FLUX.1", "FLUX.2", "Qwen-Image", "Z-Image")
SHORT, OTHER = "a red cat", "a blue dog on a green hill"
LONG = "a red cat and a blue dog, " * 80  # more than every least length
SAME = ("a red cat", "a red dog")  # as many tokens


@pytest.fixture
def prompts(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.prompts")


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def family(name, small_models):
    return importlib.import_module(f"{small_models.__name__}.families").FAMILIES[name]


@pytest.fixture
def clip(family):
    with torch.inference_mode():
        yield family.clip()


def core(clip, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def painted(family, conditioning: list, noise: torch.Tensor, cfg: float = 1.0) -> torch.Tensor:
    """One step of core's own sampler."""
    model, (states, facts) = family.model(), conditioning[0]
    negative = [[numbers(1, 77, states.shape[-1], seed=9) * 0.1, {"pooled_output": facts["pooled_output"]}]]
    return comfy.sample.sample(
        model, noise, 1, cfg, "euler", "normal", conditioning, negative, torch.zeros_like(noise), disable_pbar=True
    )


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_a_row_is_its_prompt_alone(prompts, name, family, clip):
    """Texts that differ in length, but for Z-Image; nothing is filled up here that is not filled up for one prompt, or it is masked."""
    texts, noise = SAME if name == "Z-Image" else (SHORT, OTHER), numbers(2, *family.latent)
    rows = prompts.together(prompts.encoded_alike(clip, list(texts)))
    got = painted(family, rows, noise)
    alone = [painted(family, core(clip, text), noise[[i]]) for i, text in enumerate(texts)]
    swapped = painted(family, core(clip, texts[1]), noise[[0]])
    assert rows[0][0].shape[0] == 2
    assert same(got, torch.cat(alone))
    assert not same(got[:1], swapped), "the prompt does not matter to this network"


def own_filling(clip, name: str, text: str, length: int) -> list:
    """A text as core itself encodes it at a greater length."""
    if name in ("FLUX.1", "FLUX.2"):
        longer = clip.clone()
        longer.set_tokenizer_option({"FLUX.1": "t5xxl", "FLUX.2": "qwen3_4b"}[name] + "_min_length", length)
        return core(longer, text)
    ((states, facts),), ((empty, _),) = core(clip, text), core(clip, "")
    return [[torch.cat([states, *[empty] * (length // 77 - 1)], 1), facts]]


@pytest.mark.parametrize("name", NAMES[:6], indirect=True)
def test_a_row_beside_a_long_one_is_filled_up_as_core_does(prompts, name, family, clip):
    rows = prompts.encoded_alike(clip, [SHORT, LONG])
    (states, facts), (long, _) = rows[0][0], rows[1][0]
    assert torch.equal(long, core(clip, LONG)[0][0])
    ((want, told),) = own_filling(clip, name, SHORT, long.shape[1])
    assert states.shape == long.shape and states.shape[1] > core(clip, SHORT)[0][0].shape[1]
    assert same(states, want)
    if told["pooled_output"] is not None:
        assert same(facts["pooled_output"], told["pooled_output"])
    noise = numbers(2, *family.latent)
    assert same(painted(family, prompts.together(rows), noise)[:1], painted(family, [[want, told]], noise[:1]))


def test_what_is_masked_may_be_of_any_length(prompts, small_models):
    family = importlib.import_module(f"{small_models.__name__}.families").FAMILIES["Qwen-Image"]
    with torch.inference_mode():
        clip, noise = family.clip(), numbers(3, *family.latent)
        rows = prompts.together(prompts.encoded_alike(clip, [SHORT, LONG, OTHER]))
        got = painted(family, rows, noise, cfg=3.0)
        assert rows[0][1]["attention_mask"].sum(1).tolist() == [
            core(clip, p)[0][0].shape[1] for p in (SHORT, LONG, OTHER)
        ]
        for i, text in enumerate((SHORT, LONG, OTHER)):
            assert same(got[[i]], painted(family, core(clip, text), noise[[i]], cfg=3.0))


def test_what_flux2_puts_before_a_text_is_nothing_new(prompts, small_models):
    """Its own encoder's words come with its weights; the model fills every text up, whoever read it."""
    family = importlib.import_module(f"{small_models.__name__}.families").FAMILIES["FLUX.2"]
    noise = numbers(2, *family.latent)
    alone = [[[numbers(1, n, 96, seed=n), {"pooled_output": None}]] for n in (30, 44)]
    with torch.inference_mode():
        rows = prompts.together(prompts.filled_in_front(alone))
        assert rows[0][0].shape == (2, 44, 96)
        got = painted(family, rows, noise)
        assert same(got, torch.cat([painted(family, each, noise[[i]]) for i, each in enumerate(alone)]))


def test_a_model_that_would_read_the_filling_is_refused(prompts, small_models):
    family = importlib.import_module(f"{small_models.__name__}.families").FAMILIES["Z-Image"]
    with torch.inference_mode(), pytest.raises(ValueError) as refused:
        prompts.encoded_alike(family.clip(), [SHORT, OTHER, SHORT])
    said = str(refused.value)
    assert all(part in said for part in ("ZImage", SHORT, OTHER, "equally long")) and "\n" not in said


@pytest.mark.parametrize("texts", [[SHORT, OTHER], [LONG, SHORT]])
def test_sdxl_has_a_summary_for_each_row(prompts, small_models, texts):
    family = importlib.import_module(f"{small_models.__name__}.families").FAMILIES["SDXL"]
    with torch.inference_mode():
        clip = family.clip()
        ((_, facts),) = prompts.together(prompts.encoded_alike(clip, texts))
        want = torch.cat([core(clip, text)[0][1]["pooled_output"] for text in texts])
    assert facts["pooled_output"].shape == want.shape and same(facts["pooled_output"], want)
