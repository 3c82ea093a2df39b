"""Pocket on stock nodes, and the nodes of its world."""

import json

import pytest
import torch

LOAD = {"1": {"class_type": "CounterpointLoadPocketModels", "inputs": {}}}


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def painting(
    text="a red cube on a meadow, smooth shading, full colour, no outline", seed=1, batch=2, model=("1", 0)
) -> dict:
    """2 text, 3 empty text, 4 latent, 5 sampler, 6 picture."""
    return {
        **LOAD,
        "2": node("CLIPTextEncode", clip=["1", 1], text=text),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("EmptyLatentImage", width=128, height=128, batch_size=batch),
        "5": node(
            "KSampler", model=list(model), positive=["2", 0], negative=["3", 0], latent_image=["4", 0], seed=seed, steps=8, cfg=4.0,
            sampler_name="euler", scheduler="normal", denoise=1.0,
        ),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("PreviewImage", images=["6", 0]),
    }  # fmt: skip


def pictures(count=4, **changed) -> dict:
    inputs = {
        "count": count,
        "style": "any",
        "shape": "any",
        "colour": "any",
        "pattern": "any",
        "background": "any",
        "captions": "content",
        "seed": 3,
    }
    return node("CounterpointPocketPictures", **{**inputs, **changed})


def test_stock_nodes_paint_with_it(graph):
    run = graph(painting())
    picture = run.value("6")
    assert picture.shape == (2, 128, 128, 3)
    assert picture.std() > 0.05, "a grey picture"
    assert not torch.equal(picture[0], picture[1])
    assert run.sent("preview"), "no live preview: the latent format has no factors"


def test_the_vae_returns_what_it_was_given(graph):
    run = graph(
        {
            **LOAD,
            "2": pictures(count=1),
            "3": node("VAEEncode", pixels=["2", 0], vae=["1", 2]),
            "4": node("VAEDecode", samples=["3", 0], vae=["1", 2]),
            "5": node("PreviewImage", images=["4", 0]),
        }
    )
    before, after = run.value("2"), run.value("4")
    assert run.value("3")["samples"].shape == (1, 4, 16, 16)
    assert -10 * (before - after).square().mean().log10() > 22, "dB"


def test_vision_and_text_towers_agree_on_what_belongs_together(graph, pack):
    run = graph(
        {
            **LOAD,
            "2": pictures(count=24, captions="content and style"),
            "3": node("CLIPVisionEncode", clip_vision=["1", 3], image=["2", 0], crop="none"),
            "4": node("CLIPTextEncode", clip=["1", 1], text=["2", 1]),
            "5": node("PreviewImage", images=["2", 0]),
            "6": node(
                "unCLIPConditioning",
                conditioning=["4", 0],
                clip_vision_output=["3", 0],
                strength=1.0,
                noise_augmentation=0.0,
            ),
            "7": node("ConditioningSetTimestepRange", conditioning=["6", 0], start=0.0, end=1.0),
            "8": node("PreviewAny", source=["7", 0]),
        }
    )
    seen = torch.cat([v["image_embeds"] for v in run.outputs["3"][0]])
    said = torch.cat([c[0][1]["pooled_output"] for c in run.outputs["4"][0]])
    closest = (torch.nn.functional.normalize(seen, dim=1) @ torch.nn.functional.normalize(said, dim=1).T).argmax(1)
    assert (closest == torch.arange(24)).float().mean() > 0.5, "chance is 1 in 24"


def test_loras_and_patches_act_on_it(graph, folders):
    """A LoRA in core's keys through LoraLoader, and core's model patches, change the picture; strength 0 does not."""
    import folder_paths
    from safetensors.torch import save_file

    key = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"{key}.lora_up.weight": torch.randn(128, 4, generator=generator),
        f"{key}.lora_down.weight": torch.randn(4, 128, generator=generator),
    }
    place = folder_paths.get_folder_paths("loras")[0]
    folders.joinpath(place).mkdir(parents=True, exist_ok=True)
    save_file(lora, f"{place}/little.safetensors")

    def painted(**extra):
        prompt = {**painting(model=("9", 0)), "9": extra["node"]}
        return graph(prompt).value("6")

    plain = graph(painting()).value("6")
    loader = {"model": ["1", 0], "clip": ["1", 1], "lora_name": "little.safetensors", "strength_clip": 0.0}
    assert torch.equal(painted(node=node("LoraLoader", **loader, strength_model=0.0)), plain)
    assert not torch.equal(painted(node=node("LoraLoader", **loader, strength_model=1.0)), plain)
    assert not torch.equal(painted(node=node("PerturbedAttentionGuidance", model=["1", 0], scale=3.0)), plain)


def test_pocket_pictures_are_what_was_asked_for(graph, pack):
    style = next(name for name in pack.nodes.pocket.STYLES if name.startswith("held out"))
    prompt = {
        "2": pictures(count=12, style=style, shape="heart", colour="blue"),
        "3": node("PreviewImage", images=["2", 0]),
    }
    run = graph(prompt)
    images, captions, masks, depth = (run.outputs["2"][i] for i in range(4))
    assert len(images) == len(captions) == len(masks) == len(depth) == 12
    assert images[0].shape == (1, 128, 128, 3) and masks[0].shape == (1, 128, 128)
    assert all("blue" in c and "heart" in c for c in captions)
    assert not any(word in c for c in captions for word in style.removeprefix("held out: ").replace(",", "").split()), (
        "the caption tells the style"
    )
    nearer = torch.stack(
        [
            (d[0, ..., 0] * m[0]).sum() / m.sum() - (d[0, ..., 0] * (1 - m[0])).mean()
            for d, m in zip(depth, masks, strict=True)
        ]
    )
    assert (nearer > 0).all(), "the object is nearer than what is behind it"
    assert graph(prompt).executed == []


@pytest.mark.parametrize("shape", ["star", "cube"])
def test_the_judge_sees_style_and_object(graph, pack, shape):
    prompt = {
        "2": pictures(count=64, style="comic", shape="star"),
        "3": node("CounterpointPocketJudge", images=["2", 0], style="comic", object=shape, label="real"),
    }
    run = graph(prompt)
    told = json.loads(run.value("3", 1))
    assert told["pictures"] == 64
    assert told["style (all three)"][0] > 0.8
    share = told[f"shows a {shape}"][0]
    assert share > 0.9 if shape == "star" else share < 0.1
    assert run.value("3").startswith("real: style (all three)")


def test_weights_of_another_world_are_refused_by_name(pack, monkeypatch, tmp_path):
    models = pack.nodes.pocket_models
    file = tmp_path / "pocket-judge.safetensors"
    pack.training.artefact.write(file, {"x": torch.zeros(1)}, {"pocket_version": "0"})
    monkeypatch.setattr(models, "MODELS", tmp_path)
    with pytest.raises(ValueError, match="pocket-judge.safetensors belongs to world '0'.*install the pack again"):
        models.load_judge()
    with pytest.raises(FileNotFoundError, match="pocket-vae.safetensors is missing"):
        models.load_vae()


def test_one_object_in_many_places(graph, pack):
    """The same object in every picture, another with another number, and many without a number."""
    places = [v for ways in pack.training.pocket.grammar.SYNONYMS["background"].values() for v in ways]

    def objects(same_object: int) -> set[str]:
        run = graph({"1": pictures(12, same_object=same_object), "2": node("PreviewImage", images=["1", 0])})
        assert len({c for c in run.outputs["1"][1]}) > 3  # in many places
        return {c.replace(p, "").strip() for c in run.outputs["1"][1] for p in places if c.endswith(p)}

    assert len(objects(3)) == len(objects(4)) == 1
    assert objects(3) != objects(4) and len(objects(0)) > 6


def test_what_is_asked_for_by_name_wins_over_the_object(graph):
    run = graph({"1": pictures(3, shape="ring", same_object=5), "2": node("PreviewImage", images=["1", 0])})
    assert all("ring" in caption for caption in run.outputs["1"][1])
