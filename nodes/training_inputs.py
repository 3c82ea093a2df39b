"""What every training node asks for and gives. The order of inputs is that of values in saved graphs."""

from __future__ import annotations

from comfy_api.latest import io

from ..training.contrast import METHODS
from ..training.losses import WEIGHTINGS
from .bridge import TOKEN

CAPTION_USES = ("auto", "template", "caption", "dropout")
MEMORY = ("auto", "fast", "lean")
RECOMMENDED = "recommended"


def picture_inputs(learns: str) -> list:
    """Models, pictures, captions, negatives, and the method."""
    return [
        io.Model.Input("model", tooltip=f"The model that learns {learns}; it is not changed. 1 model."),
        io.Clip.Input("clip", tooltip="From the same checkpoint; it is not changed."),
        io.Vae.Input("vae", tooltip="From the same checkpoint."),
        io.Image.Input("images", tooltip="Pictures in the style: 12 to 24 are enough, 1 is the least."),
        io.String.Input(
            "captions",
            force_input=True,
            optional=True,
            tooltip="What is in each picture, 1 caption each, without its style.",
        ),
        io.Image.Input("negatives", optional=True, tooltip="From Negative Set: 1 for each picture, in the same order."),
        io.Combo.Input(
            "method",
            options=[*METHODS, RECOMMENDED],
            default="plain",
            tooltip="plain: textual inversion, negatives (0 of them needed) are not used. paper: NSYNC as published, g+ minus its part along g-. "
            "reference point: the negative gradient is taken where the word began and removed where both agree. recommended: what did "
            "best in 105 measured runs: plain with captions, paper where there are negatives and 1 sentence for all; the report says which.",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="How much of what is shared with the negatives is removed; 0 is plain.",
        ),
    ]


def caption_inputs() -> list:
    return [
        io.String.Input(
            "template",
            default=f"a picture in the style of {TOKEN}",
            tooltip="The caption it learns with; {token} must stand in it once (1 time).",
        ),
        io.Combo.Input(
            "caption_use",
            options=list(CAPTION_USES),
            default="auto",
            tooltip="caption: your captions before 'in the style of {token}', so that the word need not say what is in the pictures. "
            "template: the template alone. dropout: either, half (50 %) of the time each. auto: caption for the method plain where "
            "there are captions, template for contrast, to which complete captions leave nothing to teach.",
        ),
    ]


def time_inputs(rate: str, snapshots: int) -> list:
    """How long and how fast; `rate` says what a learning rate of 0 takes, `snapshots` how often one is kept."""
    return [
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=20000,
            tooltip="0 takes what suits the model: 200 for Pocket (about 1 minute on two cores), 1000 for SD 1.5, SD 2 and SDXL, "
            "1500 for SD 3, FLUX, Qwen-Image and Z-Image.",
        ),
        io.Int.Input(
            "batch",
            default=8,
            min=1,
            max=64,
            tooltip="Pictures per step, and as many negatives; 8 is plenty. Made smaller if memory is short.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.0001,
            round=0.00001,
            tooltip=rate,
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31,
            control_after_generate=False,
            tooltip="Another seed, another run: 0 and up.",
        ),
        io.Int.Input(
            "preview_every",
            default=50,
            min=0,
            max=10000,
            advanced=True,
            tooltip="Steps between preview pictures; 0 for none.",
        ),
        io.Int.Input(
            "snapshot_every",
            default=snapshots,
            min=0,
            max=10000,
            advanced=True,
            tooltip="Steps between snapshots kept in the run's folder, for Snapshot Grid to choose from; 0 for none.",
        ),
    ]


def last_inputs() -> list:
    return [
        io.Combo.Input(
            "weighting",
            options=list(WEIGHTINGS),
            default="low frequencies",
            advanced=True,
            tooltip="Which noise levels count: low frequencies learns palette and paper too (weights up to 10); min-SNR 5 is the usual; uniform is all alike.",
        ),
        io.Int.Input(
            "size",
            default=0,
            min=0,
            max=4096,
            step=8,
            advanced=True,
            tooltip="Pixels of the square that is trained on; 0 takes the model's own.",
        ),
        io.String.Input(
            "run",
            default="",
            advanced=True,
            tooltip="Folder under output/counterpoint for checkpoints and the log; empty makes one from the settings (8 characters of their hash).",
        ),
    ]


def later_inputs() -> list:
    """Optional, so that prompts saved before they were there still run."""
    return [
        io.Mask.Input(
            "masks",
            optional=True,
            tooltip="White where the pictures teach, black where they do not: 1 for each picture, or 1 for all.",
        ),
        io.Boolean.Input(
            "mirror",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Learn from each picture and its mirror image (2 for 1), and so with its negative: not for lettering or faces.",
        ),
        io.Combo.Input(
            "memory",
            options=list(MEMORY),
            default="auto",
            optional=True,
            advanced=True,
            tooltip="fast keeps what each step computes. lean computes it a second time (gradient checkpointing): a third slower, with a "
            "fraction of the memory. auto: lean only where the batch would not fit. The result is the same.",
        ),
    ]


def loss_outputs() -> list:
    return [
        io.LossMap.Output(
            display_name="loss_map", tooltip="For core's Plot Loss Graph; a mean over the last 20 steps at each point."
        ),
        io.String.Output(display_name="report", tooltip="What was done, in a few lines."),
        io.String.Output(
            display_name="run", tooltip="Name of the run's folder under output/counterpoint: to Snapshot Grid."
        ),
    ]
