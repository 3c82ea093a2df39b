"""Captions: without style, without chatter, with what is wrong named; and the models that write them."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import captioners

LIST = "oil painting, watercolor, pencil drawing, painting of, drawing of, photo of, impressionist, print*, in the style of *"


@pytest.fixture
def captions(pack):
    return pack.training.captions


@pytest.fixture
def captioner(pack):
    return pack.training.captioner


# Words


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ("An oil painting of a red barn", "A red barn"),
        ("a watercolor of a cat", "a cat"),
        ("a watercolor cat", "a cat"),
        ("watercolor painting of a cat", "a cat"),
        ("Oil-painting of a cow", "A cow"),
        ("A WATERCOLOR, oil painting, of a cat", "A cat"),
        ("a watercolor and pencil drawing of a cat", "a cat"),
        ("a beautiful painting of a cat", "a cat"),
        ("A black and white photo of a dog", "A dog"),
        ("A man holding a photo of a cat", "A man holding a cat"),
        ("photo of a watercolor painting of a horse", "a horse"),
        ("a cat, in watercolor", "a cat"),
        ("a cat painted in watercolor on a table", "a cat on a table"),
        ("a cat as an oil painting with a hat", "a cat with a hat"),
        ("a cat in an impressionist garden", "a cat in a garden"),
        ("a watercolor apple", "an apple"),
        ("a person with watercolor brushes", "a person with brushes"),
        ("a cat and watercolor", "a cat"),
        ("a cat and watercolor dog", "a cat and dog"),
        ("oil painting and a cat", "a cat"),
        ("ink, a cat, watercolor", "ink, a cat"),
        ("a cat, impressionist, a dog", "a cat, a dog"),
        ("a girl, watercolor and oil painting", "a girl"),
        ("a cat; Watercolor", "a cat"),
        ("the cat (watercolor) sleeps", "the cat sleeps"),
        ("Watercolor. A cat.", "A cat."),
        ("two prints on a wall", "two on a wall"),
        ("a cat in the style of van Gogh, sitting", "a cat, sitting"),
        ("In the  style of Monet, a cat", "A cat"),
        ("a cat in the style of", "a cat"),
        ("Oil painting", ""),
        ("Watercolor.", ""),
        ("a watercolorist at work", "a watercolorist at work"),
        ("a red, and a blue cat ,", "a red, and a blue cat ,"),
    ],
)
def test_style_words_go_with_what_leads_to_them(captions, caption, left):
    assert captions.strip(caption, captions.words(LIST)) == left


def test_without_style_words_nothing_changes(captions):
    assert captions.words(" , \n ") == []
    assert captions.strip(" a  watercolor , ", []) == " a  watercolor , "


def test_letters_that_mean_something_in_patterns_are_letters(captions):
    assert captions.strip("a cat (c++), a dog", captions.words("c++")) == "a cat, a dog"
    assert captions.strip("a.b cat, axb", captions.words("a.b")) == "cat, axb"


@pytest.mark.parametrize("typed", ["*", "oil, **", "-"])
def test_a_style_word_that_would_take_all_is_refused(captions, typed):
    with pytest.raises(ValueError, match="has no letters: write words"):
        captions.words(typed)


@pytest.mark.parametrize(
    ("reply", "caption"),
    [
        ('"A cat."', "A cat"),
        ("“A cat”.", "A cat"),
        ("Caption: **A dog**\n", "A dog"),
        ("Prompt: This image shows: x and y", "X and y"),
        ("This image shows a cat on a mat.", "A cat on a mat"),
        ("The image depicts a man, standing", "A man, standing"),
        ("In this picture, there is a tree.", "A tree"),
        ("In the photo we can see a cow.", "A cow"),
        ('Sure! Here is a caption: "A red barn."', "A red barn"),
        ("<think>hm\nwell</think>\n\nA boat.", "A boat"),
        ("<think>never ended", ""),
        ("A cat.\n- A dog.", "A cat. A dog"),
        ("there are two cats", "two cats"),
        ("a picture of a cat", "a cat"),
        ("a cat...", "a cat..."),
        ("'a cat' and 'a dog'", "'a cat' and 'a dog'"),
        ("a boy's dog", "a boy's dog"),
        ("A sure sign: stop", "A sure sign: stop"),
        ("Sure-footed goats", "Sure-footed goats"),
        ("  \n ", ""),
    ],
)
def test_chatter_goes(captions, reply, caption):
    assert captions.tidy(reply) == caption == captions.tidy(caption)


def test_what_harms_a_training_is_named(captions):
    long = " ".join(["word"] * 56)
    said = captions.warnings(["a cat", "", "A cat ", "a dog", long, " "])
    assert said == [
        "pictures 2, 6: the caption is empty; write one, or strip fewer words",
        "pictures 1, 3: the same caption 2 times (a cat)",
        "picture 5: 56 words, more than the 55 or so that CLIP reads",
    ]
    assert captions.warnings(["a cat", " ".join(["word"] * 55)]) == []


def test_many_are_counted_and_some_named(captions):
    (said,) = captions.warnings(["x" * 80] * 11)
    assert said == f"pictures 1, 2, 3, 4, 5, 6, 7, 8 and 3 more: the same caption 11 times ({'x' * 60}...)"


def test_pieces_of_words_are_counted_with_what_stands_around_a_caption(captions):
    def letters(text):
        return len(text), 40

    fits = "x" * (40 - len(" in the style of picture"))
    assert captions.warnings([fits], letters) == []
    assert captions.warnings([fits + "x"], letters) == [
        "picture 1: 41 pieces of words with 'in the style of ...', and CLIP reads 40"
    ]


# Models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("blip")`: a folder with a small model, built once, to be read only."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def saved(kind):
        if kind not in made:
            made[kind] = captioners.KINDS[kind](root / kind)
        return made[kind]

    return saved


@pytest.mark.parametrize("kind", captioners.KINDS)
def test_three_at_once_say_what_each_says_alone(captioner, saved, kind):
    """Real models of each way to be asked; pictures of different sizes, which in Qwen-VL take different room."""
    folder = saved(kind)
    model = captioner.load(folder, torch.float32)
    asked = captioner.question(captioner.model_type(folder), "a red cat on the mat")
    pictures = [p[0] for p in captioners.pictures(5)]
    told = []
    together = model.replies(pictures, asked, 6, told.append)
    assert together == [model.replies([p], asked, 6)[0] for p in pictures]
    assert len(set(together)) > 1, "the pictures make no difference"
    assert told == list(range(1, len(told) + 1)) and 1 <= len(told) <= 6
    assert all(len(reply.split()) <= 6 for reply in together), "the question was repeated"
    others = {w for reply in together for w in reply.split()} - set(captioners.WORDS)
    assert all(re.match("<(loc|seg)", w) for w in others), "marks were said"


def test_every_way_to_be_asked_has_a_model_here(captioner):
    assert captioner.QUESTIONS.keys() <= captioners.KINDS.keys()


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("blip", None),
        ("vision-encoder-decoder", None),
        ("florence2", "<DETAILED_CAPTION>"),
        ("qwen2_vl", "what {x} is it"),
    ],
)
def test_each_kind_is_asked_in_its_own_way(captioner, kind, asked):
    assert captioner.question(kind, "what {x} is it") == asked


def test_a_chat_model_reads_the_prompt_and_the_template_once(captioner, saved):
    """LLaVA's template begins with <s>, and its tokenizer puts one there, too: it must stand there once."""
    model = captioner.load(saved("llava"), torch.float32)
    given = model.see([captioner.to_pil(captioners.pictures(1)[0][0])], "a red cat")
    said = model.tokenizer.decode(given["input_ids"][0]).replace(" ", "")
    assert said.startswith("<s><user><image>") and said.endswith("aredcat</s><bot>")


def test_another_prompt_gives_another_reply(captioner, saved):
    model = captioner.load(saved("qwen2_vl"), torch.float32)
    pictures = [p[0] for p in captioners.pictures(5)]
    first, second = (model.replies(pictures, asked, 6) for asked in ("a red cat on the mat", "sea"))
    assert first != second


def test_florences_reply_is_what_its_own_processor_makes_of_it(captioner, saved):
    import transformers

    folder = saved("florence2")
    model, processor = captioner.load(folder, torch.float32), transformers.AutoProcessor.from_pretrained(folder)
    pictures = [captioner.to_pil(p[0]) for p in captioners.pictures(3)]
    for picture in pictures:
        inputs = processor(images=picture, text="<DETAILED_CAPTION>", return_tensors="pt")
        said = model.model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)
        text = processor.batch_decode(said, skip_special_tokens=False)[0]
        expected = processor.post_process_generation(text, task="<DETAILED_CAPTION>", image_size=picture.size)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
            picture.height, picture.width, 3
        )
        (ours,) = model.replies([pixels / 255], "<DETAILED_CAPTION>", 6)
        assert ours.split() == expected["<DETAILED_CAPTION>"].replace("<pad>", "").split()


def test_what_is_raised_while_it_speaks_ends_it(captioner, saved):
    def stop(n):
        if n == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        captioner.load(saved("blip"), torch.float32).replies([captioners.pictures(1)[0][0]], None, 100, stop)


def test_half_precision(captioner, saved):
    model = captioner.load(saved("blip"), torch.bfloat16)
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    assert model.replies([captioners.pictures(1)[0][0]], None, 4)[0]


def test_an_identity_is_that_of_the_contents(captioner, saved, tmp_path):
    folder = saved("blip")
    same = shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copy)
    (same / "README.md").write_text("other words")
    assert captioner.identity(same) == captioner.identity(folder)
    weights = load_file(same / "model.safetensors")
    weights["text_decoder.bert.embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(weights, same / "model.safetensors", {"format": "pt"})
    assert captioner.identity(same) != captioner.identity(folder)


def test_large_files_are_sampled_to_their_end(captioner, tmp_path):
    file = tmp_path / "model.safetensors"
    data = bytearray(3_000_000)
    seen = set()
    for change in (None, 0, 2_999_999, 1_500_000):
        changed = bytearray(data)
        if change is not None:
            changed[change] = 1
        file.write_bytes(changed)
        seen.add(captioner.identity(tmp_path))
    assert len(seen) == 4


def remove(*patterns):
    def spoil(folder):
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return spoil


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


def forget_the_eyes(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "vision" not in k}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def unsafe_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def configured(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return spoil


def half_a_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("kind", "spoil", "sentence"),
    [
        ("blip", remove("config.json"), "has no config.json: copy the whole folder"),
        ("blip", half_a_config, "has a broken config.json: copy it again"),
        ("blip", remove("*.safetensors"), "has no weights: copy all its .safetensors"),
        ("blip", unsafe_weights, "weights as .bin, which may hide program code"),
        ("blip", cut, "is not complete or broken .*: copy the whole folder"),
        ("blip", forget_the_eyes, r"lacks \d+ of its model's \d+ weights .*: copy it again"),
        ("blip", remove("tokenizer*", "vocab*"), "has no tokenizer: copy its tokenizer.json"),
        ("qwen2_vl", remove("tokenizer*", "vocab*"), "has no tokenizer: copy its tokenizer.json"),
        ("blip", remove("preprocessor*"), "does not say how pictures are prepared: copy its preprocessor_config.json"),
        ("qwen2_vl", remove("chat_template*"), "has no chat template: copy its chat_template"),
        ("blip", configured(model_type="gpt2"), r"is no model that describes pictures \(model_type gpt2\)"),
        ("blip", configured(model_type=""), r"is no model that describes pictures \(model_type missing\)"),
        (
            "blip",
            configured(model_type="internvl_chat", auto_map={"AutoModel": "modeling_internvl.InternVL"}),
            "brings its own program code, which is not run: take .* such as OpenGVLab/InternVL3-1B-hf",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(captioner, saved, tmp_path, kind, spoil, sentence):
    folder = shutil.copytree(saved(kind), tmp_path / kind)
    spoil(folder)
    with pytest.raises(captioner.FolderError, match=sentence) as raised:
        captioner.load(folder, torch.float32)
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


def test_code_in_a_folder_is_never_run(captioner, saved, tmp_path):
    """A folder that asks for its own classes, for the model, the tokenizer and the processor."""
    folder = shutil.copytree(saved("blip"), tmp_path / "evil")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        facts = json.loads((folder / name).read_text())
        classes = (
            "AutoConfig",
            "AutoModel",
            "AutoModelForImageTextToText",
            "AutoTokenizer",
            "AutoImageProcessor",
            "AutoProcessor",
        )
        code = {each: ["evil.Evil", "evil.Evil"] if each == "AutoTokenizer" else "evil.Evil" for each in classes}
        (folder / name).write_text(json.dumps({**facts, "auto_map": code}))
    assert captioner.load(folder, torch.float32).replies([captioners.pictures(1)[0][0]], None, 4)[0]
    assert not (tmp_path / "hacked").exists()


def test_replies_are_kept_and_a_broken_file_is_named(captioner, tmp_path):
    file = tmp_path / "kept.json"
    assert captioner.read_replies(file) == {}
    captioner.write_replies(file, {"asked": "é"}, {"1": 'a "cat"\nand', "2": "\ud83d\udc08 🐈"})
    assert captioner.read_replies(file)["1"] == 'a "cat"\nand'
    assert json.loads(file.read_text(encoding="utf-8"))["asked"] == "é"
    for broken in ('{"replies": ', "[]", '{"replies": [1]}', "\xff"):
        file.write_text(broken, encoding="latin-1")
        with pytest.raises(ValueError, match="kept.json are broken: delete that file"):
            captioner.read_replies(file)
