"""Core's ControlNet for the small SD 1.5, weights drawn from a seed."""

import torch


def controlnet(builders, hint: torch.Tensor, seed: int = 3):
    """As Apply ControlNet gives it to a conditioning; `hint` (n, 3, H, W), 0..1, a picture for each row."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management
    import comfy.ops

    unlike = ("out_channels", "use_temporal_attention", "use_temporal_resblock")
    config = {k: v for k, v in builders.SD15_UNET.items() if k not in unlike}
    with torch.inference_mode():
        body = comfy.cldm.cldm.ControlNet(
            **config, num_heads=2, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init
        )
        builders.draw_weights(body, seed)
        made = comfy.controlnet.ControlNet(body, load_device=comfy.model_management.get_torch_device())
    return made.copy().set_cond_hint(hint, 0.8, (0.0, 1.0))


def controlled(conditioning: list, control) -> list:
    """The conditioning with it, as Apply ControlNet (Advanced) does for each of both prompts."""
    return [[states, {**facts, "control": control, "control_apply_to_uncond": False}] for states, facts in conditioning]
