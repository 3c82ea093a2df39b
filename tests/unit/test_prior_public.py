"""Public priors from files made here in the layouts that are published: diffusers' own writer, and Karlo's names."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.small_nets import numbers

PROCESS = {"_class_name": "UnCLIPScheduler", "clip_sample": True, "clip_sample_range": 10.0, "num_train_timesteps": 1000,
           "prediction_type": "sample", "variance_type": "fixed_small_log"}  # fmt: skip
SIZES = {"embedding_dim": 12, "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def public(pack):
    from importlib import import_module

    return import_module(f"{pack.__name__}.training.prior.public")


@torch.no_grad()
def theirs(**sizes):
    """diffusers' module; every tensor is drawn, its statistics too."""
    from diffusers import PriorTransformer

    model, generator = PriorTransformer(**SIZES | sizes), torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + (1.0 if "norm" in name else 0.0))
    model.clip_std.copy_(torch.rand(model.clip_std.shape, generator=generator) + 0.1)
    return model.eval()


def saved(folder, process=PROCESS, model=None, **how):
    """A pipeline's folder, as Kandinsky's prior is published."""
    model = model or theirs()
    model.save_pretrained(folder / "prior", **how)
    if process:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(process))
    return model


def changed(file, change):
    """A .safetensors whose tensors went through `change(dict)`."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def answers(network, width: int = 12):
    mask = torch.arange(77) < torch.tensor([[5], [40]])
    states, pooled, noisy = numbers(2, 77, width), numbers(2, width, seed=2), numbers(2, width, seed=3)
    with torch.no_grad():
        ours = network(noisy, 600.0 if network.shape.time else None, network.read(states, pooled, mask))
    return ours, (noisy, 600, pooled, states, mask)


@pytest.mark.parametrize("layout", ["pipeline", "the prior's folder", "the file", "bin", "fp16"])
def test_a_folder_of_diffusers(public, tmp_path, layout):
    model = saved(tmp_path, safe_serialization=layout != "bin", variant="fp16" if layout == "fp16" else None)
    path = {"the prior's folder": tmp_path / "prior", "the file": tmp_path / "prior" / WEIGHTS}.get(layout, tmp_path)
    prior = public.load_public(path)
    got, given = answers(prior.network)
    with torch.no_grad():
        want = model(*given).predicted_image_embedding
        embedding, expected = prior.mean + prior.std * want, model.post_process_latents(want)
    assert want.std() > 0.1 and (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert torch.allclose(embedding, expected, atol=1e-6)
    assert (prior.clamp, prior.schedule, prior.guidance, prior.one_shot) == (10.0, "cosine", 4.0, False)
    assert not any(p.requires_grad for p in prior.network.parameters())


@pytest.mark.parametrize(
    ("process", "clamp", "said"),
    [
        (PROCESS | {"clip_sample_range": 5.0}, 5.0, "5, from prior_scheduler/scheduler_config.json"),
        (PROCESS | {"clip_sample": False}, 0.0, "none, from prior_scheduler/scheduler_config.json"),
        (None, 10.0, "10, as in its authors' code"),
    ],
)
def test_the_clamp_is_that_of_its_scheduler(public, tmp_path, process, clamp, said):
    """Karlo's pipeline keeps several schedulers; the prior's is called so."""
    saved(tmp_path)
    if process:
        (tmp_path / "prior_scheduler").mkdir()
        (tmp_path / "prior_scheduler" / "scheduler_config.json").write_text(json.dumps(process))
    else:
        os.remove(tmp_path / "scheduler" / "scheduler_config.json")
    prior = public.load_public(tmp_path)
    assert prior.clamp == clamp and prior.facts["clamp"].startswith(said)


def test_the_facts(public, tmp_path):
    saved(tmp_path, model=theirs(embedding_dim=1280, num_layers=1).half())
    prior = public.load_public(tmp_path)
    assert prior.space == "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
    assert (
        prior.facts["family"] == "Kandinsky 2.2" and "in float16: 1 layers, 2 heads, width 128" in prior.facts["size"]
    )


@pytest.mark.parametrize("std", ["zero", "absent", "drawn"])
def test_eclipse(public, tmp_path, std):
    """No time, 80 places; what it says is the embedding, whatever its file has for a standard deviation."""
    config = {"_class_name": "PriorTransformer", "additional_embeddings": 3, "attention_head_dim": 32, "embedding_dim": 12,
              "num_attention_heads": 4, "num_embeddings": 77, "num_layers": 2}  # fmt: skip
    state = theirs().state_dict()
    state = {k: v.clone() for k, v in state.items() if "time_embedding" not in k}
    state["positional_embedding"] = state["positional_embedding"][:, :80].clone()
    if std == "zero":
        state["clip_mean"], state["clip_std"] = torch.zeros(1, 12), torch.zeros(1, 12)
    elif std == "absent":
        del state["clip_mean"], state["clip_std"]
    save_file(state, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    prior = public.load_public(tmp_path)
    assert prior.one_shot and prior.network.shape.heads == 4 and not prior.network.shape.time
    assert prior.mean.equal(torch.zeros(12)) and prior.std.equal(torch.ones(12))
    assert (prior.guidance, prior.clamp, prior.facts["family"]) == (1.0, 0.0, "ECLIPSE")
    assert answers(prior.network)[0].std() > 0.1


def as_karlo(model) -> dict[str, torch.Tensor]:
    """Karlo's original names, from the order in which its network reads them: each head's query, key and value in one piece."""
    names = {"clip_img_proj": "proj_in", "text_emb_proj": "embedding_proj", "text_enc_proj": "encoder_hidden_states_proj",
             "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "final_ln": "norm_out",
             "out_proj": "proj_to_clip_embeddings"}  # fmt: skip
    layer = {
        "ln_1": "norm1",
        "attn.c_proj": "attn1.to_out.0",
        "ln_2": "norm3",
        "mlp.c_fc": "ff.net.0.proj",
        "mlp.c_proj": "ff.net.2",
    }
    heads, state = model.config.num_attention_heads, model.state_dict()
    made = {"model.positional_embedding": state["positional_embedding"], "model.prd_emb": state["prd_embedding"]}
    for kind in ("weight", "bias"):
        made |= {f"model.{ours}.{kind}": state[f"{name}.{kind}"] for ours, name in names.items()}
        for i in range(model.config.num_layers):
            block, part = f"model.transformer.resblocks.{i}", f"transformer_blocks.{i}"
            made |= {f"{block}.{ours}.{kind}": state[f"{part}.{name}.{kind}"] for ours, name in layer.items()}
            pieces = [state[f"{part}.attn1.to_{c}.{kind}"][64 * h : 64 * h + 64] for h in range(heads) for c in "qkv"]
            made[f"{block}.attn.c_qkv.{kind}"] = torch.cat(pieces)
    return made


def karlo(folder, statistics: bool = True):
    model = theirs(embedding_dim=768)
    torch.save({"state_dict": as_karlo(model), "global_step": 1000000}, folder / "prior-ckpt-step=01.ckpt")
    if statistics:
        torch.save((model.clip_mean[0].detach(), model.clip_std[0].detach()), folder / "ViT-L-14_stats.th")
    return model


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_karlo_as_it_was_published(public, tmp_path, whole):
    model = karlo(tmp_path)
    torch.save({}, tmp_path / "decoder-ckpt-step=01.ckpt")
    prior = public.load_public(tmp_path if whole else tmp_path / "prior-ckpt-step=01.ckpt")
    got, given = answers(prior.network, 768)
    with torch.no_grad():
        want = model(*given).predicted_image_embedding
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert prior.mean.equal(model.clip_mean[0]) and prior.std.equal(model.clip_std[0])
    assert (prior.clamp, prior.space, prior.facts["family"]) == (10.0, "openai/clip-vit-large-patch14", "Karlo")


def test_karlo_without_its_statistics(public, tmp_path):
    karlo(tmp_path, statistics=False)
    with pytest.raises(ValueError, match=r"put ViT-L-14_stats\.th"):
        public.load_public(tmp_path)
    torch.save(torch.zeros(768), tmp_path / "ViT-L-14_stats.th")
    with pytest.raises(ValueError, match="does not hold two tensors"):
        public.load_public(tmp_path)


def test_heads_without_a_config(public, tmp_path):
    """Known for the widths of public priors, said in metadata, or asked for."""
    saved(tmp_path)
    file = tmp_path / "prior" / WEIGHTS
    os.remove(tmp_path / "prior" / "config.json")
    with pytest.raises(
        ValueError, match=r"how many heads diffusion_pytorch_model\.safetensors has: put the config\.json"
    ):
        public.load_public(tmp_path)
    save_file(load_file(file), file, {"heads": "4"})
    assert public.load_public(tmp_path).network.shape.heads == 4
    theirs(num_attention_heads=8, num_layers=1).save_pretrained(tmp_path / "wide")
    os.remove(tmp_path / "wide" / "config.json")
    assert public.load_public(tmp_path / "wide").network.shape.heads == 16


BROKEN = {
    "a part missing": (lambda t: t.pop("norm_out.bias"), "norm_out.bias is missing"),
    "a layer missing": (lambda t: [t.pop(k) for k in list(t) if "blocks.0" in k], r"blocks.0.*is missing \(and \d+ more\)"),
    "a part too many": (lambda t: t.update({"time_embedding.linear_3.bias": torch.zeros(2)}), "linear_3.bias is one too many"),
    "another size": (lambda t: t.update({"norm_out.bias": torch.zeros(3)}), r"norm_out.bias is \(3,\) and not \(128,\)"),
    "no statistics": (lambda t: t.pop("clip_std"), "no statistics of its CLIP"),
    "no mean": (lambda t: t.pop("clip_mean"), "no statistics of its CLIP"),
    "a zero": (lambda t: t["clip_std"][0, 3:4].zero_(), "no statistics of its CLIP"),
    "not finite": (lambda t: t["clip_mean"][0, 3:4].fill_(float("nan")), "no statistics of its CLIP"),
    "eight bits": (lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()}), "less than 16 bits"),
    "other places": (lambda t: t.update(positional_embedding=torch.zeros(1, 1028, 128)), "1028 places and needs 81"),
    "Shap-E": (lambda t: t.update({"norm_in.weight": torch.zeros(128)}), "Shap-E's prior"),
    "a UNet": (lambda t: t.update({"down_blocks.0.x": torch.zeros(1)}), "a UNet and no prior"),
    "Shifted Diffusion": (lambda t: t.update({"clip_sentence_proj.0.weight": torch.zeros(1)}), "three CLIPs together .1536 numbers.*: use"),
    "DALLE2-PyTorch": (lambda t: t.update({"net.causal_transformer.rel_pos_bias.x": torch.zeros(1)}), "a prior of DALLE2-PyTorch"),
    "nothing known": (lambda t: t.clear() or t.update(weight=torch.zeros(1)), "no prior that is known here, as it has no proj_in.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_understood_is_named(public, tmp_path, what):
    change, said = BROKEN[what]
    saved(tmp_path)
    changed(tmp_path / "prior" / WEIGHTS, change)
    with pytest.raises(ValueError, match=said) as caught:
        public.load_public(tmp_path)
    assert WEIGHTS in str(caught.value) and "\n" not in str(caught.value)


CONFIGS = {
    "prior/config.json": [
        ({"_class_name": "UNet2DConditionModel"}, "config.json of a UNet2DConditionModel"),
        ({"num_attention_heads": 3, "attention_head_dim": 64}, "3 heads of 64 channels, and the file is 128 wide"),
        ({}, "32 heads of 64 channels"),
        ("{", r"prior/config\.json is broken"),
        ("[]", r"prior/config\.json is not a configuration"),
    ],
    "scheduler/scheduler_config.json": [
        (PROCESS | {"prediction_type": "epsilon"}, "prediction_type = 'epsilon', and a prior's is 'sample'"),
        (PROCESS | {"beta_schedule": "linear"}, "beta_schedule = 'linear'"),
        (PROCESS | {"num_train_timesteps": 100}, "num_train_timesteps = 100"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("file", "content", "said"), [(f, c, s) for f, cases in CONFIGS.items() for c, s in cases])
def test_what_lies_beside_it_must_belong_to_it(public, tmp_path, file, content, said):
    saved(tmp_path)
    content = {"_class_name": "PriorTransformer"} if content == {} else content
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=said):
        public.load_public(tmp_path)


class Code:
    """A pickle that makes a file where it is unpickled with everything allowed."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("legacy", [True, False])
def test_no_code_of_a_file_is_run(public, tmp_path, legacy):
    trace = tmp_path / "trace"
    torch.save({"state_dict": Code(trace)}, tmp_path / "prior.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"prior\.ckpt cannot be read: it is broken, or holds more than tensors"):
        public.load_public(tmp_path / "prior.ckpt")
    assert not trace.exists()


def test_broken_files_and_empty_folders(public, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    (tmp_path / "b.ckpt").write_bytes(b"")
    for file in ("a.safetensors", "b.ckpt"):
        with pytest.raises(ValueError, match=f"{file} cannot be read"):
            public.load_public(tmp_path / file)
    with pytest.raises(ValueError, match="is no prior: such a folder has"):
        public.load_public(tmp_path)


def test_what_shifted_diffusions_authors_publish_is_named(public, tmp_path):
    """Their folder, and the tables of their clusters: no model on the canvas takes embeddings of three CLIPs together."""
    torch.save({"clip_sentence_proj.0.weight": torch.zeros(2048, 1536)}, tmp_path / "model_state.th")
    torch.save(numbers(5, 1536), tmp_path / "mean.pth")
    for place, said in ((tmp_path, "the prior of Shifted Diffusion's authors"), (tmp_path / "mean.pth", "one table")):
        with pytest.raises(
            ValueError, match=rf"{said}.*three CLIPs together \(1536 numbers\).*: use the prior of"
        ) as told:
            public.load_public(place)
        assert "\n" not in str(told.value)
