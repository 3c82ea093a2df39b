"""What turns pictures into numbers, against the reference of each: its network and its preprocessing."""

import json

import numpy
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

# The references resize with PIL; until transformers 5 those classes had the plain name.
clip_processor, bit_processor = (
    getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    for name in ("CLIPImageProcessor", "BitImageProcessor")
)


@pytest.fixture
def features(pack):
    return pack.nodes.features


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """models/features, empty."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "features", ([str(tmp_path)], set()))
    return tmp_path


def photos(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(n, H, W, 3) smooth pictures with 8 bits."""
    noise = torch.rand(n, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return ((x * 255).round() / 255).movedim(1, -1)


@torch.no_grad()
def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of a size that lets every layer speak; the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
        elif t.ndim < 2:
            t.copy_(torch.randn(t.shape, generator=generator) * 0.1 + (1.0 if name.endswith("weight") else 0.0))
        else:
            t.copy_(torch.randn(t.shape, generator=generator) * (1.5 / t[0].numel()) ** 0.5)
    return module.eval()


def test_inception_is_fids_own(features, folder):
    """torch-fidelity's port of the TensorFlow graph, its resize included, on the same weights; two sizes of picture."""
    theirs = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    with pytest.MonkeyPatch.context() as patch:  # its constructor reads a weights file; it may read ours
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", _refuse)
        state = randomised(_bare_inception(1008)).state_dict()
        torch.save(state, folder / "inception.pth")
        theirs = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=str(folder / "inception.pth")
        )
    ours = features.of_weights(folder / "inception.pth")
    assert ours.name == "Inception (FID's)"
    for size in ((64, 96), (400, 310)):
        images = photos(2, *size)
        eight_bits = (images * 255).round().to(torch.uint8).movedim(-1, 1)
        with torch.no_grad():
            (expected,) = theirs(eight_bits)
            made = ours.pictures(images)
        assert made.shape == (2, 2048)
        assert (made - expected).norm() <= 1e-4 * expected.norm()


def _refuse(*_, **__):
    raise AssertionError("a download was tried")


def _bare_inception(classes: int):
    from torchvision.models import Inception3

    return Inception3(num_classes=classes, aux_logits=False, init_weights=False)


def test_inception_of_torchvision(features, folder):
    from torchvision.models import Inception_V3_Weights

    network = randomised(_bare_inception(1000))
    torch.save(network.state_dict(), folder / "imagenet.pth")
    ours = features.of_weights(folder / "imagenet.pth")
    assert ours.name == "Inception (torchvision's)"
    network.fc = torch.nn.Identity()
    prepare = Inception_V3_Weights.IMAGENET1K_V1.transforms()
    for size in ((400, 500), (200, 180)):
        images = photos(2, *size)
        with torch.no_grad():
            expected = network(prepare(images.movedim(-1, 1)))
            assert (ours.pictures(images) - expected).norm() <= 1e-3 * expected.norm()


def _clip(folder, **config):
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 600,
            "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 16}  # fmt: skip
    model = randomised(
        transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12))
    )
    model.save_pretrained(folder)
    clip_processor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    letters = {
        c: i for i, c in enumerate(["<|startoftext|>", "<|endoftext|>", *(f"{chr(97 + i)}</w>" for i in range(26))])
    }
    (folder / "vocab.json").write_text(json.dumps(letters))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    tokenizer.save_pretrained(folder)
    return model


def test_a_clip_folder_sees_and_reads(features, folder):
    (folder / "clip").mkdir()
    model = _clip(folder / "clip")
    ours = features.of_folder(folder / "clip")
    images = photos(2, 40, 60)
    pictures = [Image.fromarray((i * 255).round().to(torch.uint8).numpy()) for i in images]
    pixels = clip_processor(size={"shortest_edge": 32}, crop_size=32)(pictures, return_tensors="pt")
    with torch.no_grad():
        expected = features.pooled(model.get_image_features(**pixels))
        assert torch.allclose(ours.pictures(images), expected, atol=1e-5)
        assert ours.texts(["a b c", "d"]).shape == (2, 12)
    assert "clip" in features.choices()


def test_a_dino_folder(features, folder):
    (folder / "dino").mkdir()
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = randomised(transformers.Dinov2Model(config))
    model.save_pretrained(folder / "dino")
    size = {"shortest_edge": 28}
    processor = bit_processor(size=size, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder / "dino")
    ours = features.of_folder(folder / "dino")
    images = photos(2, 40, 60)
    with torch.no_grad():
        expected = model(**processor([i for i in (images * 255).round().to(torch.uint8).numpy()], return_tensors="pt"))
        assert torch.allclose(ours.pictures(images), expected.last_hidden_state[:, 0], atol=1e-5)
    assert ours.texts is None


def test_core_and_transformers_see_the_same_with_the_same_dino(features, folder):
    """The same weights through Load CLIP Vision's class and as a folder."""
    import comfy.clip_vision

    facts = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = randomised(transformers.Dinov2Model(transformers.Dinov2Config(**facts, layer_norm_eps=1e-6)))
    more = {"layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "model_type": "dinov2"}
    vision = comfy.clip_vision.ClipVisionModel({**facts, **more})
    model.save_pretrained(folder)  # under the names that files have
    missing, unexpected = vision.load_sd(load_file(folder / "model.safetensors"))
    assert not missing and not unexpected
    images = photos(2, 28, 28)
    pixels = clip_processor(size={"shortest_edge": 28}, crop_size=28)(
        list((images * 255).round().to(torch.uint8).numpy()), return_tensors="pt"
    )
    with torch.inference_mode():
        expected = model(**pixels).last_hidden_state[:, 0]
        made = features.of_clip_vision(vision).pictures(images)
        assert (
            made - expected
        ).norm() <= 2e-3 * expected.norm()  # core resamples the places of patches even at their own size


def test_a_vision_model_without_a_summary_gives_its_mean_patch(features):
    import comfy.clip_vision

    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_act": "gelu",
              "num_channels": 3, "patch_size": 8, "image_size": 32, "model_type": "siglip_vision_model"}  # fmt: skip
    vision = comfy.clip_vision.ClipVisionModel(config)
    randomised(vision.model)
    images = photos(2, 32, 32)
    with torch.inference_mode():
        expected = vision.encode_image(images)["last_hidden_state"].mean(1)
        assert torch.allclose(features.of_clip_vision(vision).pictures(images), expected, atol=1e-6)


def test_core_prepares_pictures_as_the_reference_does(pack, features):
    """CLIP's own resizes 8 bits, core floats; two steps of 255 lie between them where both round to the same size (of
    300 x 400 core keeps 299 columns, the reference 298)."""
    from comfy.clip_model import clip_preprocess

    images = photos(1, 300, 450)
    reference = clip_processor()(
        Image.fromarray((images[0] * 255).round().to(torch.uint8).numpy()), return_tensors="pt"
    )
    deviation = numpy.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    difference = (clip_preprocess(images)[0] - reference["pixel_values"][0]).abs() * torch.from_numpy(deviation) * 255
    assert difference.max() <= 2 and difference.mean() < 0.5


def test_csd_is_clip_with_a_head(features, folder):
    """The checkpoint as its authors wrote it (OpenAI's names), against transformers' CLIP on the same weights."""
    config = transformers.CLIPVisionConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                                           patch_size=14, hidden_act="quick_gelu")  # fmt: skip
    with transformers.initialization.no_init_weights() if hasattr(transformers, "initialization") else torch.no_grad():
        reference = transformers.CLIPVisionModel(config)
    randomised(reference)
    head = torch.randn(1024, 768, generator=torch.Generator().manual_seed(3)) / 32
    state = {f"module.backbone.{k}": v for k, v in openai_names(reference).items()}
    torch.save({"model_state_dict": {**state, "module.last_layer_style": head}, "epoch": 1}, folder / "csd.pth")
    ours = features.of_weights(folder / "csd.pth")
    images = photos(1, 224, 224)
    pixels = clip_processor()(Image.fromarray((images[0] * 255).round().to(torch.uint8).numpy()), return_tensors="pt")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(reference(**pixels).pooler_output @ head, dim=1)
        made = ours.pictures(images)
    assert made.shape == (1, 768)
    assert torch.nn.functional.cosine_similarity(made, expected) > 0.9999


def openai_names(model) -> dict[str, torch.Tensor]:
    """A transformers CLIP vision tower under the names of OpenAI's code."""
    s = {k.removeprefix("vision_model."): v for k, v in model.state_dict().items()}
    out = {
        "class_embedding": s["embeddings.class_embedding"], "conv1.weight": s["embeddings.patch_embedding.weight"],
        "positional_embedding": s["embeddings.position_embedding.weight"],
        "ln_pre.weight": s["pre_layrnorm.weight"], "ln_pre.bias": s["pre_layrnorm.bias"],
        "ln_post.weight": s["post_layernorm.weight"], "ln_post.bias": s["post_layernorm.bias"],
    }  # fmt: skip
    for i in range(model.config.num_hidden_layers):
        old, new = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            out[f"{new}.attn.in_proj_{kind}"] = torch.cat([s[f"{old}.self_attn.{p}_proj.{kind}"] for p in "qkv"])
            for theirs, ours in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                                 ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                out[f"{new}.{ours}.{kind}"] = s[f"{old}.{theirs}.{kind}"]
    return out


def test_pocket_sees_and_reads_in_one_space(features, pack):
    ours = features.pocket()
    scenes = pack.training.pocket.world.sample_scenes(40, 5)
    images = pack.training.pocket.painter.paint(scenes).image.movedim(1, -1)
    texts = [pack.training.pocket.grammar.content(scenes, i) for i in range(40)]
    with torch.inference_mode():
        v, t = (torch.nn.functional.normalize(x, dim=1) for x in (ours.pictures(images), ours.texts(texts)))
    assert ((v @ t.T).argmax(1) == torch.arange(40)).float().mean() > 0.5  # chance is .025


def test_weights_of_something_else_are_refused(features, folder):
    torch.save({"state_dict": {"layer.weight": torch.zeros(2, 2)}}, folder / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth cannot be used: .*models/features"):
        features.of_weights(folder / "other.pth")


def test_code_in_a_weights_file_is_not_run(features, folder):
    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "hacked"), "w"))

    torch.save({"state_dict": Evil()}, folder / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth .* holds more than tensors"):
        features.of_weights(folder / "evil.pth")
    assert not (folder / "hacked").exists()


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth", "empty.pth", "empty.safetensors"])
def test_a_broken_weights_file_is_named(features, folder, name):
    (folder / name).write_bytes(b"" if name.startswith("empty") else b"not a file of tensors" * 100)
    with pytest.raises(ValueError, match=rf"{name} in models/features cannot be read: .* Fetch it again"):
        features.of_weights(folder / name)


def test_a_folder_saved_in_bfloat16(features, folder):
    (folder / "clip").mkdir()
    _clip(folder / "clip").to(torch.bfloat16).save_pretrained(folder / "clip")
    ours = features.of_folder(folder / "clip")
    assert ours.pictures(photos(2, 40, 60)).dtype == torch.float32 and ours.texts(["a"]).dtype == torch.float32


def test_texts_do_not_depend_on_how_many_are_read_at_once(features, folder, monkeypatch):
    """The tokenizer of some folders does not say how long a text may be; the model does."""
    (folder / "clip").mkdir()
    _clip(folder / "clip")
    file = folder / "clip" / "tokenizer_config.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in facts.items() if k != "model_max_length"}))
    ours = features.of_folder(folder / "clip")
    words = ["a b", "c", "d e f", "a b c d e f g h i j k l m n o p q r s t"]
    whole = ours.texts(words)
    monkeypatch.setattr(features, "TEXTS", 3)
    assert torch.allclose(ours.texts(words), whole, atol=1e-6) and whole.shape == (4, 12)


def test_an_incomplete_folder_is_named(features, folder):
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ValueError, match=r"half in models/features is not complete: .* Copy the whole folder"):
        features.of_folder(folder / "half")


@pytest.mark.parametrize("name", ["../evil.pth", "/etc/passwd", "a/b.pth", ""])
def test_names_with_a_path_are_never_looked_up(features, folder, name):
    assert features.find(name) is None


def test_not_a_number_is_named_with_its_picture(pack):
    f = pack.training.features

    def see(images):
        out = images.mean((1, 2))
        out[images[:, 0, 0, 0] == 1] = float("nan")
        return out

    pictures = [torch.zeros(1, 4, 4, 3) for _ in range(20)]
    pictures[18] = torch.ones(1, 4, 4, 3)
    with pytest.raises(ValueError, match="no finite numbers for picture 19"):
        f.extract(f.Extractor("broken", "0", see), pictures)


def test_sizes_may_change_and_the_order_stays(pack):
    f = pack.training.features
    sizes = [(4, 4)] * 20 + [(6, 4)] * 3 + [(4, 4)]
    pictures = [torch.full((1, *size, 4), i / 100) for i, size in enumerate(sizes)]
    asked = []

    def see(images):
        asked.append(tuple(images.shape))
        return images.mean((1, 2))

    got = f.extract(f.Extractor("mean", "0", see), iter(pictures))
    assert torch.allclose(got.values[:, 0], torch.arange(24) / 100)
    assert asked == [(16, 4, 4, 3), (4, 4, 4, 3), (3, 6, 4, 3), (1, 4, 4, 3)]


def test_a_set_is_measured_once(pack, tmp_path):
    f = pack.training.features
    calls = []
    mean = f.Extractor("mean", "abc", lambda images: images.mean((1, 2)))

    def compute():
        calls.append(1)
        return f.extract(mean, [torch.rand(1, 4, 4, 3)])

    first, second = (f.kept(tmp_path, mean, "key", compute) for _ in range(2))
    assert len(calls) == 1 and torch.equal(first.values, second.values) and second.identity == "abc"
    f.kept(tmp_path, f.Extractor("mean", "other weights", mean.pictures), "key", compute)
    assert len(calls) == 2
