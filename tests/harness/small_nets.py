"""Small models patched, loaded, read and compared, for tests of the bridge."""

import torch


def as_kind(model, kind: str):
    """What core's ModelSamplingDiscrete node does."""
    from comfy.model_base import ModelType, model_sampling

    with torch.inference_mode():
        clone = model.clone()
        clone.add_object_patch("model_sampling", model_sampling(model.model.model_config, ModelType[kind]))
    return clone


def with_lora(model, strength: float = 1.0, amount: float = 0.1, key: str = "diffusion_model.out.2.weight"):
    with torch.inference_mode():
        clone = model.clone()
        assert clone.add_patches({key: ("diff", (torch.full_like(clone.model.state_dict()[key], amount),))}, strength)
    return clone


def load(*patchers):
    import comfy.model_management

    comfy.model_management.load_models_gpu(list(patchers), force_full_load=True)


def denoiser(bridge, model):
    own = bridge.private_model(model)
    load(own)
    return bridge.ComfyDenoiser(own)


def numbers(*shape, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def snapshot(module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def unchanged(before: dict[str, torch.Tensor], module) -> bool:
    after = module.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def conditioning(clip, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Through core's CLIPTextEncode."""
    import nodes

    with torch.no_grad():
        ((states, facts),) = nodes.CLIPTextEncode().encode(clip, text)[0]
    return states, facts["pooled_output"]
