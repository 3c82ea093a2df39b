"""Image tokens: what is trained is what is used, beside formulas written out in float64; texts and rows; the file."""

import importlib
import json

import pytest
import torch
from safetensors.torch import save_file

from harness.small_nets import numbers

DIM, COUNT, WIDTH, TEXT = 6, 3, 8, 5


@pytest.fixture(scope="module")
def it(pack):
    return importlib.import_module(f"{pack.__name__}.training.image_tokens")


@pytest.fixture(scope="module")
def empty(pack):
    """What a text encoder says of no text: TEXT states, each number of another size."""
    return pack.training.protocols.Conditioning(
        numbers(1, TEXT, WIDTH, seed=8) * torch.arange(1.0, WIDTH + 1), numbers(1, 4, seed=9)
    )


class Recorder:
    """A denoiser that keeps what it was told; its error depends on every token."""

    def __init__(self):
        self.told: list = []

    def sigmas(self, n, generator):
        return 0.5 + torch.rand(n, generator=generator)

    def snr(self, sigma):
        return sigma**-2

    def error(self, latents, noise, sigma, cond):
        self.told.append(cond)
        return latents + noise + cond.states.mean((1, 2)).view(-1, 1, 1, 1) * sigma.view(-1, 1, 1, 1)


def embeddings(n: int = 5) -> torch.Tensor:
    return numbers(n, DIM, seed=3) * torch.arange(1.0, DIM + 1) + 2


def started(it, seed: int = 1) -> dict:
    """As after some training: nothing at its start."""
    start = it.starting_projection(DIM, COUNT, WIDTH, seed)
    return {k: t + 0.3 * numbers(*t.shape, seed=20 + i) for i, (k, t) in enumerate(start.items())}


def trainer(pack, it, empty, noise: float = 0.0, start=None, n: int = 5, share: float = 0.0, **given):
    settings = pack.training.contrast.Settings(**{"method": "plain", "batch": 4, "empty": share, "steps": 10, **given})
    whitened = (embeddings(n) - it.moments(embeddings(n))[it.MEAN]) / it.moments(embeddings(n))[it.STD]
    network, start = torch.nn.Identity(), start or started(it)
    return it.ImageTokens(Recorder(), network, empty, numbers(n, 2, 3, 3), whitened, start, settings, noise)


def projector(it, empty, learned=None, **facts):
    return it.Projector.of(learned or started(it), it.moments(embeddings()), empty, "x", {}, facts)


def by_hand(learned: dict, embedding: torch.Tensor, empty) -> list[list[float]]:
    """Tokens of one embedding, number by number."""
    all_of = embeddings().double()
    mean = all_of.sum(0) / len(all_of)
    std = ((all_of - mean) ** 2).sum(0).div(len(all_of)).sqrt()
    z = [(embedding[j].double() - mean[j]) / std[j] for j in range(DIM)]
    tokens = []
    for k in range(COUNT):
        raw = [
            sum(learned["proj.weight"][k * WIDTH + i, j].double() * z[j] for j in range(DIM))
            + learned["proj.bias"][k * WIDTH + i].double()
            for i in range(WIDTH)
        ]
        middle = sum(raw) / WIDTH
        spread = (sum((r - middle) ** 2 for r in raw) / WIDTH + 1e-5) ** 0.5
        sizes = [(empty.states[0, :, i].double() ** 2).mean().sqrt() for i in range(WIDTH)]
        gain, shift = learned["norm.weight"].double(), learned["norm.bias"].double()
        tokens.append([((raw[i] - middle) / spread * gain[i] + shift[i]) * sizes[i] for i in range(WIDTH)])
    return tokens


# What is trained is what is used


def test_the_file_says_what_the_model_was_told(pack, it, empty):
    """The trainer works on whitened embeddings in units of the text's sizes, the file on embeddings as they come."""
    training = trainer(pack, it, empty)
    captions = [training.captions[i][0] for i in range(5)]
    told = training.conditions([*captions, ""], [training.learned])
    assert told.states.shape == (6, TEXT + COUNT, WIDTH) and told.pooled.equal(empty.pooled.expand(6, -1))
    assert told.states[:, :TEXT].equal(empty.states.expand(6, -1, -1))
    file_of = {k: v.detach() for k, v in training.learned.items()}
    file = projector(it, empty, file_of)
    assert torch.allclose(file.tokens(embeddings()), told.states[:5, TEXT:], atol=1e-4)
    assert torch.allclose(file.nothing(), told.states[5:, TEXT:], atol=1e-6)
    for i in (0, 4):
        assert torch.allclose(file.tokens(embeddings())[i].double(), torch.tensor(by_hand(file_of, embeddings()[i], empty)),
                              atol=1e-4)  # fmt: skip


def test_tokens_begin_as_large_as_the_text(it, empty):
    tokens = projector(it, empty, it.starting_projection(DIM, COUNT, WIDTH, 0)).tokens(numbers(500, DIM, seed=5) * 3)
    sizes = tokens.square().mean((0, 1)).sqrt()
    assert torch.allclose(tokens.square().sum(2).mean().sqrt(), empty.states.square().sum(2).mean().sqrt(), rtol=0.2)
    assert sizes[-1] > 3 * sizes[0], "number by number: the text's last is its largest"


def test_groups_have_leaves_of_their_own(pack, it, empty):
    training = trainer(pack, it, empty)
    groups = [started(it, 1), {k: v + 0.1 for k, v in started(it, 1).items()}]
    captions = [training.captions[i][0] for i in (0, 1)]
    both = training.conditions(captions * 2, groups).states
    for i, leaves in enumerate(groups):
        assert torch.allclose(both[2 * i : 2 * i + 2], training.conditions(captions, [leaves]).states, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_left_out_pictures_teach_the_tokens_for_nothing(pack, it, empty, share):
    training = trainer(pack, it, empty, n=40, batch=40, share=share)
    generator, left = torch.Generator().manual_seed(0), 0
    for _ in range(10):
        left += sum(isinstance(c, str) for c in training._pick_captions(list(range(40)), generator))
    assert abs(left / 400 - share) < 0.07
    training.step(0)
    assert training.learned["null"].equal(training.start["null"]) == (share == 0)
    assert training.idle() == (["null"] if share == 0 else [])


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_is_of_a_level_between_nothing_and_what_was_asked(pack, it, empty, noise):
    training = trainer(pack, it, empty, noise, n=5)
    rows = [i % 5 for i in range(2000)]
    picked = torch.stack(training._pick_captions(rows, torch.Generator().manual_seed(0)))
    added = picked - torch.stack([training.captions[r][0] for r in rows])
    levels = added.square().mean(1).sqrt()
    # E of (level x normal)^2 over levels that are uniform is noise^2 / 3
    assert added.square().mean().sqrt().item() == pytest.approx(noise / 3**0.5, rel=0.05)
    assert noise == 0 or (levels.min() < 0.1 * noise and levels.max() > noise)


@pytest.mark.parametrize("n, batch", [(5, 4), (5, 8), (1, 3), (3, 1)])
def test_every_number_of_pictures_and_every_batch_will_do(pack, it, empty, n, batch):
    """The released code fails at a last batch that is smaller than the first."""
    training = trainer(pack, it, empty, 0.2, n=n, batch=batch, share=0.5)
    said = [training.step(i) for i in range(6)]
    assert all(t.isfinite().all() for t in training.learned.values()) and said[-1]["norm"] > 0
    assert {len(told.states) for told in training.denoiser.told} == {batch}
    again = trainer(pack, it, empty, 0.2, n=n, batch=batch, share=0.5)
    assert [again.step(i) for i in range(6)] == said


def test_the_lora_learns_more_slowly(pack, it, empty):
    """Adam's first step moves each number by its rate, whatever its gradient."""
    network = torch.nn.ModuleDict(
        {"x": torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict({"to_k": torch.nn.Linear(4, 4)})})}
    )
    assert it.cross_attention(network) == ["x.attn2.to_k"]
    lora = pack.training.lora.starting_matrices(network, it.cross_attention(network), 2, 0)
    training = trainer(pack, it, empty, start={**started(it), **lora}, learning_rate=0.01)
    training.move([torch.ones_like(v) for v in training.learned.values()], 1.0)
    for k, v in training.learned.items():
        moved = (training.start[k] - v).abs().mean().item()
        assert moved == pytest.approx(0.003 if k in lora else 0.01, rel=1e-3)
    assert training.learned_inside


def test_the_size_that_is_told(pack, it, empty):
    training = trainer(pack, it, empty, start=it.starting_projection(DIM, COUNT, WIDTH, 0))
    before = training.size()["norm"]
    with torch.no_grad():
        training.learned["norm.weight"].mul_(2)
    assert before == pytest.approx(1, rel=0.3) and training.size()["norm"] == pytest.approx(2 * before, rel=1e-4)


# Embeddings


def test_numbers_that_do_not_vary_are_not_divided_by_nothing(it):
    x = torch.cat([numbers(50, 3), torch.full((50, 1), 7.0)], 1)
    found = it.moments(x)
    assert torch.allclose(found[it.STD][:3], x[:, :3].std(0, correction=0)) and found[it.MEAN][3] == 7
    assert 0 < found[it.STD][3] < 0.02
    assert it.moments(x[:1])[it.STD].equal(torch.ones(4)), "one picture"


def test_strength_leads_from_nothing_to_the_picture_and_beyond(it, empty):
    file = projector(it, empty)
    none, half, whole, more = (file.tokens(embeddings(), s) for s in (0.0, 0.5, 1.0, 1.5))
    assert none.equal(file.nothing().expand(5, -1, -1)) and not whole.equal(none)
    assert torch.allclose(half, (none + whole) / 2, atol=1e-5)
    assert torch.allclose(more - whole, whole - half, atol=1e-4)


# Texts and rows


def test_a_text_is_turned_down_to_the_empty_prompt(it, empty):
    file, text = projector(it, empty), numbers(2, 2 * TEXT + 3, WIDTH, seed=31)
    assert file.weighted(text, 1.0).equal(text)
    nothing = file.weighted(text, 0.0)
    assert nothing[:, : 2 * TEXT].equal(empty.states.repeat(2, 2, 1)) and nothing[:, 2 * TEXT :].equal(
        text[:, 2 * TEXT :]
    )
    assert torch.allclose(file.weighted(text, 0.25), 0.75 * nothing + 0.25 * text, atol=1e-5)
    assert file.weighted(text, 0.0, behind=TEXT)[:, TEXT:].equal(text[:, TEXT:]), (
        "tokens of other pictures, however many"
    )
    with pytest.raises(ValueError, match="have 8 numbers each and the conditioning has 9"):
        file.weighted(torch.zeros(1, TEXT, WIDTH + 1), 0.5)


@pytest.mark.parametrize("texts, pictures, rows", [(1, 1, 1), (1, 3, 3), (3, 1, 3), (3, 3, 3)])
def test_rows_stay_with_their_rows(it, texts, pictures, rows):
    states, tokens = numbers(texts, 7, WIDTH).half(), numbers(pictures, 2, WIDTH, seed=2)
    both = it.appended(states, tokens)
    assert both.shape == (rows, 9, WIDTH) and both.dtype == torch.float16
    for i in range(rows):
        assert both[i, :7].equal(states[i % texts]) and both[i, 7:].equal(tokens[i % pictures].half())


@pytest.mark.parametrize("states, tokens, words", [
    ((2, 7, WIDTH), (3, 2, WIDTH), "3 image embeddings for 2 prompts"),
    ((1, 7, WIDTH + 1), (1, 2, WIDTH), "have 8 numbers each and the conditioning has 9"),
])  # fmt: skip
def test_what_does_not_match_is_one_sentence(it, states, tokens, words):
    with pytest.raises(ValueError, match=words) as error:
        it.appended(torch.zeros(states), torch.zeros(tokens))
    assert "\n" not in str(error.value)


# The file


def test_a_file_comes_back_as_it_was(it, empty, tmp_path):
    made = projector(it, empty, steps=5, clip_vision="abc")
    made.lora = {"diffusion_model.x.attn2.to_k.lora_down.weight": numbers(2, 4)}
    (tmp_path / "mine.safetensors").write_bytes(it.to_bytes(made))
    back = it.load(tmp_path / "mine.safetensors")
    assert back.tensors.keys() == made.tensors.keys() and back.lora.keys() == made.lora.keys()
    assert all(torch.equal(back.tensors[k], t) for k, t in made.tensors.items()) and back.name == "mine"
    assert back.facts == {"steps": 5, "clip_vision": "abc"} and (back.dim, back.count, back.width) == (
        DIM,
        COUNT,
        WIDTH,
    )
    assert back.tokens(embeddings()).equal(made.tokens(embeddings()))


@pytest.mark.parametrize("change, words", [
    ({"null": None}, "null is missing"), ({"embedding.std": None}, "embedding.std is missing"),
    ({"embedding.std": torch.zeros(DIM)}, "embedding.std has zeros"), ({"proj.bias": torch.zeros(5)}, r"proj.bias has the shape \(5,\)"),
    ({"empty.states": torch.zeros(TEXT, 3)}, r"empty.states has the shape \(5, 3\) and not \(5, 8\)"),
    ({"null": torch.zeros(WIDTH)}, r"null has the shape \(8,\)"),
])  # fmt: skip
def test_files_that_do_not_fit_together_are_refused(it, empty, tmp_path, change, words):
    file = tmp_path / "bad.safetensors"
    tensors = {**projector(it, empty).tensors, **change}
    save_file({k: v.clone() for k, v in tensors.items() if v is not None}, file, {"format": it.FORMAT})
    with pytest.raises(ValueError, match=words) as error:
        it.load(file)
    assert "bad.safetensors holds no image tokens" in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused(it, tmp_path):
    save_file({"clip_l": torch.zeros(1, 4)}, tmp_path / "word.safetensors", {"x": json.dumps(1)})
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    for name, words in (("word", "holds no image tokens"), ("broken", "it is broken")):
        with pytest.raises(ValueError, match=words):
            it.load(tmp_path / f"{name}.safetensors")
