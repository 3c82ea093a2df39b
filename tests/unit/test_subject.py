"""Where a prompt names its subject, and where the network sees it."""

import itertools

import pytest
import torch

from harness.small_nets import numbers

READ_IN_ORDER = ("SD1.5", "SD2", "SDXL", "FLUX.2", "Qwen-Image", "Z-Image")  # a word changes nothing before it
PROMPTS = {  # a prompt, its subject, what else might stand for it
    "a red fox in the snow": ("fox", "owl"),
    "Fox at night": ("fox", "owl"),
    "a photo of a red fox, oil on canvas": ("red fox", "red owl"),
    "(two foxes:1.3) in a wood": ("fox", "owl"),
    "a fox": ("fox", "owl"),
}


@pytest.fixture
def words(pack):
    return pack.nodes.attention.words


@pytest.fixture
def clip_of(small_models):
    def clip_of(name: str):
        with torch.inference_mode():
            return small_models.families.FAMILIES[name].clip()

    return clip_of


def encoded(clip, prompt: str) -> torch.Tensor:
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0][0]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", READ_IN_ORDER)
def test_the_first_word_of_the_subject_is_where_another_changes_the_text(words, clip_of, family, prompt):
    """These encoders read in order, so the first place that another subject changes is that of the subject."""
    clip, (subject, other) = clip_of(family), PROMPTS[prompt]
    unlike = prompt.replace("fox", "owl").replace("Fox", "Owl")
    assert unlike != prompt and other in unlike.lower()
    said, unsaid = encoded(clip, prompt), encoded(clip, unlike)
    shortest = min(len(said), len(unsaid))
    changed = (said[:shortest] - unsaid[:shortest]).abs().amax(1).gt(1e-3 * said.abs().max()).nonzero().flatten()[0]
    places, named = words.subject_words(clip, prompt, subject.split()[-1], len(said))
    assert places[named][0] == changed and len(places) < 16


def test_a_t5_ends_the_text(words, clip_of, small_models):
    """It reads both ways; its words are those that it marks as such, and lie behind a CLIP's 77 where there is one."""
    import comfy.text_encoders.sd3_clip as sd3

    flux = clip_of("FLUX.1")
    with torch.inference_mode():
        three = small_models.families._clip(sd3.SD3Tokenizer, sd3.sd3_clip(t5=True, dtype_t5=torch.float32))
    prompt = "a photo of a red fox, oil on canvas"
    tokens = flux.tokenize(prompt)["t5xxl"][0]
    places, named = words.subject_words(flux, prompt, "red fox", len(tokens))
    spelled = "".join(flux.tokenizer.t5xxl.inv_vocab[tokens[i][0]] for i in places[named])
    assert spelled.replace("\u2581", "") == "redfox" and len(tokens) >= 256
    shorter = len(three.tokenize(prompt)["t5xxl"][0])
    behind, also = words.subject_words(three, prompt, "red fox", 77 + shorter)
    assert behind[also].tolist() == [5, 6, *(places[named] + 77).tolist()]


def test_a_blank_alone_is_no_word(words, clip_of):
    """T5 has one before some words, which would look like a word that is not the subject."""
    clip = clip_of("FLUX.1")
    assert any(clip.tokenizer.t5xxl.inv_vocab[t] == "\u2581" for t, _ in clip.tokenize("fox")["t5xxl"][0])
    places, named = words.subject_words(clip, "fox", "fox", len(clip.tokenize("fox")["t5xxl"][0]))
    assert named.all() and len(places)


@pytest.mark.parametrize("family", ("SD1.5", "FLUX.1", "Qwen-Image"))
def test_all_mentions_count_and_nothing_else(words, clip_of, family):
    clip = clip_of(family)

    def named(prompt: str, subject: str) -> int:
        return int(words.subject_words(clip, prompt, subject, len(encoded(clip, prompt)))[1].sum())

    once = named("a cat in the snow", "cat")
    assert once and named("a cat and another CAT, cats everywhere", "cat") >= 3 * once
    assert named("a catalogue of concatenated objects", "cat") == 0
    assert named("a cat", "") == 0


def test_sections_beyond_the_first_are_read_too(words, clip_of):
    clip, prompt = clip_of("SD1.5"), "a bird " * 40 + "and a fox"
    places, named = words.subject_words(clip, prompt, "fox", 154)
    assert len(places) == 83 and (places[named] > 77).all() and named.sum() == 1


def test_a_learned_word_can_be_the_subject(words, clip_of, bridge):
    clip = bridge.with_embeddings(clip_of("SD1.5"), {"rex": {"clip_l": numbers(3, 32)}})
    places, named = words.subject_words(clip, "a photo of embedding:rex in the snow", "embedding:rex", 77)
    assert places[named].tolist() == [4, 5, 6]


def test_a_prompt_without_the_subject_is_refused(words, clip_of):
    clip = clip_of("SD1.5")
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("a dog"))
    with pytest.raises(ValueError, match="'a dog' does not name the subject 'fox': write the same words in both"):
        words.name_subject(conditioning, clip, ["a dog"], "fox")


def test_every_caption_of_the_world_names_its_object(words, pack, comfy):
    """The grammar's captions and their paraphrases; the reference's own look-up finds none of its shipped captions."""
    grammar, world = pack.training.pocket.grammar, pack.training.pocket.world
    clip, scenes = pack.nodes.pocket_models.load_clip(), world.sample_scenes(200, seed=3)
    shapes, found, said = world.ATTRIBUTES["shape"], 0, 0
    for seed in range(3):
        for i, caption in enumerate(grammar.captions(scenes, seed)):
            shape = shapes[int(scenes.shape[i])]
            said += shape in caption
            found += shape in caption and bool(words.subject_words(clip, caption, shape, 77)[1].any())
    assert said > 300 and found == said


@pytest.fixture
def subject(pack):
    return pack.nodes.attention.subject


def test_otsu_is_the_best_of_all_thresholds(pack):
    otsu, values = pack.training.otsu.otsu, torch.cat([numbers(40, seed=1) * 0.1 + 1, numbers(25, seed=2) * 0.3 + 3])

    def between(threshold: float) -> float:
        low, high = values[values <= threshold], values[values > threshold]
        return len(low) * len(high) * float(low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

    threshold, contrast = otsu(values)
    assert between(threshold) == pytest.approx(max(between(float(t)) for t in values), rel=1e-6)
    assert contrast == pytest.approx(0.5, abs=0.1)
    assert otsu(torch.full((9,), 0.3)) == (pytest.approx(0.3), 0.0)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_a_blob_is_found_and_a_flat_map_shows_nothing(subject, noise):
    """A blob at 16 x 16 and 8 x 8, layer by layer; what is flat is no subject, not half of the picture."""
    truth = torch.zeros(16, 16)
    truth[4:12, 6:14] = 1
    fine = torch.stack([0.1 + 0.4 * truth, torch.full((16, 16), 0.2)])
    maps = subject.SubjectMaps()
    assert maps.masks() is None
    for layer in range(4):
        maps.add((fine + noise * numbers(2, 16, 16, seed=layer) * (fine > 0.2)).flatten(1), (16, 16))
        maps.add(torch.nn.functional.avg_pool2d(fine[:, None], 2).flatten(1), (8, 8))
    maps.close_step()
    found, flat = maps.masks()
    assert (found * truth).sum() / (found + truth).clamp(max=1).sum() >= 0.9 and not flat.any()
    kept = [t for t in vars(maps).values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() for t in kept) <= 2 * 16 * 16, "one map for each picture, and nothing else"


def test_steps_are_averaged_with_less_and_less_weight(subject):
    maps, steps = subject.SubjectMaps(memory=0.5), [numbers(1, 16, seed=s).abs() for s in range(3)]
    for step in steps:
        maps.add(step, (4, 4))
        maps.close_step()
        maps.close_step()  # a second evaluation's end without a new reading changes nothing
    expected = (steps[0] * 0.25 + steps[1] * 0.5 + steps[2]) / 1.75
    assert (maps.maps.flatten() - expected.flatten()).abs().max() <= 1e-6


def test_attention_to_the_subject_is_a_share_of_the_real_words(subject):
    q, k, named = numbers(2, 6, 8), numbers(2, 5, 8, seed=2), torch.tensor([False, True, False, False, True])
    got = subject.attention_to(q, k, named)
    for token in range(6):
        shares = []
        for head in range(2):
            logits = [float(q[head, token] @ k[head, word]) / 8**0.5 for word in range(5)]
            weights = [torch.tensor(logit).exp() for logit in logits]
            shares.append(float(sum(itertools.compress(weights, named)) / sum(weights)))
        assert float(got[token]) == pytest.approx(sum(shares) / 2, abs=1e-6)


def test_masks_grow_with_their_size(subject):
    """One token of 64, none of 16."""
    for side, grown in ((16, 0), (64, 1), (128, 2)):
        maps, dot = subject.SubjectMaps(), torch.zeros(1, side, side)
        dot[0, 8, 8] = 1
        maps.add(dot.flatten(1), (side, side))
        maps.close_step()
        assert maps.masks().sum() == (2 * grown + 1) ** 2


def test_the_network_sees_the_object_where_it_is(pack, comfy):
    """Pictures of the world, whose masks are exact, half noised: every word that describes the object, read in the second half."""
    world, models, attention = pack.training.pocket, pack.nodes.pocket_models, pack.nodes.attention
    scenes = world.world.sample_scenes(24, 77)
    shapes = [world.grammar.words("shape", int(s)) for s in scenes.shape]
    said = [(world.grammar.content(scenes, i), world.grammar.factor_words(scenes.combination(i))) for i in range(24)]
    prompts = [", ".join(each) for each in said]
    clip, painted = models.load_clip(), world.painter.paint(scenes)
    with torch.inference_mode():
        latents = models.load_vae().encode(painted.image.movedim(1, -1))
        found = [
            seen_in(attention, models, clip, *each) for each in zip(prompts, shapes, latents.split(1), strict=True)
        ]
    truth = torch.nn.functional.adaptive_avg_pool2d(painted.mask[:, None].float(), 16)[:, 0] > 0.3
    found = torch.cat(found).bool()
    shared = (found & truth).flatten(1).sum(1) / (found | truth).flatten(1).sum(1)
    assert shared.mean() > 0.6


def seen_in(attention, models, clip, prompt: str, shape: str, latents: torch.Tensor) -> torch.Tensor:
    """One step from half-way, without sharing; (1, 16, 16)."""
    import comfy.sample

    positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    described = prompt[: prompt.index(shape) + len(shape)].split(" ", 1)[1]
    positive = attention.words.name_subject(positive, clip, [prompt], described)
    model = attention.patch.with_shared_attention(models.load_model(), None, attention.patch.How(strength=0.0))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    made = comfy.sample.sample(
        model, noise, 1, 1.0, "euler", "normal", positive, positive, latents, denoise=0.5, disable_pbar=True, seed=1
    )
    return attention.patch.found_masks(model, made)
