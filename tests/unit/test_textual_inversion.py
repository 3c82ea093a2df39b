"""Textual inversion and its contrastive methods against the same mathematics written out step by step in float64."""

import contextlib
import copy
import math

import pytest
import torch

SHAPE = (2, 3, 3)  # of a latent
WIDTHS = {"clip_l": 5, "clip_g": 7}
METHODS = ("plain", "paper", "reference point")


class TinyText:
    """Every vector speaks through a matrix of its own; every caption adds a direction of its own."""

    def __init__(self):
        generator = torch.Generator().manual_seed(11)
        self.matrices = {key: torch.randn(4, width, 6, generator=generator) for key, width in WIDTHS.items()}
        self.asked: list[list[str]] = []

    def encode(self, captions, vectors):
        self.asked.append(list(captions))
        states = []
        for caption, leaves in zip(captions, vectors, strict=True):
            own = torch.randn(6, generator=torch.Generator().manual_seed(sum(caption.encode())))
            said = sum(torch.einsum("kw,kwo->o", v, self.matrices[key][: len(v)].to(v)) for key, v in leaves.items())
            states.append(torch.tanh(said + own.to(said)))
        return self.conditioning(torch.stack(states)[:, None], None)


class TinyModel:
    """Predicts noise from the noisy latent and a push that the text gives; differentiable in any precision."""

    def __init__(self):
        generator = torch.Generator().manual_seed(12)
        self.push = torch.randn(6, math.prod(SHAPE), generator=generator)
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.poison: dict[int, tuple[int, float]] = {}  # call -> (row, what its error becomes)

    def sigmas(self, n, generator):
        return 0.2 + 4 * torch.rand(n, generator=generator)

    def snr(self, sigma):
        return sigma**-2

    def error(self, latents, noise, sigma, cond):
        self.seen.append((latents, noise, sigma))
        s = sigma.view(-1, 1, 1, 1).to(latents)
        push = (cond.states[:, 0] @ self.push.to(latents)).view(-1, *SHAPE)
        error = torch.sin((latents + s * noise) / (1 + s * s) ** 0.5 + push) - noise
        row, value = self.poison.get(len(self.seen), (0, 0.0))
        spoiled = torch.zeros(len(error), 1, 1, 1)
        spoiled[row] = value
        return error + (error * spoiled if value else 0)


@pytest.fixture
def ti(pack):
    TinyText.conditioning = pack.training.protocols.Conditioning
    return pack.training.textual_inversion


def vectors(k: int = 2, encoders: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    keys = list(WIDTHS)[:encoders]
    return {key: 0.3 * torch.randn(k, WIDTHS[key], generator=generator) for key in keys}


def pictures(n: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def make(ti, n: int = 5, k: int = 2, encoders: int = 2, ways=None, **settings):
    ways = ways or [[f"picture {i} {{token}}"] for i in range(n)]
    settings = {"steps": 20, "batch": 3, "learning_rate": 0.05, "weighting": "low frequencies", **settings}
    return ti.TextualInversion(
        TinyModel(), TinyText(), pictures(n), ways, vectors(k, encoders), ti.Settings(**settings), pictures(n, seed=2)
    )


def run(trainer, steps: int, first: int = 0) -> list[dict[str, float]]:
    return [trainer.step(i) for i in range(first, steps)]


def same(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# The oracle: one pass per group, float64, nothing shared with the code.


def slow_gradient(trainer, latents, noise, sigma, captions, at) -> dict[str, torch.Tensor]:
    leaves = {key: v.detach().double().clone().requires_grad_() for key, v in at.items()}
    cond = TinyText().encode(captions, [leaves] * len(captions))
    error = TinyModel().error(latents.double(), noise.double(), sigma.double(), cond)
    snr = sigma.double() ** -2
    weight = torch.minimum(torch.minimum(snr + 1, torch.tensor(5.0)) / snr, torch.tensor(10.0))
    loss = sum(w * (e**2).mean() for w, e in zip(weight, error, strict=True)) / len(error)
    loss.backward()
    return {key: v.grad for key, v in leaves.items()}


def by_hand(trainer, steps: int) -> dict[str, torch.Tensor]:
    """What `trainer`, which has run, should have come to: the methods as they are written, and Adam."""
    s, start = trainer.settings, {key: v.double() for key, v in trainer.start.items()}
    v = {key: x.clone() for key, x in start.items()}
    first, second = ({key: torch.zeros_like(x) for key, x in v.items()} for _ in range(2))
    negatives = []  # gradients, one for each step
    for t, (seen, captions) in enumerate(zip(trainer.denoiser.seen, trainer.encoder.asked, strict=True), 1):
        latents, noise, sigma = (x[: s.batch] for x in seen)
        g = slow_gradient(trainer, latents, noise, sigma, captions[: s.batch], v)
        if s.method != "plain":
            contrast = seen[0][s.batch :]
            at = v if s.method == "paper" else start
            negatives.append(slow_gradient(trainer, contrast, noise, sigma, captions[: s.batch], at))
            for key in g:
                n = negatives[-1][key]
                if s.method == "reference point":
                    decayed = sum(
                        s.average ** (t - j) * (1 - s.average) * past[key] for j, past in enumerate(negatives, 1)
                    )
                    n = decayed / (1 - s.average**t)
                shared = (g[key] * n).sum() / (n * n).sum()
                if s.method == "paper" or shared > 0:
                    g[key] = g[key] - s.strength * shared * n
        rate = s.learning_rate * min(1, t / 10) * (1 - 0.9 * (t - 1) / s.steps)
        for key in v:
            first[key] = 0.9 * first[key] + 0.1 * g[key]
            second[key] = 0.99 * second[key] + 0.01 * g[key] ** 2
            v[key] = v[key] - rate * (first[key] / (1 - 0.9**t)) / ((second[key] / (1 - 0.99**t)).sqrt() + 1e-8)
    assert t == steps
    return v


@pytest.mark.parametrize(
    "method, strength",
    [("plain", 1.0), ("paper", 1.0), ("paper", 0.5), ("reference point", 1.0), ("reference point", 0.4)],
)
def test_a_method_is_what_it_says(ti, method, strength):
    trainer = make(ti, method=method, strength=strength)
    run(trainer, 20)
    for key, want in by_hand(trainer, 20).items():
        moved = (want - trainer.start[key]).abs().max()
        assert moved > 0.1, "the oracle stood still"
        assert (trainer.vectors[key].double() - want).abs().max() <= 2e-4 * moved


def test_weights_of_noise_levels(pack):
    """min(SNR, 5) / SNR; min(SNR + 1, 5) / SNR but never above 10; 1."""
    want = {"min-SNR": [1, 1, 1, 0.5], "low frequencies": [10, 2, 1.25, 0.5], "uniform": [1, 1, 1, 1]}
    snr = torch.tensor([0.01, 1.0, 4.0, 10.0])
    weightings = pack.training.losses.WEIGHTINGS
    assert {name: weigh(snr).tolist() for name, weigh in weightings.items()} == {
        k: pytest.approx(v) for k, v in want.items()
    }


def test_the_methods_differ(ti):
    ends = []
    for method in METHODS:
        trainer = make(ti, method=method)
        run(trainer, 12)
        ends.append(trainer.vectors["clip_l"].detach())
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(ends) for b in ends[:i])


def test_one_sided_and_two_sided_cases_both_occur(ti):
    """Else the comparison with the oracle would not have seen the sign."""
    cosines = [said["cosine"] for method in METHODS[1:] for said in run(make(ti, method=method, encoders=1), 20)]
    assert min(cosines) < 0 < max(cosines)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("k, encoders", [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_one_stacked_pass_is_as_good_as_two(pack, ti, method, k, encoders):
    trainer = make(ti, method=method, k=k, encoders=encoders)
    trainer.vectors["clip_l"].data += 0.5  # away from the start, so that the two reference points differ
    batch = pack.training.latents.draw(trainer.latents, trainer.denoiser, 3, torch.Generator().manual_seed(8))
    captions = [f"picture {r} {{token}}" for r in batch.rows]
    _, positive, negative, _ = trainer._gradients(batch, captions)
    at = trainer.start if method == "reference point" else trainer.vectors
    want = [
        slow_gradient(trainer, trainer.latents[batch.rows], batch.noise, batch.sigma, captions, trainer.vectors),
        slow_gradient(trainer, trainer.negatives[batch.rows], batch.noise, batch.sigma, captions, at),
    ]
    for got, right in zip((positive, negative), want, strict=True):
        assert len(got) == encoders
        for g, key in zip(got, right, strict=True):
            assert g.shape == (k, WIDTHS[key])
            assert (g.double() - right[key]).norm() <= 1e-5 * right[key].norm()


@pytest.mark.parametrize("method", METHODS[1:])
def test_strength_nothing_is_plain_bit_for_bit(ti, method):
    plain, none = make(ti, method="plain"), make(ti, method=method, strength=0.0)
    run(plain, 60), run(none, 60)
    assert same(plain.state_dict(), none.state_dict())


def test_contrast_needs_negatives(ti):
    with pytest.raises(ValueError, match="paper.*negatives"):
        ti.TextualInversion(
            TinyModel(), TinyText(), pictures(), [["{token}"]] * 5, vectors(), ti.Settings(method="paper")
        )


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_a_pair_shares_everything_but_the_picture(ti, batch):
    trainer = make(ti, method="paper", batch=batch)
    run(trainer, 6)
    for (latents, noise, sigma), captions in zip(trainer.denoiser.seen, trainer.encoder.asked, strict=True):
        rows = [int(c.split()[1]) for c in captions[:batch]]
        assert latents.equal(torch.cat([trainer.latents[rows], trainer.negatives[rows]]))
        assert (
            noise[:batch].equal(noise[batch:])
            and sigma[:batch].equal(sigma[batch:])
            and captions[:batch] == captions[batch:]
        )
        assert len({n.sum().item() for n in noise[:batch]}) == batch, "every picture has noise of its own"
        assert max(rows.count(r) for r in rows) == -(-batch // 5), "a picture comes again before the others have come"
    noises = torch.cat([noise for _, noise, _ in trainer.denoiser.seen])
    assert abs(noises.mean()) < 0.1 and abs(noises.std() - 1) < 0.1


def test_one_picture_is_enough(ti):
    trainer = make(ti, n=1, batch=4, method="reference point")
    assert all(math.isfinite(said["loss"]) for said in run(trainer, 5))
    assert len(trainer.denoiser.seen[0][0]) == 8


def test_captions_are_drawn_from_their_pictures_ways(ti):
    trainer = make(ti, n=2, batch=4, method="plain", ways=[["a {token}"], ["b {token}", "c {token}"]])
    run(trainer, 150)
    asked = [caption[0] for captions in trainer.encoder.asked for caption in captions]
    for (latents, _, _), captions in zip(trainer.denoiser.seen, trainer.encoder.asked, strict=True):
        for latent, caption in zip(latents, captions, strict=True):
            assert (caption == "a {token}") == latent.equal(trainer.latents[0])
    assert asked.count("a") == 300 and abs(asked.count("b") / 300 - 0.5) < 0.12


def test_a_share_of_captions_is_left_empty(ti):
    trainer = make(ti, n=2, batch=4, method="plain", ways=[["a {token}"], ["b {token}", "c {token}"]], empty=0.25)
    run(trainer, 150)
    asked = [caption[:1] for captions in trainer.encoder.asked for caption in captions]
    shares = {c: asked.count(c) / len(asked) for c in ("", "a", "b", "c")}
    assert shares == {
        c: pytest.approx(s, abs=0.05) for c, s in {"": 0.25, "a": 0.375, "b": 0.1875, "c": 0.1875}.items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_and_nothing_else_does(ti, method):
    torch.manual_seed(1)
    one, other = make(ti, method=method, seed=4), make(ti, method=method, seed=5)
    run(one, 15), run(other, 15)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = make(ti, method=method, seed=4)
    run(again, 15)
    assert same(one.state_dict(), again.state_dict()) and not same(one.state_dict(), other.state_dict())
    assert before.equal(torch.get_rng_state()), "the global generator was used"


@pytest.mark.parametrize("method", METHODS)
def test_stopped_half_way_and_resumed_is_as_if_never_stopped(pack, ti, tmp_path, method):
    loop, Run = pack.training.loop, pack.training.run.Run
    through, stopped, resumed = (make(ti, method=method) for _ in range(3))
    with Run(tmp_path / "through", {}) as folder:
        assert len(list(loop.train(through, folder, 20))) == 20
    with Run(tmp_path / "stopped", {}) as folder, contextlib.closing(loop.train(stopped, folder, 20)) as steps:
        for progress in steps:
            if progress.step == 10:
                break
    with Run(tmp_path / "stopped", {}) as folder:
        assert [p.step for p in loop.train(resumed, folder, 20)] == list(range(11, 21))
    assert same(through.state_dict(), resumed.state_dict())
    ends = [
        pack.training.artefact.read_tree(tmp_path / name / "checkpoint.safetensors") for name in ("through", "stopped")
    ]
    assert same(*ends) and ends[0]["step"] == 20


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 4], ids=["positive", "negative"])
def test_a_step_that_is_no_number_is_skipped_and_counted(ti, method, value, row):
    if method == "plain" and row == 4:
        row = 1
    trainer = make(ti, method=method)
    run(trainer, 6)
    before = copy.deepcopy(trainer.state_dict())
    trainer.denoiser.poison = {7: (row, value)}
    said = trainer.step(6)
    assert said["skipped"] == 1 and "gradient" not in said
    assert same({**before, "skipped": 1, "in_a_row": 1}, trainer.state_dict()), "something moved"
    after = run(trainer, 8, first=7)
    assert "gradient" in after[-1] and after[-1]["skipped"] == 1 and math.isfinite(after[-1]["norm"])


def test_ten_steps_in_a_row_without_a_number_have_diverged(pack, ti):
    trainer = make(ti, method="paper")
    run(trainer, 6)
    before = copy.deepcopy(trainer.vectors)
    trainer.denoiser.poison = {n: (0, math.nan) for n in range(7, 30) if n != 12}  # one good step among them
    run(trainer, 15, first=6)
    with pytest.raises(pack.training.loop.Diverged, match="10 steps in a row, the last of them step 22"):
        run(trainer, 30, first=15)
    assert not same(before, trainer.vectors) and all(v.isfinite().all() for v in trainer.vectors.values())


@pytest.mark.parametrize("method", METHODS)
def test_leaves_for_every_picture_give_the_same_gradient_and_its_noise(pack, ti, method):
    trainer = make(ti, method=method, k=2)
    batch = pack.training.latents.draw(trainer.latents, trainer.denoiser, 3, torch.Generator().manual_seed(8))
    captions = [f"picture {r} {{token}}" for r in batch.rows]
    whole, apart = (trainer._gradients(batch, captions, apart) for apart in (False, True))
    assert whole[0] == pytest.approx(apart[0], rel=1e-6) and whole[3] == {}
    for a, b in zip(whole[1] + whole[2], apart[1] + apart[2], strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()
    alone = []  # gradients of one picture each, in float64
    for i, r in enumerate(batch.rows):
        one = slice(i, i + 1)
        g = slow_gradient(
            trainer, trainer.latents[[r]], batch.noise[one], batch.sigma[one], captions[one], trainer.vectors
        )
        alone.append(torch.cat([x.flatten() for x in g.values()]))
    rows = torch.stack(alone)
    noise = rows.var(0).sum() / 3
    want = ((rows.mean(0) ** 2).sum() - noise).clamp_min(0) / noise
    assert apart[3]["signal"] == pytest.approx(want.item(), rel=1e-3, abs=1e-6)


def test_signal_is_told_of_every_fiftieth_step(ti):
    said = run(make(ti, method="paper"), 101)
    assert [i for i, each in enumerate(said) if "signal" in each] == [0, 50, 100]


def test_signal_to_noise_is_unbiased(pack):
    generator = torch.Generator().manual_seed(4)
    mean = torch.randn(50, generator=generator)
    for truth in (0.0, 0.5, 4.0):
        scale = (truth * 50 * 1.0 / 8) ** 0.5 / mean.norm()  # noise of a mean of 8 rows of unit variance is 50 / 8
        found = [
            pack.training.gradients.signal_to_noise(
                [[mean * scale + torch.randn(50, generator=generator)] for _ in range(8)]
            )
            for _ in range(300)
        ]
        assert sum(found) / 300 == pytest.approx(truth, abs=0.12)  # negative estimates count as 0


def masked(ti, masks, **settings):
    trainer = make(ti, method="paper", **settings)
    trainer.masks = masks
    return trainer


def test_pictures_teach_only_inside_their_masks(pack, ti):
    masks = (torch.rand(5, 1, 3, 3, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    masks[:, :, 0, 0] = 1
    trainer, whole = masked(ti, masks), make(ti, method="paper")
    batch = pack.training.latents.draw(trainer.latents, trainer.denoiser, 3, torch.Generator().manual_seed(8))
    captions = [f"picture {r} {{token}}" for r in batch.rows]
    loss, _, negative, _ = trainer._gradients(batch, captions)
    leaves = [trainer.vectors] * 3
    error = TinyModel().error(
        trainer.latents[batch.rows], batch.noise, batch.sigma, TinyText().encode(captions, leaves)
    )
    weight = pack.training.losses.low_frequencies(batch.sigma**-2)
    want = [w * e[:, m[0] > 0].square().mean() for e, m, w in zip(error, masks[batch.rows], weight, strict=True)]
    assert loss == pytest.approx((sum(want) / 3).item(), rel=1e-5)
    assert all(a.equal(b) for a, b in zip(negative, whole._gradients(batch, captions)[2], strict=True)), (
        "negatives are whole"
    )


def test_a_mask_of_everything_is_no_mask(ti):
    one, other = masked(ti, torch.ones(5, 1, 3, 3)), make(ti, method="paper")
    run(one, 10), run(other, 10)
    assert same(one.state_dict(), other.state_dict())


def test_keep_norm_holds_every_vector_at_its_length(ti):
    trainer = make(ti, method="paper", keep_norm=True, k=4)
    said = run(trainer, 15)
    for key, v in trainer.vectors.items():
        assert torch.allclose(v.norm(dim=1), trainer.start[key].norm(dim=1), rtol=1e-5)
        assert not torch.allclose(v, trainer.start[key], atol=1e-2)
    assert said[-1]["norm"] == pytest.approx(1, abs=1e-5)


def test_what_is_said_is_finite_and_right(ti):
    trainer = make(ti, method="reference point", encoders=1)
    said = run(trainer, 10)
    assert all(math.isfinite(x) for each in said for x in each.values())
    assert {"loss", "cosine", "removed", "norm"} <= said[0].keys()
    lengths = trainer.vectors["clip_l"].norm(dim=1) / trainer.start["clip_l"].norm(dim=1)
    assert said[-1]["norm"] == pytest.approx(lengths.mean().item(), rel=1e-5)


def test_the_state_is_small(ti):
    """C11: four vectors of SD1.5 with all that is kept for them."""
    start = {"clip_l": torch.zeros(4, 768) + 0.1}
    trainer = ti.TextualInversion(
        TinyModel(), TinyText(), pictures(), [["{token}"]] * 5, start, ti.Settings(method="plain")
    )
    trainer.vectors["clip_l"].grad = torch.ones(4, 768)
    trainer.optimiser.step()

    def size(node):
        if isinstance(node, torch.Tensor):
            return node.numel() * node.element_size()
        return sum(
            size(x) for x in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
        )

    assert 3 * 4 * 768 * 4 <= size(trainer.state_dict()) <= 64 * 1024
