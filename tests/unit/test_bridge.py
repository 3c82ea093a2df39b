"""ComfyUI's MODEL and CLIP as trainers see them: errors, gradients and private copies."""

import pytest
import torch

from harness.small_nets import as_kind, conditioning, denoiser, load, numbers, snapshot, unchanged, with_lora

KINDS = ("EPS", "V_PREDICTION", "FLOW")


# The error of a model in its own parameterisation


def target_difference(base, kind: str, x0, noise, sigma, states) -> torch.Tensor:
    """What the network says minus what it should say, from the definitions."""
    from comfy.model_base import ModelType, model_sampling

    s, sampling = sigma.view(-1, 1, 1, 1), model_sampling(base.model_config, ModelType[kind])

    def network(x):
        return base.diffusion_model(x, sampling.timestep(sigma).float(), context=states)

    if kind == "FLOW":  # x_t = (1 - s) x0 + s n, velocity n - x0
        return network((1 - s) * x0 + s * noise) - (noise - x0)
    a, b = 1 / (1 + s * s).sqrt(), s / (1 + s * s).sqrt()  # x_t = a x0 + b n
    says = network(a * x0 + b * noise)
    return says - noise if kind == "EPS" else says - (a * noise - b * x0)


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_the_difference_from_the_target(bridge, build, kind):
    sigma = torch.tensor([0.05, 0.4, 0.95] if kind == "FLOW" else [0.05, 1.0, 14.0])
    x0, noise, states = numbers(3, 4, 8, 8), numbers(3, 4, 8, 8, seed=2), numbers(3, 77, 32, seed=3)
    shared = as_kind(build.sd15_model(), kind)
    with bridge.training_mode(), torch.no_grad():
        model = denoiser(bridge, shared)
        got = model.error(x0, noise, sigma, bridge.Conditioning(states, None))
        want = target_difference(model.base, kind, x0, noise, sigma, states)
    assert got.shape == x0.shape and got.dtype == torch.float32
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_noise_levels_are_stratified_in_the_models_own_time(bridge, build, kind):
    from comfy.model_base import ModelType, model_sampling

    shared = as_kind(build.sd15_model(), kind)
    sampling, n = model_sampling(shared.model.model_config, ModelType[kind]), 16
    with bridge.training_mode():
        model = denoiser(bridge, shared)
        for seed in range(5):
            sigma = model.sigmas(n, torch.Generator().manual_seed(seed))
            assert sigma.equal(model.sigmas(n, torch.Generator().manual_seed(seed))) and sigma.isfinite().all()
            time = (sampling.timestep(sigma).double() / (1000 if kind == "FLOW" else 999)).sort().values
            strata = torch.arange(n) / n
            assert (time >= strata - 1e-3).all() and (time <= strata + 1 / n + 1e-3).all()
        assert not sigma.equal(sigma.sort().values) and not sigma.equal(sigma.sort(descending=True).values)


@pytest.mark.parametrize("kind", KINDS)
def test_signal_to_noise_ratio(bridge, build, kind):
    sigma, shared = torch.tensor([0.1, 0.5, 0.9]), as_kind(build.sd15_model(), kind)
    with bridge.training_mode():
        snr = denoiser(bridge, shared).snr(sigma)
    want = ((1 - sigma) / sigma) ** 2 if kind == "FLOW" else sigma**-2
    assert torch.allclose(snr, want, rtol=1e-5)


# Gradients


@pytest.mark.parametrize("caption", ["a {token} cat", "a ({token}:1.3) cat"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_slope(bridge, build, kind, caption):
    """Central differences along the gradient and along a random direction."""
    x0, noise = numbers(2, 4, 8, 8), numbers(2, 4, 8, 8, seed=2)
    sigma = torch.tensor([0.2, 0.7] if kind == "FLOW" else [0.3, 2.0])
    shared, shared_clip = as_kind(build.sd15_model(), kind), build.sd15_clip()
    with bridge.training_mode():
        model, clip = denoiser(bridge, shared), bridge.private_clip(shared_clip)
        encoder = bridge.ComfyTextEncoder(clip)

        def loss(v):
            cond = encoder.encode([caption] * 2, [{"clip_l": v}] * 2)
            return model.error(x0, noise, sigma, cond).double().square().mean()

        vector = bridge.starting_vectors(clip, "red dog", 2)["clip_l"].requires_grad_()
        (gradient,) = torch.autograd.grad(loss(vector), [vector])
        assert gradient.norm() > 0
        for direction in (gradient / gradient.norm(), torch.nn.functional.normalize(numbers(2, 32, seed=5), dim=None)):
            h = 3e-3
            with torch.no_grad():
                slope = (loss(vector + h * direction) - loss(vector - h * direction)) / (2 * h)
            along = (gradient.double() * direction).sum()
            assert slope.item() == pytest.approx(along.item(), rel=5e-3, abs=5e-3 * gradient.norm().item())


def test_nothing_but_the_vectors_gets_a_gradient(bridge, build):
    shared, shared_clip = build.sd15_model(), build.sd15_clip()
    with bridge.training_mode():
        model, clip = denoiser(bridge, shared), bridge.private_clip(shared_clip)
        encoder = bridge.ComfyTextEncoder(clip)
        vector = torch.zeros(2, 32).add(0.1).requires_grad_()
        cond = encoder.encode(["{token}"], [{"clip_l": vector}])
        model.error(numbers(1, 4, 8, 8), numbers(1, 4, 8, 8), torch.ones(1), cond).square().mean().backward()
    assert vector.grad.abs().sum() > 0
    for module in (model.base, clip.cond_stage_model):
        assert not [name for name, p in module.named_parameters() if p.requires_grad or p.grad is not None]


def test_leaves_of_stacked_rows_are_as_good_as_separate_passes(bridge, build):
    """C1 on ComfyUI's own classes: two groups with vectors of their own in one batch."""
    x0, noise, sigma = numbers(2, 4, 8, 8), numbers(2, 4, 8, 8, seed=2), torch.tensor([0.5, 3.0])
    shared, shared_clip = build.sd15_model(), build.sd15_clip()
    with bridge.training_mode():
        model, clip = denoiser(bridge, shared), bridge.private_clip(shared_clip)
        encoder = bridge.ComfyTextEncoder(clip)
        leaves = [numbers(4, 32, seed=s).mul(0.1).requires_grad_() for s in (7, 8)]

        def losses(rows):
            cond = encoder.encode(["a {token}"] * len(rows), [{"clip_l": leaves[r]} for r in rows])
            return model.error(x0[rows], noise[rows], sigma[rows], cond).square().mean((1, 2, 3))

        together = torch.autograd.grad(losses([0, 1]).sum(), leaves)
        for row in (0, 1):
            (alone,) = torch.autograd.grad(losses([row]).sum(), leaves[row : row + 1])
            assert (together[row] - alone).norm() <= 1e-5 * alone.norm()


def test_training_leaves_the_models_bit_identical(bridge, build, pack):
    model, clip = build.sd15_model(), build.sd15_clip()
    models, texts = snapshot(model.model), snapshot(clip.cond_stage_model)
    with torch.inference_mode():
        before = clip.encode_from_tokens(clip.tokenize("a red cat"))
    ti = pack.training.textual_inversion
    with bridge.training_mode():
        own = bridge.private_clip(clip)
        start = bridge.starting_vectors(own, "cat", 1)
        trainer = ti.TextualInversion(denoiser(bridge, model), bridge.ComfyTextEncoder(own), numbers(2, 4, 8, 8), [["a {token}"]] * 2,
                                      start, ti.Settings(method="paper", steps=3, batch=2), numbers(2, 4, 8, 8, seed=4))  # fmt: skip
        for i in range(3):
            trainer.step(i)
    assert not trainer.vectors["clip_l"].equal(start["clip_l"])
    assert unchanged(models, model.model) and unchanged(texts, clip.cond_stage_model)
    with torch.inference_mode():
        assert before.equal(clip.encode_from_tokens(clip.tokenize("a red cat")))


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("error", [None, ValueError, "interruption"])
def test_the_training_flag_is_restored(bridge, monkeypatch, already, error):
    import comfy.model_management as mm

    error = mm.InterruptProcessingException if error == "interruption" else error
    monkeypatch.setattr(mm, "in_training", already)
    with torch.inference_mode():
        try:
            with bridge.training_mode():
                assert mm.in_training and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
                assert not torch.ones(1).is_inference()
                if error:
                    raise error
        except BaseException as raised:
            assert isinstance(raised, error or ())
        assert mm.in_training is already and torch.is_inference_mode_enabled()


# Private copies


def prediction(model) -> torch.Tensor:
    with torch.no_grad():
        load(model)
        return model.model.apply_model(
            numbers(1, 4, 8, 8), torch.ones(1), c_crossattn=numbers(1, 77, 32, seed=2)
        ).clone()


@pytest.mark.parametrize("factory", [True, False], ids=["loader's factory", "no factory"])
@pytest.mark.parametrize("patched", [False, True])
def test_a_private_model_is_the_same_and_its_own(bridge, build, factory, patched):
    model = build.sd15_model(5)
    if not factory:
        model.cached_patcher_init = None
    if patched:
        model = with_lora(as_kind(model, "V_PREDICTION"), 0.7)
    before = prediction(model)
    weights = snapshot(model.model)
    with bridge.training_mode():
        own = bridge.private_model(model)
        load(own)
        assert not any(p.is_inference() for p in own.model.parameters())
        assert prediction(own).equal(before)
        with torch.no_grad():
            for p in own.model.parameters():
                p.zero_()
        assert not prediction(own).equal(before)
    del own
    assert unchanged(weights, model.model) and prediction(model).equal(before)


def test_a_private_clip_is_the_same_and_its_own(bridge, build):
    clip = build.sd15_clip()
    key = next(k for k in clip.cond_stage_model.state_dict() if k.endswith("layers.0.mlp.fc1.weight"))
    with torch.inference_mode():
        clip = clip.clone()
        assert clip.add_patches({key: ("diff", (torch.full_like(clip.cond_stage_model.state_dict()[key], 0.05),))})
    before = conditioning(clip, "a cat")[0]
    assert not before.equal(conditioning(build.sd15_clip(), "a cat")[0]), "the patch does nothing"
    with bridge.training_mode():
        own = bridge.private_clip(clip)
        load(own.patcher)
        assert not any(p.is_inference() for p in own.cond_stage_model.parameters())
        assert conditioning(own, "a cat")[0].equal(before)
        with torch.no_grad():
            for p in own.cond_stage_model.parameters():
                p.zero_()
    assert conditioning(clip, "a cat")[0].equal(before)
