"""Public priors from local files: Kandinsky 2.1 and 2.2, Karlo (as diffusers saves it and as it was published), ECLIPSE.

They whiten: the network works on (embedding - mean) / std of its CLIP, in diffusers' files `clip_mean` and `clip_std`. Both families
were trained to say the clean embedding under the cosine schedule of 1000 levels. Nothing is fetched, and no code of a file is run.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from .. import artefact
from .network import PriorNetwork, Shape, empty

Tensors = dict[str, torch.Tensor]
SPACES = {  # which CLIP an embedding of this many numbers belongs to, in public priors
    768: "openai/clip-vit-large-patch14",
    1280: "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}
NAMES = [f"diffusion_pytorch_model{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")]
AUTHORS = "model_state.th"  # of Shifted Diffusion's authors, beside their mean.pth and std.pth; known only to be named
HEADS = {2048: 32, 512: 16}  # by width, where no config.json says: Kandinsky's and Karlo's, ECLIPSE's
TEXT_LENGTH = 77
CLAMP = 10.0  # of what the network says, whitened, where no file says: as in the code of Kandinsky and of Karlo
STEPS, GUIDANCE = 25, 4.0  # what both families sample with
KARLO_CHANNELS = 64  # of each head
USE = "use the prior of Kandinsky 2.2 (for SDXL), of Karlo or Kandinsky 2.1 (for SD 2.1 unCLIP), or train one with Train Prior"
THREE_CLIPS = "embeddings of three CLIPs together (1536 numbers), which no model of ComfyUI takes:"
STRANGERS = {  # part of a tensor's name: what the file is
    "clip_sentence_proj.": f"the prior of Shifted Diffusion's authors: it makes {THREE_CLIPS}",
    "causal_transformer.": "a prior of DALLE2-PyTorch, whose network and lengths of embeddings are others:",
    "embedding_proj_norm.": "a PriorTransformer with parts that no prior of CLIP embeddings has:",
    "norm_in.": "Shap-E's prior, which makes shapes and no CLIP embeddings:",
    "padding_embedding": "a Karlo prior that was trained with padding embeddings, which the published one was not:",
    "down_blocks.": "a UNet and no prior:",
    "input_blocks.": "a model that paints pictures and no prior:",
}


@dataclass(frozen=True)
class PublicPrior:
    network: PriorNetwork  # in the precision of its file, without gradients
    mean: torch.Tensor  # (dim) float32: an embedding is mean + std * what the network says
    std: torch.Tensor
    clamp: float  # what the network says is kept in -clamp..clamp; 0 is free
    schedule: str  # a name of process.SCHEDULES
    guidance: float  # what its authors sample with
    one_shot: bool  # ECLIPSE: one evaluation of pure noise answers
    space: str  # the CLIP it makes embeddings of
    facts: dict[str, str]  # to be shown


def load_public(path: Path) -> PublicPrior:
    """A prior from a folder or a weights file. Raises ValueError, one sentence, for what is not understood."""
    file = weights_file(Path(path))
    state, metadata = read_weights(file)
    _refuse_strangers(state, file)
    config = _json(file.with_name("config.json"))
    if original := any(name.endswith("clip_img_proj.weight") for name in state):
        state = from_karlo(state) | _karlo_statistics(file)
        config = config or {
            "attention_head_dim": KARLO_CHANNELS,
            "num_attention_heads": len(state["proj_in.bias"]) // 64,
        }
    said_mean, said_std = (state.pop(name, None) for name in ("clip_mean", "clip_std"))
    shape = shape_of(state, config, metadata, file)
    network = _built(shape, state, file)
    clamp, why = _clamp(file) if shape.time else (0.0, "none")
    mean, std = _statistics(said_mean, said_std, shape, file)
    return PublicPrior(
        network, mean, std, clamp, "cosine", GUIDANCE if shape.time else 1.0, not shape.time,
        SPACES.get(shape.dim, f"an unknown CLIP of {shape.dim} numbers"), _facts(network, file, original, clamp, why),
    )  # fmt: skip


def _facts(network: PriorNetwork, file: Path, original: bool, clamp: float, why: str) -> dict[str, str]:
    shape, weight = network.shape, network.proj_in.weight
    family = {768: "Karlo" if original or clamp == 5 else "Kandinsky 2.1", 1280: "Kandinsky 2.2"}.get(
        shape.dim, "unknown"
    )
    return {
        "family": family if shape.time else "ECLIPSE",
        "file": f"{file.name}, {'as Karlo was published' if original else 'as diffusers saves it'}",
        "size": f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters in {str(weight.dtype).removeprefix('torch.')}: "
        f"{shape.layers} layers, {shape.heads} heads, width {shape.width}",
        "embedding": f"{shape.dim} numbers",
        "statistics": "whitened by the file's mean and standard deviation"
        if shape.time
        else "none: its answers are not whitened",
        "clamp": why,
        "as published": f"{STEPS} steps, guidance {GUIDANCE:g}" if shape.time else "1 evaluation, no guidance",
    }


# Which file, and what is in it


def weights_file(path: Path) -> Path:
    """The weights in a folder of diffusers (the prior's own, or a pipeline's with `prior/` in it), of Karlo's, or the file itself."""
    if path.is_file():
        return path
    for folder in (path / "prior", path):
        for name in (*NAMES, AUTHORS):
            if (folder / name).is_file():
                return folder / name
    found = sorted(path.glob("prior*.ckpt"))
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"{path.name} is no prior: such a folder has {NAMES[0]} and config.json in it or in its folder prior, or Karlo's prior-ckpt-*.ckpt."
    )


def read_weights(file: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a file by name, and its metadata. Legacy files are read without unpickling code."""
    try:
        if file.suffix == artefact.SUFFIX:
            return artefact.read(file)
        held = _load(file)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file.name} cannot be read: it is broken, or holds more than tensors, which might be code. Fetch it again, or save its tensors "
            "as .safetensors."
        ) from error
    if isinstance(held, torch.Tensor):
        raise ValueError(
            f"{file.name} is one table of numbers and no network, as the clusters of Shifted Diffusion's authors, which are for {THREE_CLIPS} "
            f"{USE}; Fit Start Distribution finds clusters of your own pairs."
        )
    state = held.get("state_dict", held) if isinstance(held, dict) else {}
    return {str(name): t for name, t in state.items() if isinstance(t, torch.Tensor)}, {}


def _load(file: Path):
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _refuse_strangers(state: Tensors, file: Path) -> None:
    for part, what in STRANGERS.items():
        if any(part in name for name in state):
            raise ValueError(f"{file.name} is {what} {USE}.")


def _json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.parent.name}/{file.name} is broken ({error}): fetch it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file.parent.name}/{file.name} is not a configuration: fetch it again.")
    return content


# The network


def shape_of(state: Tensors, config: dict, metadata: dict[str, str], file: Path) -> Shape:
    """From the tensors themselves; heads leave no trace in them and are read from config.json or the file's metadata."""
    if said := config.get("_class_name"):
        if said != "PriorTransformer":
            raise ValueError(f"{file.name} lies beside the config.json of a {said}, which is no prior: {USE}.")
    needed = (
        "proj_in.weight",
        "embedding_proj.weight",
        "encoder_hidden_states_proj.weight",
        "positional_embedding",
        "prd_embedding",
    )
    if lost := next((name for name in needed if name not in state), None):
        raise ValueError(f"{file.name} is no prior that is known here, as it has no {lost}: {USE}.")
    width, dim = state["proj_in.weight"].shape
    time = any(name.startswith("time_embedding.") for name in state)
    length = state["positional_embedding"].shape[1] - (4 if time else 3)
    if length != TEXT_LENGTH:
        raise ValueError(
            f"{file.name} has {state['positional_embedding'].shape[1]} places and needs {TEXT_LENGTH + (4 if time else 3)}, as its texts have "
            f"{TEXT_LENGTH}; priors that read pictures too, as Lambda-ECLIPSE, are not read here: {USE}."
        )
    numbers = [int(found[1]) for name in state if (found := re.match(r"transformer_blocks\.(\d+)\.", name))]
    return Shape(
        dim, state["embedding_proj.weight"].shape[1], state["encoder_hidden_states_proj.weight"].shape[1], width,
        max(numbers, default=-1) + 1, _heads(width, config, metadata, file), length, time,
    )  # fmt: skip


def _heads(width: int, config: dict, metadata: dict[str, str], file: Path) -> int:
    if config:
        heads, channels = config.get("num_attention_heads") or 32, config.get("attention_head_dim") or 64
        if heads * channels != width:
            raise ValueError(
                f"The config.json beside {file.name} speaks of {heads} heads of {channels} channels, and the file is {width} wide: they do not "
                "belong together; copy both from one folder."
            )
        return heads
    heads = int(metadata["heads"]) if metadata.get("heads", "").isdecimal() else HEADS.get(width)
    if not heads:
        raise ValueError(
            f"Nothing says how many heads {file.name} has: put the config.json that belongs to it beside it."
        )
    return heads


def _built(shape: Shape, state: Tensors, file: Path) -> PriorNetwork:
    """The network with exactly these tensors."""
    network = empty(shape)
    own = {name: t.shape for name, t in network.state_dict().items()}
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is one too many" for name in state if name not in own]
    wrong += [
        f"{name} is {tuple(state[name].shape)} and not {tuple(size)}"
        for name, size in own.items()
        if name in state and state[name].shape != size
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{file.name} does not fit its own shape, {wrong[0]}{more}: fetch it again, or {USE}.")
    if not all(t.is_floating_point() and t.element_size() > 1 for t in state.values()):
        raise ValueError(
            f"{file.name} holds weights of less than 16 bits, which are not read here: fetch it in fp16 or fp32."
        )
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


# What lies beside the network


def _statistics(mean, std, shape: Shape, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(dim) each. ECLIPSE's pipeline leaves its answers as they are, and its files may hold a standard deviation of zero."""
    if not shape.time:
        return torch.zeros(shape.dim), torch.ones(shape.dim)
    both = [t.float().flatten() for t in (mean, std) if t is not None]
    whole = len(both) == 2 and all(len(t) == shape.dim and bool(t.isfinite().all()) for t in both)
    if not whole or not bool((both[1] > 0).all()):
        raise ValueError(
            f"{file.name} has no statistics of its CLIP (clip_mean and clip_std are missing, zero or of another size), without which its "
            "answers have the wrong size: take the file from the published prior."
        )
    return both[0].clone(), both[1].clone()


def _clamp(file: Path) -> tuple[float, str]:
    """How far from 0 the network's answer may be (0: as far as it likes), and who says so. Raises ValueError where the process is another."""
    pipeline = file.parent.parent if file.parent.name == "prior" else file.parent
    for folder in ("prior_scheduler", "scheduler"):
        if config := _json(pipeline / folder / "scheduler_config.json"):
            break
    else:
        return CLAMP, f"{CLAMP:g}, as in its authors' code, since no scheduler_config.json lies beside it"
    expected = {
        "prediction_type": ("sample", "epsilon"),
        "beta_schedule": ("squaredcos_cap_v2",) * 2,
        "num_train_timesteps": (1000, 1000),
    }
    for name, (wanted, default) in expected.items():
        if (said := config.get(name, default)) != wanted:
            raise ValueError(
                f"{folder}/scheduler_config.json beside {file.name} has {name} = {said!r}, and a prior's is {wanted!r}: copy the one that "
                "belongs to it."
            )
    if not config.get("clip_sample", True):
        return 0.0, f"none, from {folder}/scheduler_config.json"
    clamp = float(config.get("clip_sample_range", 1.0))
    return clamp, f"{clamp:g}, from {folder}/scheduler_config.json"


# Karlo as it was published

KARLO = {
    "clip_img_proj": "proj_in", "text_emb_proj": "embedding_proj", "text_enc_proj": "encoder_hidden_states_proj",
    "prd_emb": "prd_embedding", "positional_embedding": "positional_embedding", "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2", "final_ln": "norm_out", "out_proj": "proj_to_clip_embeddings",
}  # fmt: skip
KARLO_LAYER = {
    "ln_1": "norm1", "ln_2": "norm3", "attn.c_proj": "attn1.to_out.0", "mlp.c_fc": "ff.net.0.proj", "mlp.c_proj": "ff.net.2",
}  # fmt: skip


def from_karlo(state: Tensors) -> Tensors:
    """Karlo's tensors under diffusers' names. Its queries, keys and values are one matrix, interleaved by head."""
    renamed: Tensors = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        part, dot, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", part)
        if layer and layer[2] == "attn.c_qkv":
            split = tensor.unflatten(0, (-1, 3, KARLO_CHANNELS)).unbind(1)
            for to, matrix in zip("qkv", split, strict=True):
                renamed[f"transformer_blocks.{layer[1]}.attn1.to_{to}.{kind}"] = matrix.flatten(0, 1).contiguous()
        elif layer:
            renamed[f"transformer_blocks.{layer[1]}.{KARLO_LAYER.get(layer[2], layer[2])}.{kind}"] = tensor
        else:
            renamed[KARLO.get(part, part) + dot + kind] = tensor
    return renamed


def _karlo_statistics(file: Path) -> Tensors:
    """`clip_mean` and `clip_std`, which Karlo published as a file of its own."""
    found = sorted(file.parent.glob("*stats*.th"))
    if len(found) != 1:
        raise ValueError(
            f"{file.name} is Karlo's original prior, whose statistics are a file of their own: put ViT-L-14_stats.th, and no other such file, "
            "beside it."
        )
    both = _tensors_of(found[0])
    if len(both) != 2:
        raise ValueError(
            f"{found[0].name} does not hold two tensors, mean and standard deviation: fetch ViT-L-14_stats.th again."
        )
    return dict(zip(("clip_mean", "clip_std"), both, strict=True))


def _tensors_of(file: Path) -> list[torch.Tensor]:
    """The tensors of a legacy file that holds one, or several in a row."""
    try:
        held = _load(file)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{file.name} cannot be read: it is missing, broken, or holds more than tensors, which might be code."
        ) from error
    held = held if isinstance(held, (tuple, list)) else [held]
    return [t for t in held if isinstance(t, torch.Tensor)]
