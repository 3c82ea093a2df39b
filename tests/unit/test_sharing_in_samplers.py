"""Shared attention inside real samplers: sets, prompts, areas, subjects found while painting."""

import comfy.sample
import comfy.samplers
import pytest
import torch

from harness.small_controlnet import controlled, controlnet
from harness.small_nets import load, numbers

FAMILIES = ("SD1.5", "SDXL", "SD3.5", "FLUX.1", "FLUX.2", "Qwen-Image", "Z-Image")
WORDS = ["a red fox in the snow", "a red fox on a table", "a red fox at night"]


@pytest.fixture(scope="module")
def attention(pack):
    return pack.nodes.attention


@pytest.fixture(scope="module")
def pair(small_models):
    """(MODEL, CLIP) of a family."""
    made = {}

    def pair(name: str):
        if name not in made:
            with torch.inference_mode():
                family = small_models.families.FAMILIES[name]
                made[name] = family.model(), family.clip()
                load(made[name][0])
        return made[name]

    return pair


def encoded(clip, prompt: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def rows(clip, prompts: list[str]) -> list:
    """One conditioning of a row for each prompt; all are of one length here."""
    each = [encoded(clip, prompt)[0] for prompt in prompts]
    facts = dict(each[0][1])
    if facts.get("pooled_output") is not None:
        facts["pooled_output"] = torch.cat([e[1]["pooled_output"] for e in each])
    return [[torch.cat([e[0] for e in each]), facts]]


@torch.inference_mode()
def painted(model, positive, negative, count=3, cfg=3.0, sampler="euler", steps=3, seed=0, noise=None, size=(8, 12)):
    space = model.get_model_object("latent_format")
    empty = torch.zeros(count, space.latent_channels, *[1] * (space.latent_dimensions - 2), *size)
    noise = numbers(*empty.shape, seed=5) if noise is None else noise
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "normal", positive, negative, empty, disable_pbar=True, seed=seed
    )


def difference(one, other) -> float:
    return float((one - other).abs().max() / other.abs().max())


def block(count: int, height=64, width=96) -> torch.Tensor:
    masks = torch.zeros(count, height, width)
    for n in range(count):
        masks[n, 8 * n : 8 * n + 24, 16:56] = 1
    return masks


def how(attention, **settings):
    return attention.patch.How(**settings)


@pytest.fixture(params=FAMILIES)
def family(request, pair):
    model, clip = pair(request.param)
    return (
        model,
        clip,
        rows(clip, WORDS if "SD" in request.param or "FLUX" in request.param else WORDS[:1] * 3),
        encoded(clip, ""),
    )


def shared(attention, model, masks=None, **settings):
    return attention.patch.with_shared_attention(model, masks, how(attention, **settings))


def test_strength_is_continuous_and_0_is_nothing(attention, family):
    model, _, positive, negative = family
    alone = painted(model, positive, negative)
    at = {
        s: painted(shared(attention, model, block(3), strength=s), positive, negative)
        for s in (0.0, 1e-6, 0.5, 0.999, 1.0)
    }
    assert at[0.0].equal(alone)
    assert difference(at[1e-6], alone) <= 1e-3 < difference(at[1.0], alone)
    assert difference(at[0.999], at[1.0]) <= 0.1 * difference(at[1.0], alone)
    assert not at[0.5].equal(at[1.0]) and difference(at[0.5], alone) > 1e-3


def test_sets_of_one_batch_keep_to_themselves(attention, family):
    model, clip, _, negative = family
    positive, noise = encoded(clip, "a fox"), numbers(6, *painted_shape(model), seed=8)
    two = shared(attention, model, block(3), per_set=3)
    both = painted(two, positive, negative, 6, noise=noise)
    apart = [painted(two, positive, negative, 3, noise=half) for half in noise.split(3)]
    assert difference(both, torch.cat(apart)) <= 1e-4
    with pytest.raises(ValueError, match="sets of 4 pictures, and 6 are painted together"):
        painted(shared(attention, model, block(1), per_set=4), positive, negative, 6, noise=noise)


def painted_shape(model, size=(8, 12)) -> tuple:
    space = model.get_model_object("latent_format")
    return (space.latent_channels, *[1] * (space.latent_dimensions - 2), *size)


def test_anchors_do_not_see_those_that_follow_them(attention, family):
    model, clip, _, negative = family
    positive, noise = encoded(clip, "a fox"), numbers(3, *painted_shape(model), seed=8)
    other = noise.clone()
    other[2] += 1
    anchored, all_of_them = shared(attention, model, block(3), anchors=2), shared(attention, model, block(3))
    for patched, same in ((anchored, True), (all_of_them, False)):
        one, two = (painted(patched, positive, negative, noise=n) for n in (noise, other))
        assert (difference(one[:2], two[:2]) <= 1e-5) == same
    other = noise.clone()
    other[0] += 1
    one, two = (painted(anchored, positive, negative, noise=n) for n in (noise, other))
    assert difference(one[2:], two[2:]) > 1e-4, "those that follow do see the first"


def test_layers_steps_and_dropout_change_what_is_shared(attention, family):
    model, _, positive, negative = family
    ways = [{}, {"layers": "second half"}, {"first_step": "nothing"}, {"first_step": "whole picture"}, {"dropout": 0.5}]
    seen = [painted(shared(attention, model, block(3), **way), positive, negative) for way in ways]
    for n, one in enumerate(seen):
        assert all(difference(one, other) > 1e-6 for other in seen[:n]), ways[n]
    assert painted(shared(attention, model, block(3), dropout=0.5), positive, negative).equal(seen[-1]), (
        "the same each time"
    )
    assert painted(shared(attention, model, block(3), dropout=0.0, first_step="subject"), positive, negative).equal(
        seen[0]
    )


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "euler_ancestral"])
def test_any_sampler_and_no_guidance(attention, pair, sampler):
    model, clip = pair("SD1.5")
    positive, negative = rows(clip, WORDS), encoded(clip, "")
    for cfg in (1.0, 3.0):
        alone = painted(model, positive, negative, cfg=cfg, sampler=sampler)
        together = painted(shared(attention, model, block(3)), positive, negative, cfg=cfg, sampler=sampler)
        assert together.isfinite().all() and difference(together, alone) > 1e-3


@pytest.mark.parametrize("height, width", [(13, 9), (7, 22), (16, 16)])
def test_any_size(attention, family, height, width):
    """Sizes that no patch divides, and masks of yet another size."""
    model, _, positive, negative = family
    got = painted(shared(attention, model, block(3, 50, 31)), positive, negative, size=(height, width), steps=2)
    assert got.isfinite().all() and got.shape[-2:] == (height, width)


def with_area(conditioning: list, height: int, width: int, y: int, x: int) -> list:
    return [[states, {**facts, "area": (height, width, y, x), "strength": 1.0}] for states, facts in conditioning]


def test_a_prompt_for_a_part_of_the_picture_sees_that_part_of_the_subjects(attention, pair, monkeypatch):
    """Masks are cut as the latents are, so what is seen in the part is what the whole mask shows there."""
    model, clip = pair("FLUX.1")
    masks, seen = block(3), []
    masks[:, :, 48:] = 0
    real = attention.patch.subject_tokens

    def listen(masks, height, width):
        seen.append((height, width, [len(t) for t in real(masks, height, width)]))
        return real(masks, height, width)

    monkeypatch.setattr(attention.patch, "subject_tokens", listen)
    parts = [*with_area(encoded(clip, "a fox"), 8, 6, 0, 0), *with_area(encoded(clip, "a tree"), 8, 6, 0, 6)]
    painted(shared(attention, model, masks), parts, encoded(clip, ""), cfg=1.0)
    whole = [len(t) for t in real(masks, 4, 6)]
    assert (4, 3, whole) in seen and (4, 3, [0, 0, 0]) in seen and len(seen) == 3 * 2


def test_a_controlnet_tells_each_picture_its_own(attention, pair, small_models):
    """It shares nothing inside. The first of a set with one anchor sees nobody, so it is what it is alone, with its own hint; the others
    see it, and through it its hint."""
    model, clip = pair("SD1.5")
    hints, noise = numbers(3, 3, 64, 96, seed=6).sigmoid(), numbers(3, 4, 8, 12, seed=5)
    patched, negative = shared(attention, model, block(3), anchors=1), encoded(clip, "")

    def drawn(given, hints, rows=slice(None)):
        control = controlnet(small_models.builders, hints)
        both = (controlled(each, control) for each in (encoded(clip, WORDS[0]), negative))
        return painted(given, *both, len(noise[rows]), noise=noise[rows])

    together, plain = drawn(patched, hints), painted(patched, encoded(clip, WORDS[0]), negative, noise=noise)
    assert difference(together, plain) > 1e-2, "it is not heard"
    assert difference(together[:1], drawn(model, hints[:1], slice(0, 1))) <= 1e-5
    apart = torch.cat([drawn(model, hints[n : n + 1], slice(n, n + 1)) for n in range(3)])
    assert difference(drawn(shared(attention, model, block(3), strength=0.0), hints), apart) <= 1e-5
    assert all(difference(together[n], apart[n]) > 1e-3 for n in (1, 2))
    other = drawn(patched, torch.cat([hints[:2], 1 - hints[2:]]))
    assert difference(other[:2], together[:2]) <= 1e-5 and difference(other[2], together[2]) > 1e-3
    first = drawn(patched, torch.cat([1 - hints[:1], hints[1:]]))
    assert all(difference(first[n], together[n]) > 1e-4 for n in range(3))


def test_context_windows_are_refused(attention, pair):
    """They paint a batch in pieces that cannot see each other."""
    import comfy.context_windows as windows

    model, clip = pair("SD1.5")
    patched = shared(attention, model, block(4))
    patched.model_options["context_handler"] = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule("standard_static"),
        fuse_method=windows.get_matching_fuse_method("pyramid"), context_length=2, context_overlap=0, dim=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="cuts the batch into pieces, context windows for one"):
        painted(patched, encoded(clip, "a fox"), encoded(clip, ""), 4)


def test_who_stood_in_the_place_of_attention_is_asked_too(attention, pair):
    """A UNet has one place for each block; a patch that was there before is what pictures look at each other with."""
    model, clip = pair("SD1.5")
    asked, first = [], model.clone()

    def half(q, k, v, options):
        asked.append(k.shape[1] > q.shape[1])
        scores = (
            q.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2),
            k.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2),
        )
        values = v.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2)
        return 0.5 * torch.nn.functional.scaled_dot_product_attention(*scores, values).transpose(1, 2).flatten(2)

    first.set_model_attn1_replace(half, "input", 1)
    first.set_model_attn1_replace(half, "output", 3, 0)
    positive, negative = rows(clip, WORDS), encoded(clip, "")
    before = painted(first, positive, negative)
    asked.clear()
    got = painted(shared(attention, first, block(3)), positive, negative)
    assert asked and all(asked) and difference(got, before) > 1e-3
    asked.clear()
    assert painted(shared(attention, first, block(3), strength=0.0), positive, negative).equal(before) and not any(
        asked
    )


def named(attention, clip, conditioning, prompts):
    return attention.words.name_subject(conditioning, clip, prompts, "fox")


def test_the_subject_is_found_while_painting(attention, family):
    """Masks of the positive prompt alone, one for each picture, equal whether prompts are asked together or apart; sharing uses them
    from the second step on."""
    model, clip, _, negative = family
    positive = named(attention, clip, encoded(clip, WORDS[0]), WORDS[:1])
    whole, off = shared(attention, model), shared(attention, model, first_step="nothing")
    latents = painted(whole, positive, negative)
    masks = attention.patch.found_masks(whole, latents)
    assert masks.shape[0] == 3 and masks.unique().tolist() in ([0, 1], [0], [1])
    assert (
        attention.patch.found_masks(whole, latents * 2) is None and attention.patch.found_masks(model, latents) is None
    )
    unnamed = painted(shared(attention, model), encoded(clip, WORDS[0]), negative)
    assert difference(latents, unnamed) > 1e-6 or masks.all()
    assert difference(painted(off, positive, negative), latents) > 1e-6
    silent = shared(attention, model, strength=0.0)
    alone = painted(silent, positive, negative)
    assert alone.equal(painted(model, positive, negative)) and attention.patch.found_masks(silent, alone) is not None
    assert attention.patch.found_masks(shared(attention, model, block(3)), latents) is None


def test_a_prompt_of_nothing_but_the_subject_shows_nothing(attention, family):
    """Every token looks at the subject alone, so the map is flat: nothing is shared, and Subject Mask says so."""
    model, clip, _, negative = family
    positive = attention.words.name_subject(encoded(clip, "cat"), clip, ["cat"], "cat")
    patched = shared(attention, model, first_step="nothing")
    latents = painted(patched, positive, negative)
    assert difference(latents, painted(model, positive, negative)) <= 1e-5
    shown = attention.node.SubjectMask.execute(patched, {"samples": latents}, 0)
    assert not shown.args[0].any() and "in 3 nothing was found" in str(shown.ui.as_dict())
    for stranger, said in ((model, "did not come from Shared Attention"), (patched, "No subject was looked for")):
        with pytest.raises(ValueError, match=said):
            attention.node.SubjectMask.execute(stranger, {"samples": latents * 2}, 0)


def test_another_prompt_against_it_changes_no_mask_of_the_first_step(attention, pair):
    """What is not wanted is not read."""
    model, clip = pair("SD1.5")
    positive = named(attention, clip, encoded(clip, WORDS[0]), WORDS[:1])
    found = []
    for unwanted in ("", "a fox and a dog"):
        silent = shared(attention, model, strength=0.0)
        latents = painted(silent, positive, encoded(clip, unwanted), steps=1)
        found.append(attention.patch.found_masks(silent, latents))
    assert found[0].equal(found[1])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_sde"])
def test_masks_change_once_for_a_noise_level(attention, pair, monkeypatch, sampler):
    """However often a sampler asks at it."""
    model, clip = pair("SD1.5")
    closed, real = [], attention.subject.SubjectMaps.close_step
    monkeypatch.setattr(attention.subject.SubjectMaps, "close_step", lambda self: (closed.append(1), real(self))[1])
    positive = named(attention, clip, encoded(clip, WORDS[0]), WORDS[:1])
    sigmas = set()
    patched = shared(attention, model)
    patched.set_model_unet_function_wrapper(
        lambda apply, given: (
            sigmas.add(float(given["timestep"][0])),
            apply(given["input"], given["timestep"], **given["c"]),
        )[1]
    )
    painted(patched, positive, encoded(clip, ""), sampler=sampler, steps=4)
    assert len(sigmas) <= len(closed) <= len(sigmas) + 2 + (sampler == "heun") * 3


@pytest.mark.parametrize("name", ["SD1.5", "FLUX.1"])
def test_compiled_models_share_as_others_do(attention, pair, name):
    """On, off and on again, with masks that change from step to step; core compiles without a look at what patches say. Off is strength
    0: once compiled with any patch in it, core's SD 1.5 cannot do without one."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    model, clip = pair(name)
    torch.compiler.reset()
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    positive, negative = named(attention, clip, encoded(clip, WORDS[0]), WORDS[:1]), encoded(clip, "")
    expected = {way: painted(patch(attention, model), positive, negative) for way, patch in WAYS.items()}
    for way in ("words", "off", "masks", "off", "words"):
        got = painted(WAYS[way](attention, compiled), positive, negative)
        assert difference(got, expected[way]) <= 1e-4, way


WAYS = {
    "words": lambda attention, model: shared(attention, model),
    "masks": lambda attention, model: shared(attention, model, block(3), strength=0.5),
    "off": lambda attention, model: shared(attention, model, block(3), strength=0.0),
}
