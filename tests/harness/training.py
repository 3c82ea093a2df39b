"""Prompts that train on the small SD1.5, and what came of them."""

import comfy.model_management
import nodes
import torch


def node(class_type: str, **inputs) -> dict:
    """A node of a prompt, what is not given at its default."""
    schema = getattr(nodes.NODE_CLASS_MAPPINGS[class_type], "GET_SCHEMA", None)  # core's older nodes have none
    known = schema().inputs if schema else []
    defaults = {i.id: i.default for i in known if getattr(i, "default", None) is not None}
    return {"class_type": class_type, "inputs": {**defaults, **inputs}}


def prompt(**inputs) -> dict[str, dict]:
    """1 models, 2 three pictures, 3 three negatives, 4 training, 5 the loss plot."""
    given = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], "captions": ["2", 1], "negatives": ["3", 0],
        "method": "reference point", "size": 64, "steps": 6, "batch": 2, "preview_every": 0, "vectors": 2, "start": "red cat", **inputs,
    }  # fmt: skip
    pictures = {"count": 3, "captions": "content"}
    return {
        "1": node("SmallModelsLoadSD15"),
        "2": node("CounterpointPocketPictures", **pictures, style="comic"),
        "3": node("CounterpointPocketPictures", **pictures, style="photo", seed=2),
        "4": node("CounterpointTrainEmbedding", **{k: v for k, v in given.items() if v is not None}),
        "5": node("LossGraphNode", loss=["4", 1]),
    }


def vectors(run, id: str = "4") -> torch.Tensor:
    return run.value(id).vectors["clip_l"]


def steps(run) -> list[int]:
    return [said["step"] for said in run.sent("counterpoint.progress")]


def at_step(step: int, do):
    """An on_event that does something once, when a step is reported."""
    done = []

    def on_event(name, data):
        if name == "counterpoint.progress" and data["step"] == step and not done:
            done.append(step)
            do()

    return on_event


def one_sentence(run, *words: str) -> None:
    """Exactly one thing went wrong, and it says what, where and what to do."""
    assert len(run.errors) == 1, run.errors
    said = run.errors[0]
    assert all(word in said for word in words), said
    assert len(said) < 500 and "\n" not in said and "Traceback" not in said


def sound(text: str) -> None:
    assert not comfy.model_management.in_training, f"{text} left ComfyUI in training mode"
