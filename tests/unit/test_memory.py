"""What is said about memory before a training starts, against what the allocator sees during a step."""

import contextlib
import gc

import comfy.model_management
import pytest
import torch

from harness.allocated import peak


@pytest.fixture
def trainer(pack, bridge):
    """make(method, batch) -> a trainer on Pocket, inside training mode."""
    models = pack.nodes.pocket_models
    ti = pack.training.textual_inversion
    with bridge.training_mode():
        model, clip = bridge.private_model(models.load_model()), bridge.private_clip(models.load_clip())
        comfy.model_management.load_models_gpu([model, clip.patcher], force_full_load=True)
        latents = torch.randn(12, 4, 16, 16, generator=torch.Generator().manual_seed(1))

        def make(method, batch):
            captions = [["a picture in the style of {token}"]] * len(latents)
            return ti.TextualInversion(
                bridge.ComfyDenoiser(model), bridge.ComfyTextEncoder(clip), latents, captions,
                bridge.starting_vectors(clip, "picture", 1), ti.Settings(method=method, batch=batch), latents.flip(0),
            )  # fmt: skip

        yield make


def test_remembered_counts_what_backward_needs(pack):
    x = torch.rand(1000, requires_grad=True)
    remembered = pack.training.memory.remembered
    assert remembered(lambda: (x * x).exp().sum()).fast == 2 * x.nbytes  # x once, and exp's own result
    assert remembered(lambda: x[:10].sin()).fast == x.nbytes  # a view keeps the whole
    assert remembered(lambda: x.detach().sin()) == (0, 0)


def test_counting_keeps_nothing(pack, trainer):
    """A step that gives what it keeps (exp, a norm) held itself alive for ever: on SDXL that is gigabytes for each training."""
    training = trainer("paper", 1)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before = alive()
    training.memory_per_picture()
    assert alive() == before


@pytest.mark.parametrize("method", ["plain", "reference point"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("way", ["fast", "lean"])
def test_the_estimate_is_what_a_step_takes(pack, trainer, method, batch, way):
    """A twentieth to a third more than the peak, never less."""
    training, checkpointing = trainer(method, batch), pack.training.checkpointing
    networks = training.denoiser.base.diffusion_model, training.encoder.clip.cond_stage_model
    training.step(0)
    kept = training.memory_per_picture([b for network in networks for b in checkpointing.blocks(network)])
    with checkpointing.checkpointed(*networks) if way == "lean" else contextlib.nullcontext():
        took = peak(lambda: training.step(1))
    said = getattr(kept, way) * batch
    assert took < said < 1.35 * took
    assert kept.lean < 0.6 * kept.fast


def test_the_estimate_changes_nothing(trainer):
    asked, not_asked = trainer("reference point", 2), trainer("reference point", 2)
    asked.memory_per_picture()
    for training in (asked, not_asked):
        training.step(0)
    assert torch.equal(asked.vectors["clip_l"], not_asked.vectors["clip_l"])
