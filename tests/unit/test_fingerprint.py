"""The identity of a MODEL, CLIP or VAE: the same after a restart, another after any change."""

import copy

import pytest
import torch

from harness.small_nets import as_kind, load, numbers, snapshot, unchanged, with_lora

KINDS = ("EPS", "V_PREDICTION", "FLOW")


def test_the_same_weights_have_the_same_fingerprint(identity, build):
    for name in ("sd15_model", "sd15_clip", "sd15_vae"):
        prints = [identity.fingerprint(getattr(build, name)(seed)) for seed in (0, 0, 1)]
        assert prints[0] == prints[1] != prints[2], name
        assert len(prints[0]) == 12 and set(prints[0]) <= set("0123456789abcdef")


def test_weights_and_patches_change_the_fingerprint(identity, build):
    base, tuned = build.sd15_model(), build.sd15_model()
    with torch.inference_mode():
        for name, p in tuned.model.named_parameters():
            if "attn2.to_" in name:
                p.mul_(1.5)
    lora = with_lora(base)
    models = [
        base,
        tuned,
        lora,
        with_lora(base, 0.5),
        with_lora(base, amount=0.2),
        with_lora(lora),
        build.sd15_model(1),
    ]
    prints = [identity.fingerprint(model) for model in models]
    assert len(set(prints)) == len(prints)
    assert identity.fingerprint(with_lora(build.sd15_model())) == prints[2], "and is the same after a restart"


def test_every_tensor_counts(identity, build):
    """One number changed anywhere it is looked at, in any of the weights; and a norm's running statistics."""
    base = build.sd15_model()
    first, names = identity.fingerprint(base), [name for name, _ in base.model.named_parameters()]
    for name in names[:: len(names) // 40]:
        other = build.sd15_model()
        with torch.inference_mode():
            other.model.get_parameter(name).flatten()[0].add_(0.5)
        assert identity.fingerprint(other) != first, name
    patchers = [managed(torch.nn.BatchNorm2d(4)) for _ in range(2)]
    patchers[1].model.running_mean.add_(1)
    assert identity.fingerprint(patchers[0]) != identity.fingerprint(patchers[1])


def managed(module):
    import comfy.model_patcher

    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(module, cpu, cpu)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_another_kind_of_prediction_changes_the_fingerprint(bridge, identity, build, kind):
    """Core's ModelSampling nodes: other pictures, another meaning of what was learned."""
    base = build.sd15_model()
    assert identity.fingerprint(as_kind(base, kind)) != identity.fingerprint(base)


CLIPS = {  # ways of making another CLIP of one
    "LoRA": lambda bridge, clip: with_lora(clip.patcher, key=FC1),
    "clip skip": lambda bridge, clip: skipping(clip, -2),
    "a word": lambda bridge, clip: bridge.with_embeddings(clip, {"word": {"clip_l": numbers(1, 32)}}),
    "another word": lambda bridge, clip: bridge.with_embeddings(clip, {"word": {"clip_l": numbers(1, 32, seed=2)}}),
}
FC1 = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"


def skipping(clip, layer: int):
    clone = clip.clone()
    clone.clip_layer(layer)
    return clone


@pytest.mark.parametrize("change", CLIPS)
def test_whatever_changes_the_conditioning_changes_the_fingerprint(bridge, identity, build, change):
    clips = [build.sd15_clip(), build.sd15_clip()]
    base = identity.fingerprint(clips[0])
    prints = [identity.fingerprint(CLIPS[change](bridge, clip)) for clip in clips]
    assert prints[0] == prints[1] != base
    others = {identity.fingerprint(CLIPS[name](bridge, clips[0])) for name in CLIPS if name != change}
    assert prints[0] not in others


def test_a_fingerprint_does_not_depend_on_what_is_loaded(identity, build):
    """Loading a patched model writes the patched weights into the network that both share."""
    base = build.sd15_model()
    every = {name: ("diff", (torch.full_like(p, 0.01),)) for name, p in base.model.named_parameters()}
    variants = [base, base.clone(), base.clone()]
    for model, strength in zip(variants[1:], (1.0, 0.5), strict=True):
        model.add_patches(every, strength)
    prints = [identity.fingerprint(model) for model in variants]
    for model in variants:
        load(model)
        assert [identity.fingerprint(m) for m in variants] == prints
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_changes_nothing(identity, build):
    model = with_lora(build.sd15_model())
    weights, patches = snapshot(model.model), copy.copy(model.patches)
    identity.fingerprint(model)
    assert unchanged(weights, model.model) and model.patches == patches


def test_patches_of_attention_and_guidance_change_the_fingerprint(identity, build, attention_patches):
    """Core's own nodes and ours, each with two settings; made anew, each is what it was, and using it changes nothing."""
    with torch.inference_mode():
        base = build.sd15_model()
        prints = [identity.fingerprint(model) for model in (base, *attention_patches(base))]
        again = [identity.fingerprint(model) for model in attention_patches(build.sd15_model())]
    assert len(set(prints)) == len(prints) and again == prints[1:]


def test_many_patches_are_told_apart_every_time(identity, build):
    """Each encloses things that are made and thrown away while it is read."""

    def times(factor: float):
        return lambda h, options: h * factor

    def fingerprint(last: float) -> str:
        model = build.sd15_model()
        for factor in (*range(40), last):
            model.set_model_attn1_output_patch(times(factor))
        return identity.fingerprint(model)

    with torch.inference_mode():
        assert len({fingerprint(1.0) for _ in range(5)}) == 1 and len({fingerprint(x) for x in (1.0, 2.0, 3.0)}) == 3


@pytest.fixture
def attention_patches(pack):
    from comfy_extras import nodes_freelunch, nodes_pag

    shared, how = pack.nodes.attention.patch.with_shared_attention, pack.nodes.attention.patch.How
    masks = torch.zeros(2, 8, 8)
    masks[:, 2:5, 3] = 1

    def patches(model):
        pag, free = nodes_pag.PerturbedAttentionGuidance, nodes_freelunch.FreeU_V2
        yield from (pag.execute(model, scale)[0] for scale in (1.0, 3.0))
        yield from (free.execute(model, b1, 1.4, 0.9, 0.2)[0] for b1 in (1.1, 1.3))
        yield from (shared(model, masks, how(end=end)) for end in (1.0, 0.5))
        yield shared(model, masks.flip(1))
        yield shared(model, masks, how(strength=0.5))
        yield shared(model)

    return patches
