"""Style LoRA: layers, gradients of groups that pass together, and the file against what was trained, on every family."""

import importlib

import pytest
import torch

from harness.small_nets import denoiser, load, numbers, snapshot, unchanged

NAMES = ("SD1.5", "SD2", "SDXL", "SDXL, v", "SD3.5", "FLUX.1", "FLUX.2", "Qwen-Image", "Z-Image")


@pytest.fixture(params=NAMES)
def family(request, small_models):
    return importlib.import_module(f"{small_models.__name__}.families").FAMILIES[request.param]


@pytest.fixture
def setting(bridge, pack, family):
    """Shared MODEL, denoiser, network, conditioning of two captions, names of the layers, starting matrices of rank 2."""
    lora = pack.training.lora
    with torch.inference_mode():
        shared, clip = family.model(), family.clip()
    with bridge.training_mode():
        model, encoder = denoiser(bridge, shared), bridge.ComfyTextEncoder(bridge.private_clip(clip))
        network = model.base.diffusion_model
        with torch.no_grad():
            cond = encoder.encode(["a cat", "a red dog"], [{}] * 2)
            names = lora.layers_of_the_batch(
                network, lambda n: model.error(*batch(family, model, n), cond.expand([0] * n))
            )
        yield shared, model, network, encoder, names, lora.starting_matrices(network, names, 2, seed=1)


def batch(family, model, n: int = 2):
    sigma = model.sigmas(n, torch.Generator().manual_seed(3))
    return numbers(n, *family.latent), numbers(n, *family.latent, seed=2), sigma


def moved(start: dict, seed: int) -> dict:
    """Matrices as after some training; the ups are no longer 0."""
    return {k: t + numbers(*t.shape, seed=seed + i) * 0.05 for i, (k, t) in enumerate(start.items())}


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Zeros where nothing depends on a leaf: the text of Qwen-Image's last block reaches no picture."""
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def test_layers_are_found_and_nothing_changes_at_the_beginning(pack, family, setting):
    _, model, network, encoder, names, start = setting
    assert any("attn" in name or "attention" in name for name in names) and len(names) == len(set(names)) >= 10
    convolutions = [k for k, t in start.items() if t.ndim == 4]
    assert bool(convolutions) == any(isinstance(m, torch.nn.Conv2d) for m in network.modules())
    with torch.no_grad():
        cond = encoder.encode(["a cat"] * 2, [{}] * 2)
        plain = model.error(*batch(family, model), cond)
        with pack.training.lora.applied(network, [start]):
            assert torch.equal(model.error(*batch(family, model), cond), plain)
        with pack.training.lora.applied(network, [moved(start, 5)]):
            assert not torch.allclose(model.error(*batch(family, model), cond), plain, atol=1e-3)
        assert torch.equal(model.error(*batch(family, model), cond), plain), "the hooks are gone"


def test_groups_that_pass_together_get_the_gradients_of_separate_passes(pack, family, setting):
    _, model, network, encoder, _, start = setting
    x0, noise, sigma = batch(family, model, 4)
    groups = [{k: t.requires_grad_() for k, t in moved(start, seed).items()} for seed in (5, 900)]
    cond = encoder.encode(["a cat", "a red dog"] * 2, [{}] * 4)

    def losses(rows, given):
        with pack.training.lora.applied(network, given):
            error = model.error(x0[rows], noise[rows], sigma[rows], cond.expand(rows))
        return error.square().flatten(1).mean(1)

    leaves = [t for group in groups for t in group.values()]
    together = gradients(losses([0, 1, 2, 3], groups).sum(), leaves)
    half = len(groups[0])
    for g, rows in enumerate(([0, 1], [2, 3])):
        alone = gradients(losses(rows, [groups[g]]).sum(), list(groups[g].values()))
        scale = sum(t.square().sum() for t in alone).sqrt()
        gap = sum(
            (a - b).square().sum() for a, b in zip(together[g * half : (g + 1) * half], alone, strict=True)
        ).sqrt()
        assert scale > 0 and gap <= 1e-4 * scale


def test_checkpointed_gradients_are_the_gradients(pack, family, setting):
    """Of matrices inside the blocks, whose inputs ask for no gradient themselves."""
    _, model, network, encoder, _, start = setting
    cond = encoder.encode(["a cat", "a red dog"], [{}] * 2)

    def backward():
        leaves = {k: t.detach().clone().requires_grad_() for k, t in moved(start, 5).items()}
        with pack.training.lora.applied(network, [leaves]):
            model.error(*batch(family, model), cond).square().mean().backward()
        return {k: torch.zeros_like(t) if t.grad is None else t.grad for k, t in leaves.items()}

    want = backward()
    with pack.training.checkpointing.checkpointed(network, learned_inside=True):
        got = backward()
    scale = sum(g.square().sum() for g in want.values()).sqrt()
    gap = sum((want[k] - got[k]).square().sum() for k in want).sqrt()
    assert scale > 0 and gap <= 1e-5 * scale


def test_the_gradient_is_the_slope(pack, family, setting):
    _, model, network, encoder, _, start = setting
    x0, noise, sigma = batch(family, model)
    leaves = {k: t.requires_grad_() for k, t in moved(start, 5).items()}
    cond = encoder.encode(["a cat", "a red dog"], [{}] * 2)

    def loss(given):
        with pack.training.lora.applied(network, [given]):
            return model.error(x0, noise, sigma, cond).double().square().mean()

    gradient = dict(zip(leaves, gradients(loss(leaves), list(leaves.values())), strict=True))
    size = sum(g.square().sum() for g in gradient.values()).sqrt()
    with torch.no_grad():
        ends = [loss({k: t + sign * 2e-3 * gradient[k] / size for k, t in leaves.items()}) for sign in (1, -1)]
    assert ((ends[0] - ends[1]) / 4e-3).item() == pytest.approx(size.item(), rel=2e-2)


def test_the_file_does_through_core_what_training_did(bridge, pack, family, setting):
    """Core's loader on a fresh MODEL, against the hooks."""
    import comfy.sd

    shared, model, network, encoder, names, start = setting
    learned, named = moved(start, 5), pack.nodes.train_lora.named
    with torch.no_grad():
        cond = encoder.encode(["a cat", "a red dog"], [{}] * 2)
        before = model.error(*batch(family, model), cond)
        with pack.training.lora.applied(network, [learned]):
            trained = model.error(*batch(family, model), cond)
        changed, _ = comfy.sd.load_lora_for_models(bridge.private_model(shared), None, named(learned), 1.0, 0.0)
        assert len(changed.patches) == len(names)
        load(changed)
        used = bridge.ComfyDenoiser(changed).error(*batch(family, model), cond)
    assert (used - trained).abs().max() <= 1e-3 * (trained - before).abs().max()


def test_captions_of_different_lengths_are_what_each_is_by_itself(pack, family, setting):
    """In one batch of two groups, errors and gradients, against a pass for every picture; core too lets only texts of one
    length share a pass."""
    _, model, network, encoder, _, start = setting
    x0, noise, sigma = batch(family, model, 4)
    captions = ["a cat", "a red dog in a very green garden, under " + "a wide blue sky, " * 120] * 2
    trainer = pack.training.lora.StyleLora(
        model, network, lambda c: encoder.encode([c], [{}]), x0, [[c] for c in captions], start, pack.training.contrast.Settings(method="plain")
    )  # fmt: skip
    groups = [{k: t.requires_grad_() for k, t in moved(start, seed).items()} for seed in (5, 900)]
    leaves = [t for group in groups for t in group.values()]
    together = trainer.error(x0, noise, sigma, captions, groups)
    alone = torch.cat(
        [trainer.error(x0[[i]], noise[[i]], sigma[[i]], [captions[i]], [groups[i // 2]]) for i in range(4)]
    )
    assert len({trainer.known[c].states.shape[1] for c in captions}) == 2
    assert (together - alone).abs().max() <= 1e-4 * alone.abs().max()
    got, want = (gradients(e.square().mean(), leaves) for e in (together, alone))
    gap, scale = (
        sum(t.square().sum() for t in ts).sqrt() for ts in ([a - b for a, b in zip(got, want, strict=True)], want)
    )
    assert scale > 0 and gap <= 1e-4 * scale


@pytest.mark.parametrize("method", ["plain", "paper", "reference point"])
@pytest.mark.parametrize("together", [False, True])
def test_it_learns_and_the_model_stays_as_it_was(pack, family, setting, method, together):
    shared, model, network, encoder, _, start = setting
    before = snapshot(shared.model)
    contrast, lora = pack.training.contrast, pack.training.lora
    settings = contrast.Settings(method=method, steps=5, batch=2, learning_rate=0.01, together=together)
    positives, negatives = (numbers(3, *family.latent, seed=s) for s in (1, 4))
    trainer = lora.StyleLora(
        model, network, lambda c: encoder.encode([c], [{}]), positives, [["a cat"]] * 3, start, settings, negatives
    )
    said = [trainer.step(i) for i in range(5)]
    assert all(t.isfinite().all() for t in trainer.learned.values()) and said[-1]["norm"] > 0
    assert ("cosine" in said[0]) == (method != "plain") and len(trainer.known) == 1
    changes = {
        k: trainer.learned[k.replace(lora.DOWN, lora.UP)].flatten(1) @ trainer.learned[k].flatten(1)
        for k in start
        if k.endswith(lora.DOWN)
    }
    assert said[-1]["norm"] == pytest.approx(sum(c.square().sum() for c in changes.values()).sqrt().item(), rel=1e-3)
    assert unchanged(before, shared.model)
