"""ComfyUI's MODEL and CLIP as trainers see them: errors, gradients, words, private copies and identities."""

import copy

import pytest
import torch

KINDS = ("EPS", "V_PREDICTION", "FLOW")


@pytest.fixture
def bridge(pack):
    return pack.nodes.bridge


@pytest.fixture
def build(small_models):
    """Builders of small models, called as the executor calls a loader: under inference mode."""

    class Build:
        def __getattr__(self, name):
            def call(*args, **kwargs):
                with torch.inference_mode():
                    return getattr(small_models.builders, name)(*args, **kwargs)

            return call

    return Build()


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


# The error of a model in its own parameterisation


def target_difference(base, kind: str, x0, noise, sigma, states) -> torch.Tensor:
    """What the network says minus what it should say, from the definitions."""
    from comfy.model_base import ModelType, model_sampling

    s, sampling = sigma.view(-1, 1, 1, 1), model_sampling(base.model_config, ModelType[kind])

    def network(x):
        return base.diffusion_model(x, sampling.timestep(sigma).float(), context=states)

    if kind == "FLOW":  # x_t = (1 - s) x0 + s n, velocity n - x0
        return network((1 - s) * x0 + s * noise) - (noise - x0)
    a, b = 1 / (1 + s * s).sqrt(), s / (1 + s * s).sqrt()  # x_t = a x0 + b n
    says = network(a * x0 + b * noise)
    return says - noise if kind == "EPS" else says - (a * noise - b * x0)


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_the_difference_from_the_target(bridge, build, kind):
    sigma = torch.tensor([0.05, 0.4, 0.95] if kind == "FLOW" else [0.05, 1.0, 14.0])
    x0, noise, states = numbers(3, 4, 8, 8), numbers(3, 4, 8, 8, seed=2), numbers(3, 77, 32, seed=3)
    shared = as_kind(build.sd15_model(), kind)
    with bridge.training_mode(), torch.no_grad():
        model = denoiser(bridge, shared)
        got = model.error(x0, noise, sigma, bridge.Conditioning(states, None))
        want = target_difference(model.base, kind, x0, noise, sigma, states)
    assert got.shape == x0.shape and got.dtype == torch.float32
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_noise_levels_are_stratified_in_the_models_own_time(bridge, build, kind):
    from comfy.model_base import ModelType, model_sampling

    shared = as_kind(build.sd15_model(), kind)
    sampling, n = model_sampling(shared.model.model_config, ModelType[kind]), 16
    with bridge.training_mode():
        model = denoiser(bridge, shared)
        for seed in range(5):
            sigma = model.sigmas(n, torch.Generator().manual_seed(seed))
            assert sigma.equal(model.sigmas(n, torch.Generator().manual_seed(seed))) and sigma.isfinite().all()
            time = (sampling.timestep(sigma).double() / (1000 if kind == "FLOW" else 999)).sort().values
            strata = torch.arange(n) / n
            assert (time >= strata - 1e-3).all() and (time <= strata + 1 / n + 1e-3).all()
        assert not sigma.equal(sigma.sort().values) and not sigma.equal(sigma.sort(descending=True).values)


@pytest.mark.parametrize("kind", KINDS)
def test_signal_to_noise_ratio(bridge, build, kind):
    sigma, shared = torch.tensor([0.1, 0.5, 0.9]), as_kind(build.sd15_model(), kind)
    with bridge.training_mode():
        snr = denoiser(bridge, shared).snr(sigma)
    want = ((1 - sigma) / sigma) ** 2 if kind == "FLOW" else sigma**-2
    assert torch.allclose(snr, want, rtol=1e-5)


# Gradients


@pytest.mark.parametrize("caption", ["a {token} cat", "a ({token}:1.3) cat"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_slope(bridge, build, kind, caption):
    """Central differences along the gradient and along a random direction."""
    x0, noise = numbers(2, 4, 8, 8), numbers(2, 4, 8, 8, seed=2)
    sigma = torch.tensor([0.2, 0.7] if kind == "FLOW" else [0.3, 2.0])
    shared, shared_clip = as_kind(build.sd15_model(), kind), build.sd15_clip()
    with bridge.training_mode():
        model, clip = denoiser(bridge, shared), bridge.private_clip(shared_clip)
        encoder = bridge.ComfyTextEncoder(clip)

        def loss(v):
            cond = encoder.encode([caption] * 2, [{"clip_l": v}] * 2)
            return model.error(x0, noise, sigma, cond).double().square().mean()

        vector = bridge.starting_vectors(clip, "red dog", 2)["clip_l"].requires_grad_()
        (gradient,) = torch.autograd.grad(loss(vector), [vector])
        assert gradient.norm() > 0
        for direction in (gradient / gradient.norm(), torch.nn.functional.normalize(numbers(2, 32, seed=5), dim=None)):
            h = 3e-3
            with torch.no_grad():
                slope = (loss(vector + h * direction) - loss(vector - h * direction)) / (2 * h)
            along = (gradient.double() * direction).sum()
            assert slope.item() == pytest.approx(along.item(), rel=5e-3, abs=5e-3 * gradient.norm().item())


def test_nothing_but_the_vectors_gets_a_gradient(bridge, build):
    shared, shared_clip = build.sd15_model(), build.sd15_clip()
    with bridge.training_mode():
        model, clip = denoiser(bridge, shared), bridge.private_clip(shared_clip)
        encoder = bridge.ComfyTextEncoder(clip)
        vector = torch.zeros(2, 32).add(0.1).requires_grad_()
        cond = encoder.encode(["{token}"], [{"clip_l": vector}])
        model.error(numbers(1, 4, 8, 8), numbers(1, 4, 8, 8), torch.ones(1), cond).square().mean().backward()
    assert vector.grad.abs().sum() > 0
    for module in (model.base, clip.cond_stage_model):
        assert not [name for name, p in module.named_parameters() if p.requires_grad or p.grad is not None]


def test_leaves_of_stacked_rows_are_as_good_as_separate_passes(bridge, build):
    """C1 on ComfyUI's own classes: two groups with vectors of their own in one batch."""
    x0, noise, sigma = numbers(2, 4, 8, 8), numbers(2, 4, 8, 8, seed=2), torch.tensor([0.5, 3.0])
    shared, shared_clip = build.sd15_model(), build.sd15_clip()
    with bridge.training_mode():
        model, clip = denoiser(bridge, shared), bridge.private_clip(shared_clip)
        encoder = bridge.ComfyTextEncoder(clip)
        leaves = [numbers(4, 32, seed=s).mul(0.1).requires_grad_() for s in (7, 8)]

        def losses(rows):
            cond = encoder.encode(["a {token}"] * len(rows), [{"clip_l": leaves[r]} for r in rows])
            return model.error(x0[rows], noise[rows], sigma[rows], cond).square().mean((1, 2, 3))

        together = torch.autograd.grad(losses([0, 1]).sum(), leaves)
        for row in (0, 1):
            (alone,) = torch.autograd.grad(losses([row]).sum(), leaves[row : row + 1])
            assert (together[row] - alone).norm() <= 1e-5 * alone.norm()


def test_training_leaves_the_models_bit_identical(bridge, build, pack):
    model, clip = build.sd15_model(), build.sd15_clip()
    models, texts = snapshot(model.model), snapshot(clip.cond_stage_model)
    with torch.inference_mode():
        before = clip.encode_from_tokens(clip.tokenize("a red cat"))
    ti = pack.training.textual_inversion
    with bridge.training_mode():
        own = bridge.private_clip(clip)
        start = bridge.starting_vectors(own, "cat", 1)
        trainer = ti.TextualInversion(denoiser(bridge, model), bridge.ComfyTextEncoder(own), numbers(2, 4, 8, 8), [["a {token}"]] * 2,
                                      start, ti.Settings(method="paper", steps=3, batch=2), numbers(2, 4, 8, 8, seed=4))  # fmt: skip
        for i in range(3):
            trainer.step(i)
    assert not trainer.vectors["clip_l"].equal(start["clip_l"])
    assert unchanged(models, model.model) and unchanged(texts, clip.cond_stage_model)
    with torch.inference_mode():
        assert before.equal(clip.encode_from_tokens(clip.tokenize("a red cat")))


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("error", [None, ValueError, "interruption"])
def test_the_training_flag_is_restored(bridge, monkeypatch, already, error):
    import comfy.model_management as mm

    error = mm.InterruptProcessingException if error == "interruption" else error
    monkeypatch.setattr(mm, "in_training", already)
    with torch.inference_mode():
        try:
            with bridge.training_mode():
                assert mm.in_training and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
                assert not torch.ones(1).is_inference()
                if error:
                    raise error
        except BaseException as raised:
            assert isinstance(raised, error or ())
        assert mm.in_training is already and torch.is_inference_mode_enabled()


# Words


@pytest.fixture
def disk(bridge, build, tmp_path):
    """(CLIP, vectors): the CLIP finds the same four vectors on disk as embedding:word, twelve as embedding:long."""
    from safetensors.torch import save_file

    vectors = {"clip_l": numbers(4, 32, seed=21) * 0.3}
    save_file(vectors, tmp_path / "word.safetensors")
    save_file({"clip_l": numbers(12, 32, seed=22) * 0.3}, tmp_path / "long.safetensors")
    return build.sd15_clip(0, [str(tmp_path)]), vectors


def conditioning(clip, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Through core's CLIPTextEncode."""
    import nodes

    with torch.no_grad():
        ((states, facts),) = nodes.CLIPTextEncode().encode(clip, text)[0]
    return states, facts["pooled_output"]


LONG = "a cat and a dog and a bird and a cow " * 9  # 81 words
CAPTIONS = {  # a caption, and what a person would type
    "{token}": "embedding:word",
    "a cat in the style of {token}": "a cat in the style of embedding:word",
    "{token} cat": "embedding:word cat",
    "a {token}, red": "a embedding:word, red",
    "a cat,{token}": "a cat, embedding:word",
    "a {token}. red": "a embedding:word . red",
    "({token}:1.3)": "(embedding:word:1.3)",
    "a (red {token}:1.2) cat": "a (red embedding:word:1.2) cat",
    "(({token})) cat": "((embedding:word)) cat",
    "({token})": "(embedding:word)",
    "{token} or {token}": "embedding:word or embedding:word",
    "a cat\n{token}\nred": "a cat\nembedding:word red",
    f"{LONG}{{token}}": f"{LONG}embedding:word",
    "no word at all": "no word at all",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_caption_in_training_means_what_the_saved_word_means(bridge, disk, caption):
    clip, vectors = disk
    with bridge.training_mode(), torch.no_grad():
        ours = bridge.ComfyTextEncoder(bridge.private_clip(clip)).encode([caption], [vectors])
    states, pooled = conditioning(clip, CAPTIONS[caption])
    assert ours.states.shape == states.shape and (ours.states - states).abs().max() <= 1e-6
    assert (ours.pooled - pooled).abs().max() <= 1e-6


TYPED = [
    "embedding:word", "a cat embedding:word", "embedding:word cat", "embedding:word, cat", "a cat, embedding:word, red", "embedding:word,",
    "embedding:word,, cat", "a cat,embedding:word", "(embedding:word:1.3)", "a (red embedding:word:0.7) cat", "((embedding:word))",
    "embedding:word\nred", "embedding:word\tred", "red\nembedding:word", "embedding:word  red", "embedding:word.safetensors red",
    "embedding:word[red]", "embedding:word<red>", "embedding:word embedding:word", "embedding:word, embedding:word", "embedding:long red",
    "embedding:word and embedding:long", "embedding:unknown red", "embedding:words red", r"\(embedding:word\)", f"{LONG}embedding:word", "",
]  # fmt: skip


@pytest.mark.parametrize("text", TYPED)
def test_one_syntax_for_words_in_memory_and_on_disk(bridge, disk, build, text):
    clip, vectors = disk
    memory = bridge.with_embeddings(
        build.sd15_clip(0, []), {"word": vectors, "long": {"clip_l": numbers(12, 32, seed=22) * 0.3}}
    )
    for ours, cores in zip(conditioning(memory, text), conditioning(clip, text), strict=True):
        assert ours.shape == cores.shape and (ours - cores).abs().max() <= 1e-6


def test_memory_comes_before_disk_and_leaves_the_clip_alone(bridge, disk):
    clip, vectors = disk
    plain = conditioning(clip, "embedding:word")[0]
    other = bridge.with_embeddings(clip, {"word": {"clip_l": -vectors["clip_l"]}})
    assert not conditioning(other, "embedding:word")[0].equal(plain)
    assert conditioning(other, "embedding:long")[0].equal(conditioning(clip, "embedding:long")[0])
    assert conditioning(clip, "embedding:word")[0].equal(plain)


@pytest.mark.parametrize("text", ["embedding:unknown red", "embedding:word red", "embedding:word, embedding:unknown"])
def test_a_clip_without_an_embeddings_folder_learns_words_too(bridge, build, text):
    """Of a loader that names no folder; words nobody knows are ignored there as everywhere."""
    word = {"word": {"clip_l": numbers(1, 32)}}
    ours = conditioning(bridge.with_embeddings(build.sd15_clip(0, None), word), text)[0]
    assert ours.equal(conditioning(bridge.with_embeddings(build.sd15_clip(0, []), word), text)[0])


def test_words_add_up(bridge, build):
    """Two Use Embedding nodes in a row: both words are known, the later one wins under the same name."""
    a, b = ({"clip_l": numbers(1, 32, seed=s)} for s in (1, 2))
    clip = bridge.with_embeddings(build.sd15_clip(), {"a": a})
    both = bridge.with_embeddings(clip, {"b": b})
    assert conditioning(both, "embedding:a")[0].equal(conditioning(clip, "embedding:a")[0])
    assert conditioning(bridge.with_embeddings(both, {"a": b}), "embedding:a")[0].equal(
        conditioning(both, "embedding:b")[0]
    )


def test_rows_of_a_batch_are_what_they_are_alone(bridge, build):
    """Captions of 1, 2 and 3 chunks of 77 tokens: shorter ones are repeated, as core does, which attention does not see."""
    vectors = [{"clip_l": numbers(2, 32, seed=s)} for s in (1, 2)]
    captions, shared = ["a {token}", f"{LONG}{{token}}", f"{LONG}{{token}} {LONG}"], build.sd15_clip()
    with bridge.training_mode(), torch.no_grad():
        encoder = bridge.ComfyTextEncoder(bridge.private_clip(shared))
        alone = [encoder.encode([c], [vectors[i % 2]]).states[0] for i, c in enumerate(captions)]
        assert [len(a) for a in alone] == [77, 154, 231]
        for rows in ([0, 0], [0, 1], [2, 0], [1, 2]):
            states = encoder.encode([captions[r] for r in rows], [vectors[r % 2] for r in rows]).states
            for got, r in zip(states, rows, strict=True):
                repeats = len(got) // len(alone[r])
                assert torch.equal(got, alone[r].repeat(repeats, 1)), (rows, got.shape)


def test_the_word_survives_a_caption_of_300_words(bridge, build):
    """C7: something of the caption still depends on it, with a gradient that is not nothing."""
    shared = build.sd15_clip()
    with bridge.training_mode():
        encoder = bridge.ComfyTextEncoder(bridge.private_clip(shared))
        vector = (numbers(4, 32) * 0.3).requires_grad_()
        states = encoder.encode([f"{LONG * 4}{{token}}"], [{"clip_l": vector}]).states
        (gradient,) = torch.autograd.grad(states.square().sum(), [vector])
    assert (gradient.norm(dim=1) > 0).all()


@pytest.mark.parametrize(
    "phrase, count", [("cat", 1), ("cat", 3), ("a red cat", 2), ("a red cat", 3), ("a red cat", 5)]
)
def test_vectors_start_from_the_phrase(bridge, build, phrase, count):
    clip = build.sd15_clip()
    (tokens,) = clip.tokenize(phrase)["l"]
    ids = [token for token, _ in tokens[1 : 1 + len(phrase.split())]]
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    with bridge.training_mode():
        (start,) = bridge.starting_vectors(clip, phrase, count).values()
    assert start.shape == (count, 32) and start.dtype == torch.float32 and not start.is_inference()
    assert all(row.equal(table[ids[i % len(ids)]]) for i, row in enumerate(start))


@pytest.mark.parametrize("phrase", ["", "   ", "\n"])
def test_an_initialiser_without_a_word_is_refused(bridge, build, phrase):
    with pytest.raises(ValueError, match="initialiser .* no word"):
        bridge.starting_vectors(build.sd15_clip(), phrase, 1)


def test_an_embedding_of_another_model_is_refused(bridge, build, pack):
    Embedding = pack.training.embedding.Embedding
    clip = build.sd15_clip()
    bridge.check_embedding_fits(clip, Embedding({"clip_l": torch.zeros(1, 32)}, "mine"))
    with pytest.raises(ValueError, match="'theirs' has 768 numbers per vector for clip_l.*32"):
        bridge.check_embedding_fits(clip, Embedding({"clip_l": torch.zeros(1, 768)}, "theirs"))
    with pytest.raises(ValueError, match="'theirs' is for t5xxl.*clip_l"):
        bridge.check_embedding_fits(clip, Embedding({"t5xxl": torch.zeros(1, 32)}, "theirs"))


@pytest.mark.parametrize("key", ["emb_params", "<word>"])
def test_a_word_of_another_program_can_be_used(bridge, disk, build, pack, tmp_path, key):
    """ComfyUI takes the first tensor of such a file, whatever it is called; so the same word works from memory."""
    from safetensors.torch import save_file

    clip, vectors = disk
    save_file({key: vectors["clip_l"]}, tmp_path / "theirs.safetensors")
    use = pack.nodes.embedding.UseEmbedding.execute(
        build.sd15_clip(), pack.training.embedding.load(tmp_path / "theirs.safetensors"), "theirs"
    )
    assert (
        conditioning(use.args[0], "a embedding:theirs")[0] - conditioning(clip, "a embedding:word")[0]
    ).abs().max() <= 1e-6


def test_model_and_clip_of_other_widths_do_not_belong_together(bridge, build):
    model = build.sd15_model()
    bridge.check_belong_together(model, bridge.Conditioning(torch.zeros(1, 77, 32), None))
    with pytest.raises(ValueError, match="MODEL and CLIP do not belong together.* 32 .* 48"):
        bridge.check_belong_together(model, bridge.Conditioning(torch.zeros(1, 77, 48), None))


@pytest.fixture
def sdxl_clip(comfy, small_models):
    """SDXL's pair of encoders, 32 and 48 wide."""
    import comfy.sd
    import comfy.sdxl_clip
    from comfy.supported_models_base import ClipTarget

    def build(directory=None):
        with torch.inference_mode():
            small = {**small_models.builders.CLIP_TEXT, "num_hidden_layers": 3}
            texts = {f"clip_{k}_model_config": {**small, "hidden_size": w} for k, w in (("l", 32), ("g", 48))}
            target = ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
            clip = comfy.sd.CLIP(target, embedding_directory=directory, model_options={**texts, "dtype": torch.float32})
            small_models.builders.draw_weights(clip.cond_stage_model, 3)
            clip.tokenizer.clip_l.embedding_size, clip.tokenizer.clip_g.embedding_size = 32, 48
        return clip

    return build


def test_two_encoders_have_vectors_of_their_own(bridge, sdxl_clip, tmp_path):
    from safetensors.torch import save_file

    shared = sdxl_clip()
    with bridge.training_mode():
        clip = bridge.private_clip(shared)
        start = bridge.starting_vectors(clip, "red cat", 2)
        assert {key: tuple(v.shape) for key, v in start.items()} == {"clip_l": (2, 32), "clip_g": (2, 48)}
        leaves = {key: v.requires_grad_() for key, v in start.items()}
        cond = bridge.ComfyTextEncoder(clip).encode(["a {token}"], [leaves])
        gradients = torch.autograd.grad(cond.states.square().sum() + cond.pooled.square().sum(), list(leaves.values()))
    assert all(g.norm() > 0 for g in gradients)
    save_file({key: v.detach() for key, v in start.items()}, tmp_path / "word.safetensors")
    states, pooled = conditioning(sdxl_clip([str(tmp_path)]), "a embedding:word")
    assert (cond.states - states).abs().max() <= 1e-6 and (cond.pooled - pooled).abs().max() <= 1e-6


# Private copies


def prediction(model) -> torch.Tensor:
    with torch.no_grad():
        load(model)
        return model.model.apply_model(
            numbers(1, 4, 8, 8), torch.ones(1), c_crossattn=numbers(1, 77, 32, seed=2)
        ).clone()


@pytest.mark.parametrize("factory", [True, False], ids=["loader's factory", "no factory"])
@pytest.mark.parametrize("patched", [False, True])
def test_a_private_model_is_the_same_and_its_own(bridge, build, factory, patched):
    model = build.sd15_model(5)
    if not factory:
        model.cached_patcher_init = None
    if patched:
        model = with_lora(as_kind(model, "V_PREDICTION"), 0.7)
    before = prediction(model)
    weights = snapshot(model.model)
    with bridge.training_mode():
        own = bridge.private_model(model)
        load(own)
        assert not any(p.is_inference() for p in own.model.parameters())
        assert prediction(own).equal(before)
        with torch.no_grad():
            for p in own.model.parameters():
                p.zero_()
        assert not prediction(own).equal(before)
    del own
    assert unchanged(weights, model.model) and prediction(model).equal(before)


def test_a_private_clip_is_the_same_and_its_own(bridge, build):
    clip = build.sd15_clip()
    key = next(k for k in clip.cond_stage_model.state_dict() if k.endswith("layers.0.mlp.fc1.weight"))
    with torch.inference_mode():
        clip = clip.clone()
        assert clip.add_patches({key: ("diff", (torch.full_like(clip.cond_stage_model.state_dict()[key], 0.05),))})
    before = conditioning(clip, "a cat")[0]
    assert not before.equal(conditioning(build.sd15_clip(), "a cat")[0]), "the patch does nothing"
    with bridge.training_mode():
        own = bridge.private_clip(clip)
        load(own.patcher)
        assert not any(p.is_inference() for p in own.cond_stage_model.parameters())
        assert conditioning(own, "a cat")[0].equal(before)
        with torch.no_grad():
            for p in own.cond_stage_model.parameters():
                p.zero_()
    assert conditioning(clip, "a cat")[0].equal(before)


# Identities


def test_the_same_weights_have_the_same_fingerprint(bridge, build):
    for name in ("sd15_model", "sd15_clip", "sd15_vae"):
        prints = [bridge.fingerprint(getattr(build, name)(seed)) for seed in (0, 0, 1)]
        assert prints[0] == prints[1] != prints[2], name
        assert len(prints[0]) == 12 and set(prints[0]) <= set("0123456789abcdef")


def test_weights_and_patches_change_the_fingerprint(bridge, build):
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
    prints = [bridge.fingerprint(model) for model in models]
    assert len(set(prints)) == len(prints)
    assert bridge.fingerprint(with_lora(build.sd15_model())) == prints[2], "and is the same after a restart"


@pytest.mark.parametrize("kind", KINDS[1:])
def test_another_kind_of_prediction_changes_the_fingerprint(bridge, build, kind):
    """Core's ModelSampling nodes: other pictures, another meaning of what was learned."""
    base = build.sd15_model()
    assert bridge.fingerprint(as_kind(base, kind)) != bridge.fingerprint(base)


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
def test_whatever_changes_the_conditioning_changes_the_fingerprint(bridge, build, change):
    clips = [build.sd15_clip(), build.sd15_clip()]
    base = bridge.fingerprint(clips[0])
    prints = [bridge.fingerprint(CLIPS[change](bridge, clip)) for clip in clips]
    assert prints[0] == prints[1] != base
    others = {bridge.fingerprint(CLIPS[name](bridge, clips[0])) for name in CLIPS if name != change}
    assert prints[0] not in others


def test_a_fingerprint_does_not_depend_on_what_is_loaded(bridge, build):
    """Loading a patched model writes the patched weights into the network that both share."""
    base = build.sd15_model()
    every = {name: ("diff", (torch.full_like(p, 0.01),)) for name, p in base.model.named_parameters()}
    variants = [base, base.clone(), base.clone()]
    for model, strength in zip(variants[1:], (1.0, 0.5), strict=True):
        model.add_patches(every, strength)
    prints = [bridge.fingerprint(model) for model in variants]
    for model in variants:
        load(model)
        assert [bridge.fingerprint(m) for m in variants] == prints
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_changes_nothing(bridge, build):
    model = with_lora(build.sd15_model())
    weights, patches = snapshot(model.model), copy.copy(model.patches)
    bridge.fingerprint(model)
    assert unchanged(weights, model.model) and model.patches == patches
