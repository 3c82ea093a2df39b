"""Every family of models through one code path: errors, gradients, and words that mean the same from a file."""

import pytest
import torch

from harness.small_nets import conditioning, denoiser, numbers, snapshot, unchanged

NAMES = ("SD1.5", "SD2", "SDXL", "SDXL, v", "SD3.5", "FLUX.1", "FLUX.2", "Z-Image")


@pytest.fixture(params=NAMES)
def family(request, small_models):
    import importlib

    return importlib.import_module(f"{small_models.__name__}.families").FAMILIES[request.param]


@pytest.fixture
def shared(family):
    """MODEL and CLIP as the executor's loaders make them: under inference mode."""
    with torch.inference_mode():
        return family.model(), family.clip()


@pytest.fixture
def trainee(bridge, family, shared):
    """Denoiser, text encoder and starting vectors, under training mode."""
    model, clip = shared
    with bridge.training_mode():
        own = bridge.private_clip(clip)
        yield denoiser(bridge, model), bridge.ComfyTextEncoder(own), bridge.starting_vectors(own, "red dog", 2)


def batch(family, model, n: int = 2):
    sigma = model.sigmas(n, torch.Generator().manual_seed(3))
    return numbers(n, *family.latent), numbers(n, *family.latent, seed=2), sigma


def same(pooled, other) -> bool:
    """FLUX.2, Qwen-Image and Z-Image read no summary of a text."""
    return other is None if pooled is None else (pooled - other).abs().max() <= 1e-5


def test_the_error_is_what_the_network_says_less_its_target(family, trainee):
    """The network is overheard; the target is written out from the definitions."""
    model, encoder, start = trainee
    x0, noise, sigma = batch(family, model)
    heard = []
    network = model.base.diffusion_model
    network.register_forward_hook(lambda _, given, out: heard.append((given[0].clone(), out.clone())))
    with torch.no_grad():
        got = model.error(x0, noise, sigma, encoder.encode(["a {token}"] * 2, [start] * 2))
    ((seen, said),) = heard
    s = sigma.view(-1, *[1] * len(family.latent))
    if family.says == "FLOW":
        shown, target = (1 - s) * x0 + s * noise, noise - x0
    else:
        a, b = 1 / (1 + s * s).sqrt(), s / (1 + s * s).sqrt()
        shown, target = a * x0 + b * noise, noise if family.says == "EPS" else a * noise - b * x0
    assert torch.allclose(seen, shown, atol=1e-4)
    assert got.shape == (2, family.latent[0], *family.latent[-2:])
    assert (got - (said - target).view(got.shape)).abs().max() <= 2e-4 * target.abs().max()


def test_the_gradient_is_the_slope(family, trainee):
    """Central differences along the gradient of each encoder's vectors, and along a random direction of all."""
    model, encoder, start = trainee
    x0, noise, sigma = batch(family, model)
    vectors = {k: v.clone().requires_grad_() for k, v in start.items()}

    def loss(v):
        cond = encoder.encode(["a {token} cat"] * 2, [v] * 2)
        return model.error(x0, noise, sigma, cond).double().square().mean()

    gradient = dict(zip(vectors, torch.autograd.grad(loss(vectors), list(vectors.values())), strict=True))
    assert set(gradient) == set(family.keys) and all(g.norm() > 0 for g in gradient.values())
    every = {k: numbers(*v.shape, seed=5) for k, v in start.items()}
    for direction in (*({k: g} for k, g in gradient.items()), every):
        size = sum(d.square().sum() for d in direction.values()).sqrt()
        step = {k: 2e-3 * d / size for k, d in direction.items()}
        with torch.no_grad():
            ends = [loss({k: v + sign * step.get(k, 0) for k, v in start.items()}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / 4e-3
        along = sum((gradient[k].double() * d / size).sum() for k, d in direction.items())
        assert slope.item() == pytest.approx(along.item(), rel=2e-2, abs=5e-3 * along.abs().item() + 1e-4)


def test_captions_of_different_lengths_are_what_each_is_by_itself(family, trainee):
    """Where text and picture attend to each other, text that is filled up would be another text."""
    model, encoder, start = trainee
    x0, noise, sigma = batch(family, model)
    captions = ["a {token}", "a dog in the style of {token} under " + "a wide blue sky, " * 120]
    with torch.no_grad():
        cond = encoder.encode(captions, [start] * 2)
        together = model.error(x0, noise, sigma, cond)
        alone = [model.error(x0[[i]], noise[[i]], sigma[[i]], encoder.encode([captions[i]], [start])) for i in (0, 1)]
    assert cond.tokens[0] < cond.tokens[1] == cond.states.shape[1]
    assert (together - torch.cat(alone)).abs().max() <= 1e-4 * together.abs().max()


@pytest.fixture
def checkpointing(pack):
    return pack.training.checkpointing


def test_checkpointed_gradients_are_the_gradients(family, trainee, checkpointing):
    """Blocks that add to their inputs in place (FLUX.1, the text encoders) would give others without a word."""
    model, encoder, start = trainee
    networks = model.base.diffusion_model, encoder.clip.cond_stage_model
    x0, noise, sigma = batch(family, model)

    def gradients():
        leaves = {k: v.clone().requires_grad_() for k, v in start.items()}
        model.error(x0, noise, sigma, encoder.encode(["a {token} cat"] * 2, [leaves] * 2)).square().mean().backward()
        return {k: v.grad for k, v in leaves.items()}

    want = gradients()
    with checkpointing.checkpointed(*networks):
        got = gradients()
    assert all((want[k] - got[k]).norm() <= 1e-5 * want[k].norm() for k in want)
    assert len(checkpointing.blocks(networks[0])) >= 2 and len(checkpointing.blocks(networks[1])) >= 2
    assert not any("forward" in vars(m) for network in networks for m in network.modules()), "a block was left wrapped"
    assert not [
        name for network in networks for name, p in network.named_parameters() if p.requires_grad or p.grad is not None
    ]


def test_nothing_but_the_vectors_gets_a_gradient(family, trainee):
    model, encoder, start = trainee
    vectors = {k: v.clone().requires_grad_() for k, v in start.items()}
    model.error(*batch(family, model), encoder.encode(["{token}"] * 2, [vectors] * 2)).square().mean().backward()
    assert all(v.grad.abs().sum() > 0 for v in vectors.values())
    for module in (model.base, encoder.clip.cond_stage_model):
        assert not [name for name, p in module.named_parameters() if p.requires_grad or p.grad is not None]


@pytest.mark.parametrize("method", ["plain", "paper", "reference point"])
def test_a_word_is_learned_and_the_models_stay_as_they_were(bridge, pack, family, shared, trainee, method):
    ti, (model, encoder, start) = pack.training.textual_inversion, trainee
    before = [snapshot(shared[0].model), snapshot(shared[1].cond_stage_model)]
    positives, negatives = (numbers(3, *family.latent, seed=s) for s in (1, 4))
    settings = ti.Settings(method=method, steps=4, batch=2)
    trainer = ti.TextualInversion(model, encoder, positives, [["a {token}"]] * 3, start, settings, negatives)
    assert all(trainer.step(i)["loss"] > 0 for i in range(4))
    for key in family.keys:
        assert not trainer.vectors[key].equal(start[key]) and trainer.vectors[key].isfinite().all()
    assert unchanged(before[0], shared[0].model) and unchanged(before[1], shared[1].cond_stage_model)


def test_a_word_means_the_same_from_a_file(bridge, pack, shared, tmp_path):
    """The saved file through core's `embedding:` syntax, against the conditioning of training."""
    embedding, (_, clip) = pack.training.embedding, shared
    caption = "a cat in the style of {token}"
    with bridge.training_mode(), torch.no_grad():
        own = bridge.private_clip(clip)
        start, encoder = bridge.starting_vectors(own, "red dog", 2), bridge.ComfyTextEncoder(own)
        vectors = {k: v + numbers(*v.shape, seed=9) * 0.1 for k, v in start.items()}
        trained, before = encoder.encode([caption], [vectors]), encoder.encode([caption], [start])
    (tmp_path / "my-word.safetensors").write_bytes(embedding.to_bytes(embedding.Embedding(vectors, "my-word")))
    for tokenizer in bridge.encoder_tokenizers(clip).values():
        tokenizer.embedding_directory = [str(tmp_path)]
    with torch.inference_mode():
        states, pooled = conditioning(clip, bridge.spell(caption, "my-word"))
    assert (states - trained.states).abs().max() <= 1e-5 and same(pooled, trained.pooled)
    assert (before.states - trained.states).abs().max() > 1e-3


def test_captions_of_one_length_pass_together(bridge, shared, family):
    """Against core, which takes one at a time: states, summaries and gradients, of captions short, long, weighted and empty."""
    captions = [
        "a {token} cat",
        "a cat in the style of {token}",
        "a ({token}:1.3) cat",
        "",
        " ".join(["red cat,"] * 30) + " {token}",
    ]
    with bridge.training_mode():
        own = bridge.private_clip(shared[1])
        start = bridge.starting_vectors(own, "red dog", 2)
        groups = [{k: v.clone().requires_grad_() for k, v in start.items()} for _ in range(2)]
        told = [(c, g) for g in groups for c in captions]
        passes = []
        for part in own.cond_stage_model.children():
            part.register_forward_hook(lambda part, *_: passes.append(part))

        def of_each(encode):
            passes.clear()
            cond = encode()
            probe = cond.states * numbers(*cond.states.shape, seed=4)
            (probe.sum() + (0 if cond.pooled is None else cond.pooled.sum())).backward()
            found = [v.grad for g in groups for v in g.values() if v.grad is not None]
            for v in (v for g in groups for v in g.values()):
                v.grad = None
            return cond, found, len(passes)

        encoder, stacked = bridge.ComfyTextEncoder(own), bridge.Conditioning.stacked
        cond, slopes, few = of_each(lambda: encoder.encode(*map(list, zip(*told, strict=True))))
        one_by_one = lambda: stacked([encoder.encode([c], [g]) for c, g in told])  # noqa: E731
        expected, expected_slopes, many = of_each(one_by_one)
        assert not any("encode" in vars(part) for part in own.cond_stage_model.children())
    assert cond.tokens == expected.tokens and (cond.states - expected.states).abs().max() <= 1e-5
    assert same(cond.pooled, expected.pooled)
    assert len(slopes) == len(expected_slopes) > 0
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(slopes, expected_slopes, strict=True))
    assert few < many / 1.5


def test_words_survive_a_caption_of_300_words(bridge, shared, family):
    """Core reads long captions in pieces, so nothing is cut off at 77: every vector gets a gradient."""
    caption = " ".join(["a red cat on green grass under a blue sky,"] * 30) + " {token:dog} in the style of {token}"
    assert len(caption.split()) > 300
    with bridge.training_mode():
        own = bridge.private_clip(shared[1])
        start = {"": bridge.starting_vectors(own, "red", 2), "dog/": bridge.starting_vectors(own, "dog", 2)}
        leaves = {o + k: v.clone().requires_grad_() for o, vectors in start.items() for k, v in vectors.items()}
        cond = bridge.ComfyTextEncoder(own).encode([caption], [leaves])
        (cond.states.square().sum() + (0 if cond.pooled is None else cond.pooled.square().sum())).backward()
    # Of FLUX.1's clip_l only the summary of the first 77 tokens reaches the model.
    read = {k: v.grad is not None and bool((v.grad.norm(dim=1) > 0).all()) for k, v in leaves.items()}
    assert read == {k: (family.says, k[-6:]) != ("FLOW", "clip_l") or "t5xxl" not in family.keys for k in leaves}


def test_two_words_are_what_two_files_would_be(bridge, pack, shared, tmp_path):
    embedding, (_, clip) = pack.training.embedding, shared
    caption = "a {token:dog} in the style of {token}"
    with bridge.training_mode(), torch.no_grad():
        own = bridge.private_clip(clip)
        learned = {
            o + k: v + 0.1 * numbers(*v.shape, seed=n)
            for n, o in enumerate(("", "dog/"))
            for k, v in bridge.starting_vectors(own, "red cat", 2).items()
        }
        trained = bridge.ComfyTextEncoder(own).encode([caption], [learned])
    for word, vectors in embedding.Embedding.of(learned, "my", {}).words("my").items():
        (tmp_path / f"{word}.safetensors").write_bytes(embedding.to_bytes(embedding.Embedding(vectors, word)))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["my-dog.safetensors", "my.safetensors"]
    for tokenizer in bridge.encoder_tokenizers(clip).values():
        tokenizer.embedding_directory = [str(tmp_path)]
    with torch.inference_mode():
        states, pooled = conditioning(clip, "a embedding:my-dog in the style of embedding:my")
    assert (states - trained.states).abs().max() <= 1e-5 and same(pooled, trained.pooled)


def test_a_learned_word_can_be_the_start(bridge, pack, family, shared):
    """`embedding:NAME` in the start, alone and beside plain words."""
    _, clip = shared
    learned = {key: numbers(2, 32, seed=i) for i, key in enumerate(family.keys)}
    with bridge.training_mode():
        own = bridge.private_clip(bridge.with_embeddings(clip, {"word": learned}))
        alone = bridge.starting_vectors(own, "embedding:word", 3)
        blank = "qwen3_4b" in family.keys  # to which the blank behind the cat is a piece of its own
        beside = bridge.starting_vectors(own, "cat embedding:word", 3 + blank)
        cat = bridge.starting_vectors(own, "cat", 1)
    for key in family.keys:
        assert torch.equal(alone[key], learned[key][[0, 1, 0]])
        assert torch.equal(beside[key][-2:], learned[key]) and torch.equal(beside[key][:1], cat[key])


@pytest.mark.parametrize("vectors, words", [({"clip_l": 16}, "16 numbers per vector, and this CLIP's clip_l takes 32"),
                                            ({"clip_g": 32}, "clip_l has no vectors for the start 'embedding:word'")])  # fmt: skip
def test_a_learned_word_that_does_not_fit_is_no_start(bridge, small_models, vectors, words):
    import importlib

    families = importlib.import_module(f"{small_models.__name__}.families").FAMILIES
    with torch.inference_mode():
        clip = families["SDXL"].clip()
    with bridge.training_mode(), pytest.raises(ValueError, match=words):
        own = bridge.private_clip(
            bridge.with_embeddings(clip, {"word": {k: numbers(1, n) for k, n in vectors.items()}})
        )
        bridge.starting_vectors(own, "embedding:word", 1)


def test_words_for_qwen_image_are_refused_by_name(bridge, small_models):
    """Core's own tokenizer of its prompts breaks on vectors, and reads no file of them."""
    from counterpoint.training.embedding import Embedding

    with torch.inference_mode():
        clip = small_models.families.FAMILIES["Qwen-Image"].clip()
    word = Embedding({"qwen25_7b": numbers(1, 32)}, "mine")
    for refused in (lambda: bridge.starting_vectors(clip, "cat", 1), lambda: bridge.check_embedding_fits(clip, word)):
        with pytest.raises(ValueError, match="QwenImageTokenizer.* takes learned words: use Train Style LoRA"):
            refused()
