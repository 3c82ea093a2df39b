"""What Shared Attention costs on models of full size: multiplications and memory, counted on torch's meta device."""

import itertools

import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.memory import SD15
from harness.shapes import taken

WORDS, SIDE, HEADS, WIDTH = 512, 64, 24, 128  # FLUX.1 at 1024 pixels
TOKENS = SIDE * SIDE
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": HEADS * WIDTH,
    "mlp_ratio": 4.0, "num_heads": HEADS, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
PICTURES, SHARES = (2, 3, 4, 6, 8), (0.1, 0.2, 0.3, 0.5)
TERA = {  # 10^12 multiplications and additions of attention, per picture and pass: SynCD's specification, by share of the subject
    2: (16.0, 17.2, 18.4, 20.7), 3: (17.2, 19.6, 21.9, 26.6), 4: (18.4, 21.9, 25.4, 32.5), 6: (20.7, 26.6, 32.5, 44.2),
    8: (23.1, 31.3, 39.5, 56.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def attention(pack):
    return pack.nodes.attention


def flash(q, k, v, mask=None):
    """(B, heads, n, width) -> (B, n, heads * width), as on a graphics card, where no n x n numbers are kept."""
    assert mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0].transpose(1, 2).flatten(2)


def in_the_place_of_attention(_, q, k, v, heads, mask=None, skip_reshape=False, **more):
    split = [x if skip_reshape else x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    return flash(*split, mask)


def full_size(kind, config: dict):
    """A MODEL without data."""
    made = getattr(comfy.supported_models, kind)(dict(config))
    made.set_inference_dtype(torch.bfloat16, None)
    device = torch.device("meta")
    return comfy.model_patcher.ModelPatcher(made.get_model({}, "", device=device), device, device)


def shapes(*shape) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)


def masks(count: int, share: float) -> torch.Tensor:
    """Of the size of the grid; the first tokens are the subject."""
    each = torch.arange(TOKENS) < round(TOKENS * share)
    return each.float().view(1, SIDE, SIDE).expand(count, -1, -1)


@pytest.fixture(scope="module")
def flux():
    """Its layers multiply alike, so one of each kind stands for all 57."""
    return full_size("Flux", {**FLUX, "depth": 1, "depth_single_blocks": 1})


def asked(network, options: dict, count: int):
    told = {"cond_or_uncond": [0], "sigmas": torch.ones(count), **options}
    text = shapes(count, WORDS, 4096)
    return network(shapes(count, 16, 2 * SIDE, 2 * SIDE), shapes(count), text, y=shapes(count, 768), guidance=shapes(count),
                   transformer_options=told)  # fmt: skip


@pytest.fixture
def patched(attention, flux):
    """Two MODELs, without and with sharing, for a number of pictures and the share of each that its subject covers; and what they are
    told of the grid of tokens."""

    def patched(count: int, share: float) -> list[tuple]:
        given = flux.clone()
        given.model_options["transformer_options"]["optimized_attention_override"] = in_the_place_of_attention
        models = given, attention.patch.with_shared_attention(given, masks(count, share))
        grid = {attention.patch.GRID: (SIDE, SIDE)}
        return [(m.model.diffusion_model, {**m.model_options["transformer_options"], **grid}) for m in models]

    return patched


@pytest.mark.parametrize("count, share", itertools.product(PICTURES, SHARES))
def test_attention_of_flux_multiplies_what_was_predicted(bridge, patched, count, share):
    """The patched network at 1024 pixels, against the specification's column to 1 %."""
    counter = FlopCounterMode(display=False)
    with bridge.training_mode(), torch.no_grad(), counter:
        asked(*patched(count, share)[1], count)
    layers = counter.get_flop_counts()["Global"][torch.ops.aten._scaled_dot_product_flash_attention] / 2
    assert 57 * layers / count / 1e12 == pytest.approx(TERA[count][SHARES.index(share)], rel=0.01)


def gathered(count: int, share: float) -> int:
    """Bytes of the keys and values that all pictures together see of the others."""
    return count * (count - 1) * round(share * TOKENS) * 2 * HEADS * WIDTH * 2


@pytest.mark.parametrize("count, share", [(2, 0.1), (4, 0.3), (8, 0.5)])
def test_a_pass_through_flux_takes_no_more_memory_than_what_is_gathered(bridge, patched, count, share):
    with bridge.training_mode(), torch.no_grad():
        alone, shared = (taken(lambda each=each: asked(*each, count)) for each in patched(count, share))
    assert alone.most > 1e8 and shared.most <= 1.1 * (alone.most + gathered(count, share))


@pytest.mark.parametrize("count, share", itertools.product(PICTURES, SHARES))
def test_a_layer_of_flux_takes_no_more_memory_than_what_is_gathered(attention, count, share):
    """Of two pictures one's own keys and values, which have to lie beside the other's, are more than the tenth that is allowed. Nothing
    has an entry for each token and every token of the set."""
    q, k, v = (shapes(count, HEADS, WORDS + TOKENS, WIDTH) for _ in range(3))
    subjects = [torch.arange(round(TOKENS * share), device="meta")] * count

    def below(keys: torch.Tensor, slot: int) -> torch.Tensor:
        return attention.shared.moved(keys, [0.0, float(slot * SIDE), 0.0], FLUX["axes_dim"], FLUX["theta"])

    alone = taken(lambda: flash(q, k, v))
    ours = taken(lambda: attention.shared.shared(flash, q, k, v, subjects, text=WORDS, axis=2, place=below))
    own = k[0].nbytes + v[0].nbytes if count == 2 else 0
    assert ours.returned == q.nbytes < ours.most <= 1.1 * (alone.most + gathered(count, share)) + own
    assert ours.largest < (WORDS + TOKENS) * count * TOKENS * q.itemsize


def test_reading_the_subject_multiplies_little(attention, bridge, monkeypatch):
    """SD 1.5 at 512 pixels, three pictures with and without guidance, a prompt of all 75 words that there are
    places for: a twentieth more at most."""
    monkeypatch.setattr(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True)
    words, model = attention.words, full_size("SD15", SD15)
    model.model_options["transformer_options"]["optimized_attention_override"] = in_the_place_of_attention
    reader = attention.patch.with_shared_attention(model, None, attention.patch.How(strength=0.0))
    named = torch.arange(1, 76), torch.ones(75, dtype=torch.bool)
    prompts = [[{"uuid": "said", words.SUBJECT: [named], words.LENGTH: 77}], [{"uuid": "unsaid"}]]

    def multiplied(conds: list) -> int:
        sampling = attention.sampling.Sampling(3, (64, 64))
        sampling.begin(conds, 1.0)
        told = {
            "cond_or_uncond": [1, 0],
            "uuids": ["unsaid", "said"],
            "sigmas": torch.ones(6),
            attention.sampling.KEY: sampling,
        }
        counter = FlopCounterMode(display=False)
        with bridge.training_mode(), torch.no_grad(), counter:
            reader.model.diffusion_model(
                shapes(6, 4, 64, 64), shapes(6), context=shapes(6, 77, 768),
                transformer_options={**reader.model_options["transformer_options"], **told},
            )  # fmt: skip
        return counter.get_total_flops()

    reading, alone = multiplied(prompts), multiplied([[{"uuid": "said"}], [{"uuid": "unsaid"}]])
    assert 1 < reading / alone <= 1.05
