"""Models in 8 and 16 bit, quantised, merged and patched: what is trained through them is what they are."""

import functools

import pytest
import torch

from harness.small_nets import load, numbers

PRECISIONS = ("bf16", "fp8", "scaled fp8")


@pytest.fixture(params=["SD1.5", "FLUX.1"])
def family(request, small_models):
    families = small_models.families
    build = functools.partial(families._model, small_models.builders.SmallSD15, small_models.builders.SD15_UNET, {})
    found = families.FAMILIES[request.param]
    return found._replace(model=build) if request.param == "SD1.5" else found


@pytest.fixture
def clip(family):
    with torch.inference_mode():
        return family.clip()


@pytest.fixture
def prepare(bridge, pack, family, clip):
    """A function of a MODEL: denoiser, text encoder, starting vectors and starting matrices of private copies. Call it under
    training mode."""

    def prepare(shared):
        own, text = bridge.private_model(shared), bridge.private_clip(clip)
        load(own)
        model, encoder, lora = bridge.ComfyDenoiser(own), bridge.ComfyTextEncoder(text), pack.training.lora
        network = model.base.diffusion_model
        with torch.no_grad():
            cond = encoder.encode(["a cat"], [{}])
            names = lora.layers_of_the_batch(
                network, lambda n: model.error(*batch(family, model, n), cond.expand([0] * n))
            )
        matrices = lora.starting_matrices(network, names, 2, seed=1)
        return model, encoder, bridge.starting_vectors(text, "red dog", 2), matrices

    return prepare


def shared_model(family, precision: str):
    with torch.inference_mode():
        return family.model(precision=precision)


def batch(family, model, n: int = 2):
    sigma = model.sigmas(n, torch.Generator().manual_seed(3))
    return numbers(n, *family.latent), numbers(n, *family.latent, seed=2), sigma


def losses(pack, family, model, encoder, start: dict, matrices: dict):
    """Of a word's vectors, and of a LoRA's matrices: where they are taken, and the loss as a function of them."""
    given, cond = batch(family, model), encoder.encode(["a cat"] * 2, [{}] * 2)
    moved = {k: t + numbers(*t.shape, seed=i) * 0.05 for i, (k, t) in enumerate(matrices.items())}

    def of_word(vectors):
        return model.error(*given, encoder.encode(["a {token} cat"] * 2, [vectors] * 2)).double().square().mean()

    def of_lora(leaves):
        with pack.training.lora.applied(model.base.diffusion_model, [leaves]):
            return model.error(*given, cond).double().square().mean()

    return (start, of_word), (moved, of_lora)


def slope_and_gradient(start: dict, loss, step: float = 2e-3) -> tuple[float, float]:
    leaves = {k: t.clone().requires_grad_() for k, t in start.items()}
    gradient = dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))
    size = sum(g.square().sum() for g in gradient.values()).sqrt()
    with torch.no_grad():
        ends = [loss({k: t + sign * step * gradient[k] / size for k, t in start.items()}) for sign in (1, -1)]
    return ((ends[0] - ends[1]) / (2 * step)).item(), size.item()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gradient_is_the_slope(bridge, pack, family, prepare, precision):
    """As close as with weights of 32 bit: they are rounded once and for all, and what is computed with them is not."""
    shared = shared_model(family, precision)
    before = stored(shared.model)
    with bridge.training_mode():
        for start, loss in losses(pack, family, *prepare(shared)):
            slope, gradient = slope_and_gradient(start, loss)
            assert gradient > 0 and slope == pytest.approx(gradient, rel=2e-2)
    after = stored(shared.model)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def stored(module) -> dict[str, torch.Tensor]:
    """The bytes of every weight, scaled ones included."""
    return {
        k: t.detach().contiguous().view(torch.uint8).clone() if t.ndim else t.clone()
        for k, t in module.state_dict().items()
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_lora_changes_the_same_layers_in_every_precision(bridge, family, prepare, precision):
    full, other = (shared_model(family, p) for p in ("fp32", precision))
    with bridge.training_mode():
        shapes = [{k: t.shape for k, t in prepare(shared)[3].items()} for shared in (full, other)]
    assert shapes[0] == shapes[1] and any(len(shape) == 2 for shape in shapes[0].values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_has_a_fingerprint_of_its_own(identity, family, precision):
    with torch.inference_mode():
        one, same, other = (identity.fingerprint(family.model(seed=seed, precision=precision)) for seed in (0, 0, 1))
        assert one == same and len({one, other, identity.fingerprint(family.model(precision="fp32"))}) == 3


@pytest.mark.parametrize("precision, rounding", [("bf16", 0.03), ("fp8", 0.4), ("scaled fp8", 0.4)])
def test_the_file_does_through_core_what_training_did(bridge, pack, family, prepare, precision, rounding):
    """Core adds the file to the weights and rounds the sum to their precision, so it arrives within the size of that rounding (0.012
    of the change for bf16, 0.12 to 0.27 for 8 bit, measured). Core's bypass adds it to what the layers give, itself rounded to 16 bit at most."""
    import comfy.sd

    shared = shared_model(family, precision)
    with bridge.training_mode(), torch.no_grad():
        model, encoder, _, matrices = prepare(shared)
        moved = {k: t + numbers(*t.shape, seed=i) * 0.1 for i, (k, t) in enumerate(matrices.items())}
        given = *batch(family, model), encoder.encode(["a cat"] * 2, [{}] * 2)
        before = model.error(*given)
        with pack.training.lora.applied(model.base.diffusion_model, [moved]):
            trained = model.error(*given)
        file, own = pack.nodes.train_lora.named(moved), bridge.private_model(shared)
        bypass, _ = comfy.sd.load_bypass_lora_for_models(own, None, file, 1.0, 0.0)
        load(bypass)
        bypass.inject_model()
        beside = bridge.ComfyDenoiser(bypass).error(*given)
        bypass.eject_model()
        changed, _ = comfy.sd.load_lora_for_models(own, None, file, 1.0, 0.0)
        assert len(changed.patches) == len(matrices) // 2
        load(changed)
        used = bridge.ComfyDenoiser(changed).error(*given)
    change = (trained - before).norm()
    assert (used - trained).norm() <= rounding * change and (beside - trained).norm() <= 5e-3 * change


def test_bf16_never_skips_a_step_and_nothing_moves_but_what_is_learned(bridge, pack, family, clip, prepare):
    """C12 and C6: 200 steps of a word (SD 1.5) or a LoRA (FLUX.1); every weight, also of the copies that are trained through and of
    the tables of words, is bit for bit what it was."""
    shared, settings = shared_model(family, "bf16"), pack.training.contrast.Settings
    with bridge.training_mode():
        model, encoder, start, matrices = prepare(shared)
        held = (shared.model, clip.cond_stage_model, model.base, encoder.clip.cond_stage_model)
        before = [stored(module) for module in held]
        pictures, negatives = numbers(3, *family.latent), numbers(3, *family.latent, seed=4)
        how = settings(method="reference point", steps=200, batch=1, learning_rate=0.001)
        if family.says == "EPS":
            kind, captions = pack.training.textual_inversion.TextualInversion, [["a {token}"]] * 3
            trainer = kind(model, encoder, pictures, captions, start, how, negatives)
        else:
            kind, network = pack.training.lora.StyleLora, model.base.diffusion_model
            encode, captions = lambda c: encoder.encode([c], [{}]), [["a cat"]] * 3
            trainer = kind(model, network, encode, pictures, captions, matrices, how, negatives)
        said = [trainer.step(i) for i in range(200)]
    assert said[-1]["skipped"] == 0
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in trainer.learned.values())
    for module, was in zip(held, before, strict=True):
        assert all(torch.equal(t, was[k]) for k, t in stored(module).items())
    assert any(k.endswith("token_embedding.weight") for k in before[1])


def test_a_merged_model_is_trained_through_as_what_it_is(bridge, pack, family, prepare):
    """Core's merge of two models with a LoRA on top, against a model whose weights are really those."""
    import comfy.sd
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    lora = pack.training.lora
    with torch.inference_mode():
        one, two, real = (family.model(seed=seed) for seed in (0, 1, 0))
    with bridge.training_mode():
        matrices = prepare(one)[3]
    up_down = {k: t + numbers(*t.shape, seed=i) * 0.1 for i, (k, t) in enumerate(matrices.items())}
    with torch.inference_mode():
        (merged,) = ModelMergeSimple().merge(one, two, 0.3)
        merged, _ = comfy.sd.load_lora_for_models(merged, None, pack.nodes.train_lora.named(up_down), 0.5, 0.0)
        other = dict(two.model.diffusion_model.named_parameters())
        for name, weight in real.model.diffusion_model.named_parameters():
            weight.mul_(0.3).add_(other[name], alpha=0.7)
            layer = name.removesuffix(".weight")
            if layer + lora.UP in up_down:
                change = up_down[layer + lora.UP].flatten(1) @ up_down[layer + lora.DOWN].flatten(1)
                weight.add_(change.view_as(weight), alpha=0.5)
        real.cached_patcher_init = None  # which would build a model of the seed again
    found = []
    with bridge.training_mode():
        for shared in (merged, real, one):
            for start, loss in losses(pack, family, *prepare(shared)):
                leaves = [t.clone().requires_grad_() for t in start.values()]
                gradient = torch.autograd.grad(loss(dict(zip(start, leaves, strict=True))), leaves)
                found.append(torch.cat([g.flatten() for g in gradient]))
    for of_merged, of_real, of_one in zip(*(found[i : i + 2] for i in (0, 2, 4)), strict=True):
        assert (of_merged - of_real).norm() <= 1e-3 * of_real.norm() and (
            of_one - of_real
        ).norm() > 0.1 * of_real.norm()


class GGMLTensor(torch.Tensor):
    """Packed numbers as ComfyUI-GGUF's loaders give them: bytes that know their own type and the shape they stand for."""

    def __new__(cls, data, tensor_type, tensor_shape):
        made = torch.Tensor._make_subclass(cls, data)
        made.tensor_type, made.tensor_shape = tensor_type, tensor_shape
        return made

    def detach(self):
        return self


def test_gguf_is_refused_by_name(bridge, family, clip):
    """Both MODEL and CLIP, in one sentence that says what to load instead."""
    shared = shared_model(family, "fp32")
    for patcher, what in ((shared, "MODEL"), (clip.patcher, "CLIP")):
        layer = next(m for m in patcher.model.modules() if isinstance(m, torch.nn.Linear))
        packed = GGMLTensor(torch.zeros(18, dtype=torch.uint8), 2, layer.weight.shape)
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
        with pytest.raises(ValueError, match=f"This {what} was loaded from a GGUF file, .*safetensors"):
            bridge.check_trainable(patcher, what)


def test_a_lora_in_bypass_mode_is_refused_by_name(bridge, family, clip):
    """Core hangs it on the layers that all clones share, where a private copy would miss it."""
    import comfy.sd

    shared = shared_model(family, "fp32")
    bridge.check_trainable(shared, "MODEL")
    name, layer = next((n, m) for n, m in shared.model.named_modules() if isinstance(m, torch.nn.Linear))
    out, inside = layer.weight.shape
    lora = {f"{name}.lora_down.weight": torch.ones(1, inside), f"{name}.lora_up.weight": torch.ones(out, 1)}
    bypassed, _ = comfy.sd.load_bypass_lora_for_models(shared, None, lora, 1.0, 0.0)
    with pytest.raises(
        ValueError, match="This MODEL has a LoRA on it that was loaded in bypass mode.*Load LoRA instead"
    ):
        bridge.check_trainable(bypassed, "MODEL")
