"""Learned words in prompts: from memory and from disk, in training and afterwards, for one encoder and for two."""

import pytest
import torch

from harness.small_nets import conditioning, numbers


@pytest.fixture
def disk(bridge, build, tmp_path):
    """(CLIP, vectors): the CLIP finds the same four vectors on disk as embedding:word, twelve as embedding:long."""
    from safetensors.torch import save_file

    vectors = {"clip_l": numbers(4, 32, seed=21) * 0.3}
    save_file(vectors, tmp_path / "word.safetensors")
    save_file({"clip_l": numbers(12, 32, seed=22) * 0.3}, tmp_path / "long.safetensors")
    return build.sd15_clip(0, [str(tmp_path)]), vectors


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
    """Captions of 1, 2 and 3 chunks of 77 tokens: each is as long as it is alone, whatever is in the batch with it."""
    vectors = [{"clip_l": numbers(2, 32, seed=s)} for s in (1, 2)]
    captions, shared = ["a {token}", f"{LONG}{{token}}", f"{LONG}{{token}} {LONG}"], build.sd15_clip()
    with bridge.training_mode(), torch.no_grad():
        encoder = bridge.ComfyTextEncoder(bridge.private_clip(shared))
        alone = [encoder.encode([c], [vectors[i % 2]]).states[0] for i, c in enumerate(captions)]
        assert [len(a) for a in alone] == [77, 154, 231]
        for rows in ([0, 0], [0, 1], [2, 0], [1, 2]):
            together = encoder.encode([captions[r] for r in rows], [vectors[r % 2] for r in rows])
            for place, r in enumerate(rows):
                assert torch.equal(together.expand([place]).states[0], alone[r]), rows


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
    with pytest.raises(ValueError, match="does not know the start"):
        bridge.starting_vectors(build.sd15_clip(), phrase, 1)


def test_an_embedding_of_another_model_is_refused(bridge, build, pack):
    Embedding = pack.training.embedding.Embedding
    clip = build.sd15_clip()
    bridge.check_embedding_fits(clip, Embedding({"clip_l": torch.zeros(1, 32)}, "mine"))
    with pytest.raises(ValueError, match="'theirs' has 768 numbers per vector for clip_l.*32"):
        bridge.check_embedding_fits(clip, Embedding({"clip_l": torch.zeros(1, 768)}, "theirs"))
    with pytest.raises(ValueError, match="'theirs' is for t5xxl.*clip_l"):
        bridge.check_embedding_fits(clip, Embedding({"t5xxl": torch.zeros(1, 32)}, "theirs"))


@pytest.mark.parametrize("parts, words", [
    (("clip_l",), "is for clip_l and this CLIP has clip_l, clip_g, so clip_g will not know it"),
    (("clip_l", "clip_g", "t5xxl"), "so its part for t5xxl is not used"),
    (("clip_l", "clip_g"), None),
])  # fmt: skip
def test_a_word_that_fits_in_part_is_used_and_told_of(sdxl_clip, pack, caplog, parts, words):
    """A word for SD 1.5 on SDXL: ComfyUI would leave clip_g without it and say nothing."""
    widths = {"clip_l": 32, "clip_g": 48, "t5xxl": 16}
    word = pack.training.embedding.Embedding({k: torch.ones(1, widths[k]) for k in parts}, "mine")
    used = pack.nodes.embedding.UseEmbedding.execute(sdxl_clip(), word, "mine")
    told = used.ui["text"] if used.ui else []
    assert [words in text for text in told] == ([True] if words else [])
    assert [r.getMessage() for r in caplog.records if "mine" in r.getMessage()] == told
    plain = conditioning(used.args[0], "a cat")[0]
    assert not torch.equal(conditioning(used.args[0], "a cat embedding:mine")[0], plain)


@pytest.mark.parametrize("width, part", [(32, "clip_l"), (48, "clip_g"), (16, None)])
def test_a_word_without_a_name_goes_where_its_width_fits(bridge, sdxl_clip, pack, width, part):
    """As core offers it to every encoder, and those of another width drop it."""
    word = pack.training.embedding.Embedding({"<s>": torch.ones(1, width)}, "mine")
    if part is None:
        with pytest.raises(ValueError, match="'mine' is for <s>, and this CLIP has clip_l, clip_g"):
            bridge.check_embedding_fits(sdxl_clip(), word)
    else:
        bridge.check_embedding_fits(sdxl_clip(), word)
        assert list(word.vectors) == [part]


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
