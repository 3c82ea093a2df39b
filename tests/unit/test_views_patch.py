"""Feature Warp in ComfyUI's models, against hooks on their layers and against a sampler that warps at each step."""

import contextlib
import functools
import types

import pytest
import torch

from harness.small_controlnet import controlnet
from harness.small_nets import load, numbers

KINDS = ("SD1.5", "SDXL", "Pocket", "SD3.5", "FLUX.1", "FLUX.2", "Qwen-Image")
HEIGHT, WIDTH = 16, 24  # latents
SMALL = {"height": 8, "width": 12}  # of whole samplings


@pytest.fixture(scope="module")
def views(pack):
    return pack.nodes.views


def scattered(views, count=3, share=0.7, seed=1):
    """Most pixels of each view, and where they are in each other: moved by a shift of the pair, which no token keeps to."""
    generator, middle, pairs = torch.Generator().manual_seed(seed), views.geometry.centres(32, 48).flatten(0, 1), {}
    for a, b in [(a, b) for a in range(count) for b in range(count) if a != b]:
        there = middle + (torch.rand(2, generator=generator) - 0.5) * 0.3
        seen = (torch.rand(len(middle), generator=generator) < share) & ((there > 0) & (there < 1)).all(1)
        pairs[a, b] = middle[seen].float(), there[seen].float()
    return views.correspondences.Correspondences(count, (32, 48), pairs)


@pytest.fixture(scope="module")
def made(pack, small_models):
    """A MODEL by the name of its family; the same one to all tests, none of which changes it."""

    @functools.cache
    def made(name: str):
        families = small_models.families.FAMILIES
        with torch.inference_mode():
            model = pack.nodes.pocket_models.load_model() if name == "Pocket" else families[name].model()
            load(model)
        return model

    return made


@pytest.fixture(params=KINDS)
def model(request, made):
    return made(request.param)


@torch.inference_mode()
def asked(model, x, states, prompts, sigma=1.0, **told):
    """What the network says of the rows, as a sampler asks for them."""
    sigmas = torch.full((len(x),), sigma)
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers, "cond_or_uncond": prompts,
               "sigmas": sigmas[: len(x) // len(prompts)], **told}  # fmt: skip
    width = getattr(model.model, "adm_channels", 0) or 0
    more = {"y": numbers(1, width, seed=9).expand(len(x), -1)} if width else {}
    return model.model.apply_model(x, sigmas, c_crossattn=states, transformer_options=options, **more)


def given(model, count, seed=1, height=HEIGHT, width=WIDTH):
    config, space = model.model.model_config.unet_config, model.model.latent_format
    names = [k for k in ("context_dim", "context_in_dim", "joint_attention_dim") if config.get(k)]
    context = config[names[0]] if names else config["context_embedder_config"]["params"]["in_features"]
    latents = numbers(count, space.latent_channels, *[1] * (space.latent_dimensions - 2), height, width, seed=seed)
    return latents, numbers(count, 77, context, seed=seed + 50)


@contextlib.contextmanager
def by_hooks(views, model, of, strength=1.0):
    """What the patch does, done to the outputs of layers: of norms in a UNet, of projections elsewhere, where only whole tokens
    can be moved. One prompt, one set of views."""
    network, hooks = model.model.diffusion_model, []

    @functools.cache
    def plan(height, width):
        return views.warp.steps(of, height, width)

    def warp(x):
        tokens = x.shape[1]
        scale = next(s for s in (1, 2, 4, 8) if -(-HEIGHT // s) * -(-WIDTH // s) <= tokens)
        height, width = -(-HEIGHT // scale), -(-WIDTH // scale)
        words, out = tokens - height * width, x.clone()
        for view, to, source, origins in plan(height, width):
            out[view, words + to] = strength * out[source, words + origins] + (1 - strength) * out[view, words + to]
        return out

    def projected(part, given, out):
        return warp(out)

    def single(part, given, out):  # queries, keys and values of FLUX, then what goes past attention
        width = 3 * network.hidden_size
        return torch.cat([warp(out[..., :width]), out[..., width:]], -1)

    projections = ("img_attn.qkv", "x_block.attn.qkv", "x_block.attn2.qkv", "attn.to_q", "attn.to_k", "attn.to_v")
    of_layers = {"norm1": projected} if hasattr(network, "input_blocks") else {**dict.fromkeys(projections, projected), "linear1": single}  # fmt: skip
    for name, part in network.named_modules():
        hooks += [part.register_forward_hook(hook) for end, hook in of_layers.items() if name.endswith(end)]
    assert hooks
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def patched(views, model, of, strength=1.0, start=0.0, end=1.0, **more):
    return views.patch.with_feature_warp(model, of, strength, start, end, **more)


def test_features_are_warped_before_they_attend(views, model):
    """The model itself does not change."""
    of, (x, states) = scattered(views), given(model, 3)
    before = asked(model, x, states, [0])
    got = asked(patched(views, model, of), x, states, [0])
    with by_hooks(views, model, of):
        expected = asked(model, x, states, [0])
    assert (expected - before).abs().max() > 1e-3
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert asked(model, x, states, [0]).equal(before)


@pytest.mark.parametrize("strength", [0.6, 0.2])
@pytest.mark.parametrize("name", ["SD1.5", "Pocket"])
def test_strength_mixes(views, made, name, strength):
    model, of = made(name), scattered(views)
    x, states = given(model, 3)
    with by_hooks(views, model, of, strength):
        expected = asked(model, x, states, [0])
    got = asked(patched(views, model, of, strength), x, states, [0])
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert patched(views, model, of, 0.0) is model


def test_prompts_may_come_together_or_apart(views, model):
    """And in any order; what is not wanted never reaches what is."""
    (x, said), (_, unsaid) = given(model, 3), given(model, 3, seed=7)
    warping = patched(views, model, scattered(views))
    together = asked(warping, torch.cat([x, x]), torch.cat([unsaid, said]), [1, 0])
    apart = torch.cat([asked(warping, x, unsaid, [1]), asked(warping, x, said, [0])])
    turned = asked(warping, torch.cat([x, x]), torch.cat([said, unsaid]), [0, 1])
    scale = together.abs().max()
    assert (together - apart).abs().max() <= 1e-5 * scale and (together.roll(3, 0) - turned).abs().max() <= 1e-5 * scale
    other = asked(warping, torch.cat([x, x]), torch.cat([unsaid + 1, said]), [1, 0])
    assert (other[3:] - together[3:]).abs().max() <= 1e-6 * scale


def test_a_batch_may_hold_several_sets(views, model):
    (x, states), (y, more) = given(model, 3), given(model, 3, seed=4)
    warping = patched(views, model, scattered(views))
    both = asked(warping, torch.cat([x, y]), torch.cat([states, more]), [0])
    apart = torch.cat([asked(warping, x, states, [0]), asked(warping, y, more, [0])])
    assert (both - apart).abs().max() <= 1e-5 * both.abs().max()


@pytest.mark.parametrize("start, end", [(0.0, 0.1), (0.9, 1.0)])
def test_outside_its_time_it_does_nothing(views, model, start, end):
    x, states = given(model, 3)
    warping = patched(views, model, scattered(views), start=start, end=end)
    assert asked(warping, x, states, [0], 0.6).equal(asked(model, x, states, [0], 0.6))


@pytest.mark.parametrize("mode", ["features", "latents"])
def test_a_sampling_that_begins_too_late_is_told(views, made, caplog, mode):
    """`end` counts from pure noise, so a picture that is painted over a little may never be warped; two passes of one model are no error."""
    model, of = made("Pocket"), scattered(views)
    (noise, states), (latent, _) = given(model, 3, **SMALL), given(model, 3, seed=8, **SMALL)
    painted(patched(views, model, of, end=0.2, mode=mode), noise, states)
    assert "does nothing here" not in caplog.text
    painted(patched(views, model, of, end=0.2, mode=mode), noise, states, latent=latent, denoise=0.5)
    assert "does nothing here" in caplog.text and "Raise `end`" in caplog.text


def test_what_it_does_is_part_of_the_models_identity(views, identity, made):
    model = made("SD1.5")
    names = [identity.fingerprint(each) for each in (
        model, patched(views, model, scattered(views)), patched(views, model, scattered(views, seed=2)),
        patched(views, model, scattered(views), 0.5), patched(views, model, scattered(views), mode="latents"),
    )]  # fmt: skip
    assert len(set(names)) == 5
    warping = patched(views, model, scattered(views))
    asked(warping, *given(model, 3), [0])
    assert identity.fingerprint(warping) == names[1]


@pytest.mark.parametrize("name", ["SD1.5", "SD3.5", "FLUX.1", "Qwen-Image"])
def test_shared_attention_sees_what_was_warped(views, pack, made, name):
    """In whichever order the two were put."""
    model, of, share = (
        made(name),
        scattered(views),
        pack.nodes.attention.patch.with_shared_attention,
    )
    x, states = given(model, 3)
    masks = torch.zeros(3, 32, 48)
    masks[:, 6:20, 10:30] = 1
    shared = share(model, masks)
    with by_hooks(views, model, of):
        expected = asked(shared, x, states, [0])
    for each in (patched(views, shared, of), share(patched(views, model, of), masks)):
        assert (asked(each, x, states, [0]) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for without in (shared, patched(views, model, of)):
        assert (asked(without, x, states, [0]) - expected).abs().max() > 1e-4


def painted(model, noise, states, sampler="euler", steps=6, cfg=1.0, unsaid=None, latent=None, control=None, **more):
    """Through core's own sampling."""
    import comfy.sample

    positive = [[states, {"pooled_output": torch.zeros(1, 32), **({"control": control, "control_apply_to_uncond": True} if control else {})}]]  # fmt: skip
    negative = positive if unsaid is None else [[unsaid, {"pooled_output": torch.zeros(1, 32)}]]
    latent = torch.zeros_like(noise) if latent is None else latent
    scheduler, seed = "simple", 5
    with torch.inference_mode():
        if callable(sampler):
            sampling = model.get_model_object("model_sampling")
            sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
            sampler = comfy.samplers.KSAMPLER(sampler)
            return comfy.sample.sample_custom(model, noise, cfg, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=seed)  # fmt: skip
        return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, disable_pbar=True, seed=seed, **more)  # fmt: skip


@pytest.mark.parametrize("name, cfg", [("Pocket", 1.0), ("Pocket", 3.0), ("SD1.5", 3.0), ("FLUX.1", 1.0)])
@pytest.mark.parametrize("picture", [False, True])
def test_latents_with_euler_are_those_warped_at_each_step(views, made, name, cfg, picture):
    """A loop that warps the noisy latents before each step begun in time, and after it; from noise, and from a picture."""
    model, of = made(name), scattered(views)
    (noise, states), (latent, unsaid) = given(model, 3, **SMALL), given(model, 3, seed=8, **SMALL)
    latent = latent * 0.3 if picture else None
    least = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    plan, warps = views.warp.steps(of, **SMALL), []

    def euler(denoise, x, sigmas, extra_args=None, **_):
        for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
            early = float(now) > least
            warps.append(early)
            x = views.warp.warped_maps(x, plan, 1.0) if early else x
            x = x + (x - denoise(x, now.expand(len(x)), **extra_args)) / now * (then - now)
            x = views.warp.warped_maps(x, plan, 1.0) if early else x
        return x

    expected = painted(model, noise, states, euler, cfg=cfg, unsaid=unsaid, latent=latent)
    got = painted(
        patched(views, model, of, end=0.5, mode="latents"), noise, states, cfg=cfg, unsaid=unsaid, latent=latent
    )
    plain = painted(model, noise, states, cfg=cfg, unsaid=unsaid, latent=latent)
    assert 1 < sum(warps) < 6 and (plain - expected).abs().max() > 0.05
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "heun", "uni_pc"])
def test_every_sampler_paints_views_that_agree(views, made, sampler):
    """Warped until the end, corresponding latents are equal after the last step, whatever noise was added on the way; and the model sees
    nothing else."""
    model, of = made("Pocket"), scattered(views)
    noise, states = given(model, 3, **SMALL)
    plan, seen, warping = views.warp.steps(of, **SMALL), [], patched(views, model, of, mode="latents")
    warping.set_model_unet_function_wrapper(lambda call, told: (seen.append(told["input"]), call(told["input"], told["timestep"], **told["c"]))[1])  # fmt: skip
    got = painted(warping, noise, states, sampler)
    assert len(seen) >= 6 and all(views.warp.warped_maps(x, plan, 1.0).equal(x) for x in seen)
    apart = painted(model, noise, states, sampler)
    off, before = ((views.warp.warped_maps(x, plan, 1.0) - x).abs().mean() for x in (got, apart))
    assert got.isfinite().all() and off <= 0.02 * before


def test_latents_mix_by_strength_and_a_mask_keeps_what_it_keeps(views, made):
    model, of = made("Pocket"), scattered(views)
    (noise, states), (latent, _) = given(model, 3, **SMALL), given(model, 3, seed=8, **SMALL)
    full, half, plain = (painted(m, noise, states) for m in (
        patched(views, model, of, mode="latents"), patched(views, model, of, 0.5, mode="latents"), model))  # fmt: skip
    assert (half - plain).abs().max() > 0.05 and (half - full).abs().max() > 0.05
    mask = torch.zeros(3, 1, *SMALL.values())
    mask[:, :, :4] = 1
    kept = painted(patched(views, model, of, mode="latents"), noise, states, latent=latent, noise_mask=mask)
    assert (kept - latent)[:, :, 4:].abs().max() <= 1e-5 and (kept - latent)[:, :, :4].abs().max() > 0.1


def test_a_controlnet_is_heard_as_well(views, small_models, made):
    """Core's ControlNet in a whole sampling, which asks for both prompts; its own layers are not warped. What no point of another view
    reaches is what it is alone with its own hint."""
    model, of, hints = made("SD1.5"), scattered(views), numbers(3, 3, 128, 192, seed=6).sigmoid()
    control, (noise, states) = controlnet(small_models.builders, hints), given(model, 3)
    got, without = (painted(patched(views, model, of), noise, states, control=c, steps=2) for c in (control, None))
    with by_hooks(views, model, of):
        expected = painted(model, noise, states, control=control, steps=2)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-4 * scale and (got - without).abs().max() > 1e-2 * scale
    pair = views.correspondences.Correspondences(3, of.size, {(1, 0): of.points[1, 0]})
    got = painted(patched(views, model, pair), noise, states, control=control, steps=2)
    for n, alike in enumerate((True, False, True)):
        own = controlnet(small_models.builders, hints[n : n + 1])
        alone = painted(model, noise[n : n + 1], states[n : n + 1], control=own, steps=2)
        assert ((got[n] - alone[0]).abs().max() <= 1e-4 * scale) == alike


def test_what_does_not_fit_is_said(views, made):
    model, of = made("SD1.5"), scattered(views)
    x, states = given(model, 3)
    for rows, prompts in ((2, [0]), (3, [1, 0])):
        with pytest.raises(ValueError, match=f"knows 3 views, and {rows} pictures are painted together"):
            asked(patched(views, model, of), x[:rows], states[:rows], prompts)
    with pytest.raises(ValueError, match="knows 3 views, and 2 pictures are painted together"):
        painted(patched(views, model, of, mode="latents"), x[:2], states[:2])
    with pytest.raises(ValueError, match="cannot be combined with prompts for an area"):
        asked(patched(views, model, of), x, states, [0], **{views.patch.WHOLE: torch.Size([32, 24])})
    fewer = model.clone()
    fewer.set_model_attn1_patch(lambda n, context, value, options: (n[:, ::2],) * 3)
    with pytest.raises(ValueError, match="tokens where the picture has 384.*HyperTile"):
        asked(patched(views, fewer, of), x, states, [0])
    nothing = views.correspondences.Correspondences(3, (8, 8), {(1, 0): (torch.zeros(0, 2),) * 2})
    with pytest.raises(ValueError, match="No point of one view was found.*Draw Correspondences"):
        patched(views, model, nothing)
    with pytest.raises(ValueError, match="no mode 'both': choose features or latents"):
        patched(views, model, of, mode="both")


def test_an_architecture_is_refused_by_name(views, made):
    """In features; its latents can be warped, if they are those of pictures."""
    of, model = scattered(views), made("Z-Image")
    with pytest.raises(ValueError, match="features of Lumina2 with NextDiT: use SD 1.5.*or the mode latents"):
        patched(views, model, of)
    strange = model.clone()
    strange.model = types.SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="SimpleNamespace with Linear"):
        patched(views, strange, of)
    film = patched(views, made("Qwen-Image"), of, mode="latents")
    x, one = given(film, 3)[0], torch.zeros(3, 77, 32)
    assert painted(film, x, one, steps=2).shape == x.shape
    with pytest.raises(ValueError, match=r"needs latents of pictures, and those of QwenImage are \(3, 16, 2, 16, 24\)"):
        painted(film, x.expand(-1, -1, 2, -1, -1).contiguous(), one, steps=2)
