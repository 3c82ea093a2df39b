"""Shared attention against the dense mask of the paper, and as a patch of ComfyUI's models."""

import functools
import itertools
import types

import pytest
import torch

from harness.allocated import peak
from harness.small_nets import load, numbers

PICTURES, SHARES, WIDTHS = (2, 3, 4, 8), (0.0, 0.1, 0.5, 1.0), (40, 64, 128)


@pytest.fixture(scope="module")
def attention(pack):
    return pack.nodes.attention


def plain(q, k, v, _=None):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def dense(q, k, v, subjects, text=0):
    """Every picture against all keys of the set, what it may not see at minus infinity; in double precision."""
    count, tokens, _ = q.shape
    q, k, v = q.double(), k.double().flatten(0, 1), v.double().flatten(0, 1)
    logits = (q @ k.T / q.shape[-1] ** 0.5).unflatten(-1, (count, tokens))
    for n, m in itertools.permutations(range(count), 2):
        unseen = torch.ones(tokens, dtype=torch.bool)
        unseen[text + subjects[m]] = False
        logits[n, :, m, unseen] = -torch.inf
        logits[n, :text, m] = -torch.inf
    return logits.flatten(-2).softmax(-1) @ v


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("count, share, width", itertools.product(PICTURES, SHARES, WIDTHS))
def test_leaving_keys_out_is_the_dense_mask(attention, count, share, width, dtype, error):
    q, k, v = (numbers(count, 24, width, seed=s).to(dtype) for s in (1, 2, 3))
    generator = torch.Generator().manual_seed(4)
    subjects = [torch.randperm(24, generator=generator)[: round(24 * share)] for _ in range(count)]
    got = attention.shared.shared(plain, q, k, v, subjects)
    assert (got - dense(q, k, v, subjects)).abs().max() <= error


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("text, width", itertools.product((0, 77, 256, 512), WIDTHS))
def test_words_see_their_own_picture_alone(attention, text, width, dtype, error):
    """Beside image tokens that see subjects; to the bit, whatever the other pictures show and say."""

    def kernel(q, k, v, _=None):  # of one head; without heads torch would take a way that no model takes
        return plain(*(t[:, None] for t in (q, k, v)))[:, 0]

    q, k, v = (numbers(3, text + 256, width, seed=s).to(dtype) for s in (1, 2, 3))
    subjects = [torch.randperm(256, generator=torch.Generator().manual_seed(n))[:77] for n in range(3)]
    got = attention.shared.shared(kernel, q, k, v, subjects, text=text)
    assert (got - dense(q, k, v, subjects, text)).abs().max() <= error
    k[1:], v[1:] = k[1:] + 1, v[1:] - 1
    other = attention.shared.shared(kernel, q, k, v, subjects, text=text)
    assert other[0, :text].equal(got[0, :text]) and (other[0, text:] - got[0, text:]).abs().amax(1).min() > error


def test_others_see_the_subject_and_nothing_else(attention):
    q, k, v = (numbers(3, 16, 8, seed=s) for s in (1, 2, 3))
    subjects = [torch.tensor([3, 4])] * 3

    def change(token: int) -> torch.Tensor:
        other = v.clone()
        other[1, token] += 1
        before, after = (attention.shared.shared(plain, q, k, x, subjects) for x in (v, other))
        return (after - before).abs().amax((1, 2))

    assert change(5)[[0, 2]].eq(0).all() and change(5)[1] > 0
    assert change(3)[[0, 2]].gt(1e-3).all()


def test_a_subject_is_where_its_mask_touches_a_token(attention):
    masks = torch.zeros(2, 40, 60)
    masks[0, 10, 59], masks[1, :20] = 1, 1
    touched = attention.shared.subject_tokens(masks, 4, 6)
    assert touched[0].tolist() == [11] and touched[1].tolist() == list(range(12))


def test_moving_a_key_is_placing_it_elsewhere(attention):
    """Against core's own positions."""
    from comfy.ldm.flux.layers import EmbedND
    from comfy.ldm.flux.math import _apply_rope1

    keys, widths, positions = numbers(2, 3, 10, 32), [8, 12, 12], numbers(1, 10, 3, seed=2).mul(20).round()
    place = EmbedND(dim=32, theta=10000, axes_dim=widths)
    here, there = (_apply_rope1(keys, place(positions + torch.tensor(by))) for by in ([0.0, 0, 0], [0.0, 64, 3]))
    assert (attention.shared.moved(here, [0.0, 64.0, 3.0], widths, 10000) - there).abs().max() <= 1e-6


@pytest.mark.parametrize("count, share", [(4, 0.1), (4, 0.5), (8, 0.3)])
def test_memory_grows_with_what_is_seen(attention, count, share):
    """Over each picture by itself no more than the keys and values of others, and a tenth: those of one picture are gone before the
    next looks."""
    tokens, width = 1024, 64
    q, k, v = (numbers(count, 4, tokens, width, seed=s) for s in (1, 2, 3))
    subjects = [torch.arange(round(tokens * share))] * count

    def heads_together(q, k, v, _=None):
        return plain(q, k, v).transpose(1, 2).flatten(2)

    alone = peak(lambda: heads_together(q, k, v))
    ours = peak(lambda: attention.shared.shared(heads_together, q, k, v, subjects, axis=2))
    gathered = 2 * count * (count - 1) * round(k[0].nbytes * share)
    assert ours <= 1.1 * (alone + gathered)


KINDS = ("SD1.5", "SDXL", "Pocket", "SD3.5", "FLUX.1", "FLUX.2", "Qwen-Image", "Z-Image")


@pytest.fixture(scope="module")
def build_model(pack, small_models):
    """A MODEL by the name of its family; the same one to all tests, none of which changes it."""

    @functools.cache
    def build_model(name: str):
        families = small_models.families.FAMILIES
        with torch.inference_mode():
            made = pack.nodes.pocket_models.load_model() if name == "Pocket" else families[name].model()
            load(made)
            return made

    return build_model


@pytest.fixture(params=KINDS)
def model(request, build_model):
    return build_model(request.param)


@torch.inference_mode()
def asked(model, x, states, prompts, sigma=1.0):
    """What the network says of the rows, as a sampler asks for them."""
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    sigmas = torch.full((len(x),), sigma)
    told = {**options, "cond_or_uncond": prompts, "sigmas": sigmas[: len(x) // len(prompts)]}
    width = model.model.adm_channels if getattr(model.model, "adm_channels", 0) else 0
    more = {"y": numbers(1, width, seed=9).expand(len(x), -1)} if width else {}
    if hasattr(model.model.diffusion_model, "noise_refiner"):
        more["num_tokens"] = states.shape[1]
    return model.model.apply_model(x, sigmas, c_crossattn=states, transformer_options=told, **more)


def given(model, count, seed=1, height=16, width=24):
    config = model.model.model_config.unet_config
    names = [k for k in ("context_dim", "context_in_dim", "joint_attention_dim", "cap_feat_dim") if config.get(k)]
    context = config[names[0]] if names else config["context_embedder_config"]["params"]["in_features"]
    space = model.model.latent_format
    latents = numbers(count, space.latent_channels, *[1] * (space.latent_dimensions - 2), height, width, seed=seed)
    return latents, numbers(count, 77, context, seed=seed + 50)


@pytest.fixture
def patched(attention, model):
    def patched(masks=None, start=0.0, end=1.0, **more):
        return attention.patch.with_shared_attention(model, masks, attention.patch.How(start, end, **more))

    return patched


def block(count: int) -> torch.Tensor:
    masks = torch.zeros(count, 32, 48)
    masks[:, 8:20, 10:30] = 1
    return masks


def test_pictures_change_together(model, patched):
    """And the model that the patch was made from does not."""
    x, states = given(model, 3)
    before = asked(model, x, states, [0])
    with_masks, whole = asked(patched(block(3)), x, states, [0]), asked(patched(), x, states, [0])
    assert (with_masks - before).abs().max() > 1e-4 and (whole - with_masks).abs().max() > 1e-4
    assert asked(model, x, states, [0]).equal(before)


def test_what_it_does_is_part_of_the_models_identity(identity, model, patched):
    """So that a set painted without it is not taken for one painted with it."""
    x, states = given(model, 2)
    shared = patched(block(2))
    before = identity.fingerprint(shared)
    asked(shared, x, states, [0])
    assert before == identity.fingerprint(shared) != identity.fingerprint(model)


def test_a_single_picture_is_painted_as_without(model, patched):
    x, states = given(model, 1)
    assert asked(patched(block(1)), x, states, [0]).equal(asked(model, x, states, [0]))


@pytest.mark.parametrize("start, end", [(0.0, 0.1), (0.9, 1.0)])
def test_outside_its_time_it_does_nothing(model, patched, start, end):
    x, states = given(model, 2)
    assert asked(patched(block(2), start, end), x, states, [0], 0.6).equal(asked(model, x, states, [0], 0.6))


def test_prompts_may_come_together_or_apart(model, patched):
    """cfg above 1 asks for both in one pass, or one after the other where memory is short; the answer is the same."""
    (x, said), (_, unsaid) = given(model, 3), given(model, 3, seed=7)
    shared = patched(block(3))
    together = asked(shared, torch.cat([x, x]), torch.cat([unsaid, said]), [1, 0])
    apart = torch.cat([asked(shared, x, unsaid, [1]), asked(shared, x, said, [0])])
    assert (together - apart).abs().max() <= 1e-5
    three = asked(shared, torch.cat([x, x, x]), torch.cat([unsaid, said, unsaid]), [1, 0, 0])
    assert (three - torch.cat([apart, apart[:3]])).abs().max() <= 1e-5, "two prompts that are wanted"
    other = asked(shared, torch.cat([x, x]), torch.cat([unsaid + 1, said]), [1, 0])
    assert (other[3:] - together[3:]).abs().max() <= 1e-6, "what is not wanted reached what is"


def test_a_mask_for_each_or_one_for_all(model, patched):
    x, states = given(model, 3)
    assert asked(patched(block(1)), x, states, [0]).equal(asked(patched(block(3)), x, states, [0]))
    with pytest.raises(ValueError, match="has 2 masks, and 3 pictures.*1 for each, or 1 for all"):
        asked(patched(block(2)), x, states, [0])
    with pytest.raises(ValueError, match="got 3 rows for 2 prompts"):
        asked(patched(block(1)), x, states, [1, 0])
    with pytest.raises(ValueError, match="The masks are black.*paint the subject white"):
        patched(torch.zeros(1, 8, 8))


def test_a_subject_may_be_nothing_or_everything(model, patched):
    """Of no picture, of one of them, and all that there is."""
    x, states = given(model, 3)
    alone = asked(model, x, states, [0])
    scale = alone.abs().max()
    assert (asked(patched(block(3), dropout=1.0), x, states, [0]) - alone).abs().max() <= 1e-6 * scale
    assert asked(patched(torch.ones(3, 32, 48)), x, states, [0]).equal(asked(patched(), x, states, [0]))
    other, masks = x.clone(), block(3)
    other[1], masks[1] = other[1] + 1, 0
    for shown, seen in ((masks, False), (block(3), True)):
        before, after = (asked(patched(shown), each, states, [0]) for each in (x, other))
        changed = (after - before).abs().flatten(1).amax(1)
        assert changed[1] > 1e-3 * scale and all((changed[n] > 1e-5 * scale) == seen for n in (0, 2))


def test_another_architecture_is_refused_by_name(attention, model):
    strange = model.clone()
    strange.model = types.SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="with Linear: use SD 1.5"):
        attention.patch.with_shared_attention(strange)


@pytest.mark.parametrize("name", ["SD1.5", "SDXL", "Pocket"])
def test_a_unet_is_the_papers_dense_mask(attention, build_model, name):
    """A whole network against one whose self-attention is written out; its cross-attention is its own."""
    model, masks = build_model(name), block(3)
    masks[1] = masks[1].roll(6, 0)

    def attend_to_all(q, k, v, options):
        subjects = attention.shared.subject_tokens(masks, *options["activations_shape"][-2:])
        heads = zip(*(t.chunk(options["n_heads"], -1) for t in (q, k, v)), strict=True)
        return torch.cat([dense(*head, subjects) for head in heads], -1).to(q)

    oracle, (x, states) = model.clone(), given(model, 3)
    for part, number in itertools.product(("input", "middle", "output"), range(12)):
        oracle.set_model_attn1_replace(attend_to_all, part, number)
    shared = attention.patch.with_shared_attention(model, masks)
    expected, got, alone = (asked(m, x, states, [0]) for m in (oracle, shared, model))
    assert (expected - alone).abs().max() > 1e-3
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("count, positions", [(2, "below"), (3, "below"), (3, "reference"), (3, "in place")])
@pytest.mark.parametrize("name", ["SD3.5", "FLUX.1", "FLUX.2", "Qwen-Image", "Z-Image"])
def test_a_network_with_words_is_the_papers_dense_mask(attention, build_model, name, count, positions):
    """Whole networks against one that attends to all pictures at once, through a mask over every key. Where positions are rotary, the
    others' are those of a canvas on which they lie one below the other; or of reference pictures; or their own."""
    model = build_model(name)
    (x, states), network = given(model, count), model.model.diffusion_model
    masks = torch.zeros(count, 32, 48)
    for n in range(count):
        masks[n, 4 + 6 * n : 16 + 6 * n, 10:30] = 1
    height, width = (-(-side // network.patch_size) for side in x.shape[-2:])
    index = {"FLUX.2": 10.0}.get(name, 1.0)
    axis, by = {"below": (1, float(height)), "reference": (0, index), "in place": (0, 0.0)}[positions]
    oracle = dense_network(model, attention.shared.subject_tokens(masks, height, width), height, width, axis, by)
    shared = attention.patch.with_shared_attention(model, masks, attention.patch.How(positions=positions))
    expected, got, alone = (asked(m, x, states, [0]) for m in (oracle, shared, model))
    assert (expected - alone).abs().max() > 1e-3
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def dense_network(model, subjects, height, width, axis, by):
    """A clone whose attention is written out; what it needs of positions it takes from the network itself. Each neighbour lies `by`
    further along an axis of them."""
    from comfy.ldm.flux.math import _apply_rope1

    network, tokens, count, kept = model.model.diffusion_model, height * width, len(subjects), {}
    refines, multiple = hasattr(network, "noise_refiner"), getattr(network, "pad_tokens_multiple", None) or 1
    filled = -(-tokens // multiple) * multiple

    def before_positions(q, k, v, **_):
        kept["keys"] = k
        return {}

    def places(told):
        kept["ids"] = told["img_ids"][:1]
        return told

    def attend_to_all(function, q, k, v, heads, mask=None, skip_reshape=False, transformer_options=None, **more):
        if refines and "block_type" not in transformer_options:
            return function(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **more)
        if not skip_reshape:
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        words, painted = q.shape[2] - filled, []
        for n in range(count):
            keys, values, hidden = [k[n]], [v[n]], [torch.zeros(q.shape[2], k.shape[2])]
            for slot in range(1, count):
                m = (n - slot) % count
                if "ids" in kept:
                    ids = kept["ids"].clone()
                    ids[..., axis] += slot * by
                    keys.append(_apply_rope1(kept["keys"][m : m + 1, :, words:], network.pe_embedder(ids))[0])
                elif refines:  # no patch is shown its keys before they have positions, so they are moved on
                    on = torch.zeros(1, 1, 3)
                    on[..., axis] = slot * by
                    keys.append(_apply_rope1(k[m : m + 1, :, words : words + tokens], network.rope_embedder(on))[0])
                else:
                    keys.append(k[m, :, words:])
                values.append(v[m, :, words : words + tokens])
                unseen = torch.full((q.shape[2], tokens), -torch.inf)
                unseen[words:, subjects[m]] = 0
                hidden.append(unseen)
            logits = q[n] @ torch.cat(keys, 1).transpose(1, 2) / q.shape[-1] ** 0.5 + torch.cat(hidden, 1)
            painted.append((logits.softmax(-1) @ torch.cat(values, 1)).transpose(0, 1).flatten(1))
        return torch.stack(painted)

    oracle = model.clone()
    oracle.set_model_attn1_patch(before_positions)
    oracle.set_model_post_input_patch(places)
    oracle.model_options["transformer_options"]["optimized_attention_override"] = attend_to_all
    return oracle


def test_words_that_fill_up_a_caption_stay_hidden(attention):
    """The mask over a picture's own keys, beside the subjects of the others."""
    q, k, v = (numbers(2, 12, 8, seed=s) for s in (1, 2, 3))
    mask = torch.zeros(2, 1, 12)
    mask[:, :, 1] = -torch.inf

    def attend(q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    got = attention.shared.shared(attend, q, k, v, [torch.tensor([2, 5])] * 2, text=3, mask=mask)
    short = [t[:, [i for i in range(12) if i != 1]] for t in (q, k, v)]
    expected = attention.shared.shared(plain, *short, [torch.tensor([2, 5])] * 2, text=2)
    assert (got[:, [i for i in range(12) if i != 1]] - expected).abs().max() <= 1e-6


def test_another_override_is_asked_too(attention, build_model):
    """Core has one place for whoever replaces attention; nobody is thrown out of it."""
    model = build_model("FLUX.1")
    heard, (x, states) = [], given(model, 2)

    def listen(function, *args, **more):
        heard.append(args[0].shape)
        return function(*args, **more)

    first = model.clone()
    first.model_options["transformer_options"]["optimized_attention_override"] = listen
    alone, both = (attention.patch.with_shared_attention(m, block(2)) for m in (model, first))
    assert asked(alone, x, states, [0]).equal(asked(both, x, states, [0])) and heard
    assert model.model_options["transformer_options"].get("optimized_attention_override") is None


def kernels() -> dict:
    from comfy.ldm.modules.attention import REGISTERED_ATTENTION_FUNCTIONS, attention_basic

    return {**REGISTERED_ATTENTION_FUNCTIONS, "basic": attention_basic}


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("split", [False, True], ids=["heads inside", "heads apart"])
def test_every_kernel_of_core_gives_the_same_without_a_mask(attention, comfy, caplog, weight, split):
    """Those that can be imported here; a weight is no mask either."""
    q, k, v = (numbers(3, 2, 20, 40, seed=s) for s in (1, 2, 3))
    subjects = [torch.tensor([1, 4, 7]), torch.tensor([], dtype=torch.long), torch.arange(20)]
    expected = weighted_dense(q, k, v, subjects, weight)
    given_masks = []
    for name, kernel in kernels().items():

        def attend(q, k, v, mask=None, kernel=kernel):
            given_masks.append(mask)
            return kernel(q, k, v, 2, mask=mask, skip_reshape=split)

        inputs = (q, k, v) if split else [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
        way = {"axis": 2} if split else {"axis": 1, "heads": 2}
        got = attention.shared.shared(attend, *inputs, subjects, weight=weight, **way)
        assert (got - expected).abs().max() <= 1e-5, name
    assert len(kernels()) >= 4 and given_masks == [None] * len(given_masks) and not caplog.records


def weighted_dense(q, k, v, subjects, weight):
    """(N, tokens, heads * width), each picture against every key of the set, in double precision."""
    count, _, tokens, width = q.shape
    q, keys, values = q.double(), k.double(), v.double()
    painted = []
    for n in range(count):
        weights = torch.zeros(count, tokens, dtype=torch.float64)
        for m in range(count):
            weights[m, subjects[m]] = weight
        weights[n] = 1.0
        logits = torch.einsum("hqd,mhkd->hqmk", q[n], keys) / width**0.5
        shares = logits.exp() * weights
        shares = shares / shares.sum((-2, -1), keepdim=True)
        painted.append(torch.einsum("hqmk,mhkd->qhd", shares, values).flatten(1))
    return torch.stack(painted)
