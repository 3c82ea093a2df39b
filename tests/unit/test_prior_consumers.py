"""Image embeddings in core's own functions that take them, without weights."""

from importlib import import_module
from types import SimpleNamespace

import comfy.model_base
import comfy.supported_models
import nodes
import pytest
import torch
from comfy.ldm.modules.encoders.noise_aug_modules import CLIPEmbeddingNoiseAugmentation

from harness.priors import small_prior
from harness.small_nets import numbers


@pytest.fixture
def embedding(pack):
    return import_module(f"{pack.__name__}.nodes.prior.embedding")


@pytest.fixture
def sample(pack):
    return import_module(f"{pack.__name__}.nodes.prior.sample")


def conditioned(embedding, dim: int, strength: float = 1.0) -> list[dict]:
    """What core's node makes of one of ours."""
    ((_, facts),) = nodes.unCLIPConditioning().apply_adm(
        [[torch.zeros(1, 77, 8), {}]], embedding.ImageEmbedding(numbers(1, dim)), strength, 0.0
    )[0]
    return facts["unclip_conditioning"]


@pytest.mark.parametrize(("config", "dim", "adm"), [
    (comfy.supported_models.SD21UnclipL, 768, 1536), (comfy.supported_models.SD21UnclipH, 1024, 2048),
])  # fmt: skip
def test_sd21_unclip(embedding, config, dim, adm):
    model = SimpleNamespace(noise_augmentor=CLIPEmbeddingNoiseAugmentation(**config.noise_aug_config))
    said = comfy.model_base.SD21UNCLIP.encode_adm(
        model, unclip_conditioning=conditioned(embedding, dim), device="cpu", seed=10
    )
    assert said.shape == (1, adm) and said.isfinite().all()
    assert torch.nn.functional.cosine_similarity(said[:, :dim], numbers(1, dim)) > 0.99


def test_sdxl_revision(embedding):
    schedule = {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    augmentor = CLIPEmbeddingNoiseAugmentation(noise_schedule_config=schedule, timestep_dim=1280)
    said = comfy.model_base.sdxl_pooled(
        {"unclip_conditioning": conditioned(embedding, 1280), "device": "cpu", "seed": 10}, augmentor
    )
    assert said.shape == (1, 1280) and torch.nn.functional.cosine_similarity(said, numbers(1, 1280)) > 0.99


def test_stable_cascade(embedding):
    said = comfy.model_base.StableCascade_C.extra_conds(
        None, pooled_output=None, unclip_conditioning=conditioned(embedding, 768, 0.5)
    )
    image = said["clip_img"].cond
    assert image.shape == (1, 1, 768) and torch.equal(image[0], 0.5 * numbers(1, 768))


# Which embedding a MODEL takes


UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1], "channel_mult": [1],
        "transformer_depth": [1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1], "use_spatial_transformer": True,
        "context_dim": 32, "num_heads": 2, "num_classes": "sequential", "use_linear_in_transformer": True, "legacy": False}  # fmt: skip
CASCADE = {"stable_cascade_stage": "c", "c_cond": 32, "c_hidden": [32, 32], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]]}


def painter(config, unet: dict):
    made = config(unet)
    made.set_inference_dtype(torch.float32, None)
    return SimpleNamespace(model=made.get_model({}, "", device="meta"))


@pytest.mark.parametrize(("config", "unet", "dim"), [
    (comfy.supported_models.SD21UnclipL, UNET | {"adm_in_channels": 1536}, 768),
    (comfy.supported_models.SD21UnclipH, UNET | {"adm_in_channels": 2048}, 1024),
    (comfy.supported_models.SDXL, UNET | {"adm_in_channels": 2816}, 1280),
    (comfy.supported_models.SDXLRefiner, UNET | {"adm_in_channels": 2560}, 1280),
    (comfy.supported_models.Stable_Cascade_C, CASCADE, 768),
    (comfy.supported_models.SD20, UNET | {"adm_in_channels": None, "num_classes": None}, None),
])  # fmt: skip
def test_which_models_take_an_embedding(pack, sample, config, unet, dim):
    """As core builds them. The prior that fits passes, another is refused with the numbers and the right one."""
    model = painter(config, dict(unet))
    assert sample.taken_by(model) == dim
    if dim is None:
        with pytest.raises(
            ValueError,
            match=r"\(SD20\) takes no image embedding: use SD 2.1 unCLIP, SDXL \(ReVision\) or Stable Cascade",
        ):
            sample.check_taken(model, small_prior(pack))
        return
    sample.check_taken(model, small_prior(pack, dim=dim))
    with pytest.raises(
        ValueError,
        match=rf"24 numbers \(small CLIP\) and this model \({config.__name__}\) takes {dim}: use .*(Karlo|ViT-H|Kandinsky 2.2)",
    ):
        sample.check_taken(model, small_prior(pack))


def test_the_end_of_every_way_between_two(embedding):
    a, b = numbers(1, 6), numbers(1, 6, seed=2)
    assert embedding.spherical(a, b, 0.0) is a and embedding.spherical(a, b, 1.0) is b
    for share in (0.25, 0.5, 0.9):
        mixed = embedding.spherical(a, b, share)
        angle, way = (torch.nn.functional.cosine_similarity(a, x).acos() for x in (b, mixed))
        assert torch.allclose(way, share * angle, atol=1e-4)
        assert torch.allclose(mixed.norm(), torch.lerp(a.norm(), b.norm(), share))
    for other in (-a, 3 * a, torch.zeros(1, 6)):
        assert torch.allclose(embedding.spherical(a, other, 0.25), 0.75 * a + 0.25 * other, atol=1e-5)


@pytest.mark.parametrize("name", ["last_hidden_state", "penultimate_hidden_states", "mm_projected"])
def test_patches_are_explained(embedding, name):
    one = embedding.ImageEmbedding(numbers(5))
    assert one["image_embeds"].shape == (1, 5) and getattr(one, name, None) is None
    with pytest.raises(
        AttributeError, match=rf"one vector of 5 numbers and has no patches \({name}\): give it to unCLIPConditioning"
    ):
        one[name]
