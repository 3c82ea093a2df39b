"""What is said about results is what the result files say; the runner of claims does what is missing and nothing else."""

import importlib
import json
import statistics

import pytest
import torch

from evidence import (
    attention,
    decoder,
    held_out,
    learn_style,
    learn_style_lora,
    nsync,
    prior,
    subject,
    toy_style,
    views,
)
from harness import claim as claims
from harness.boot import ROOT
from harness.claim import Claim, Plan
from harness.priors import published_clusters
from harness.small_nets import numbers

README = (ROOT / "README.md").read_text(encoding="utf-8")
CLAIM = Claim(
    "toy",
    "",
    Plan(("a",), ("plain",), (0,)),
    Plan(("a", "b"), ("base", "plain", "paper"), (1, 2)),
    ("leak",),
    "plain",
    60,
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    return tmp_path / "toy"


def toy(asked: list):
    """A laboratory whose figures say which run they are of."""

    def measure(condition, arm, seed):
        asked.append((condition, arm, seed))
        return {"measures": {"leak": seed / 4 + (arm == "paper") * 0.25}, "more": "facts"}

    return measure


def test_the_readmes_table_of_methods_comes_from_the_results(pack):
    plan = nsync.CLAIM.confirm
    assert claims.table(nsync.CLAIM, plan.conditions, nsync.README, plan.seeds) in README
    found = claims.records(nsync.CLAIM, plan.conditions, plan.seeds)
    assert set(found) == set(plan.arms) and all(len(runs) == 15 for runs in found.values())
    paper, plain = (mean(found[arm], "style elsewhere") for arm in ("paper", "plain"))
    assert f"in {paper} of the pictures instead of {plain}" in " ".join(README.split())
    rules = {r["arm"] for r in claims.read(nsync.CLAIM, "style-1") if r["seed"] in nsync.CLAIM.screen.seeds}
    assert rules == set(nsync.ARMS) and f"None of the {len(rules)} rules" in README


def mean(runs: dict, measure: str, digits: int = 2) -> str:
    return f"{sum(m[measure] for m in runs.values()) / len(runs):.{digits}f}"


def test_what_captions_do_is_what_the_readme_says():
    found = claims.records(learn_style.CLAIM, (learn_style.CONDITION,), learn_style.SEEDS)["plain, captions"]
    said = ", ".join(f"{measure} {mean(found, measure)}" for measure in ("leak", "style elsewhere", "shape followed"))
    assert said in " ".join(README.split())


def test_what_negatives_add_to_captions_and_to_many_objects_is_what_the_readme_says(pack):
    said = " ".join(README.split())
    captions, clean = (claims.records(nsync.CLAIM, (c,), nsync.CLAIM.confirm.seeds) for c in nsync.MORE)
    assert all(len(runs) == 5 for found in (captions, clean) for runs in found.values())

    def both(found: dict, measure: str, digits: int = 2) -> str:
        return " and ".join(f"{float(mean(found[arm], measure, 9)):.{digits}f}" for arm in ("plain", "paper"))

    for measure, digits in (("leak", 2), ("style elsewhere", 2), ("KID", 1)):
        assert f"{measure} {both(captions, measure, digits)}" in said
    assert f"clean by themselves (leak {both(clean, 'leak')})" in said
    plain, paper = both(clean, "style elsewhere").split(" and ")
    assert f"in {paper} instead of {plain}" in said
    found = claims.differences(clean, "paper", "plain", "style elsewhere")
    low, high = pack.training.intervals.bootstrap(found)
    assert f"(difference {sum(found) / len(found):+.3f}, {low:+.3f} to {high:+.3f})" in said


def test_the_readmes_table_of_loras_comes_from_the_results(pack):
    plan = learn_style_lora.CLAIM.confirm
    found = claims.records(learn_style_lora.CLAIM, plan.conditions, plan.seeds)
    assert set(found) == set(plan.arms) and all(len(runs) == 3 for runs in found.values())
    assert claims.table(learn_style_lora.CLAIM, plan.conditions, learn_style_lora.README, plan.seeds) in README
    clean, plain = (mean(found[arm], "leak") for arm in ("plain, captions, none empty", "plain"))
    assert f"in {clean} of the pictures instead of {plain}" in " ".join(README.split())


def test_what_empty_captions_do_to_a_lora_is_what_the_node_says(pack):
    plan = learn_style_lora.CLAIM.confirm
    found = claims.records(learn_style_lora.CLAIM, plan.conditions, plan.seeds)
    arms = ("plain, captions, none empty", "plain, captions")
    assert [learn_style_lora.ARMS[arm]["empty"] for arm in arms] == [0, 0.25] and len(found[arms[0]]) == 3
    none, some = (f"{100 * float(mean(found[arm], 'leak', 9)):.0f} %" for arm in arms)
    inputs = pack.nodes.train_lora.TrainStyleLora.define_schema().inputs
    told = next(each.tooltip for each in inputs if each.id == "empty")
    assert f"with captions, the training object shows in {none} with 0, in {some} with 0.25." in told


def test_where_words_are_read_is_what_the_code_says(pack):
    """And each record is of the models that ship."""
    plan = subject.CLAIM.confirm
    found = claims.records(subject.CLAIM, plan.conditions, plan.seeds)
    assert set(found) == set(plan.arms) and all(len(runs) == 9 for runs in found.values())
    late, every, noun = (mean(found[arm], "overlap") for arm in plan.arms)
    said = " ".join(pack.nodes.attention.subject.__doc__.split())
    assert f"overlap by {late} (" in said and f"all layers {every})" in said and f"noun alone by {noun} (" in said
    assert {r["models"] for c in plan.conditions for r in claims.read(subject.CLAIM, c)} == {claims.models_hash()}


def test_the_readmes_table_of_held_out_styles_comes_from_the_results(pack):
    assert claims.table(held_out.CLAIM, held_out.STYLES, (), held_out.CLAIM.confirm.seeds) in README


def test_the_readmes_table_of_the_small_world_comes_from_the_results(pack):
    assert (
        claims.table(toy_style.CLAIM, (toy_style.CONDITION,), toy_style.README, toy_style.CLAIM.confirm.seeds) in README
    )


def test_how_long_the_reference_point_helps_is_what_the_readme_says():
    found = [json.loads((claims.RESULTS / "toy_reference" / f"seed-{seed}.json").read_text()) for seed in (6, 7, 8)]

    def leaks(arm: str) -> str:
        one, two, three = (f"{next(x['leak'] for x in f[arm] if x['step'] == 50):.2f}" for f in found)
        return f"{one}, {two} and {three}"

    assert f"{leaks('reference point, norm')} of the pictures instead of {leaks('plain')}" in " ".join(README.split())


def test_held_out_styles_are_learned_to_the_bar(pack):
    """The bar of the laboratory: each factor 70 %, all three 40 %, the shape kept, mean over the six."""
    found = claims.records(held_out.CLAIM, held_out.STYLES, held_out.CLAIM.confirm.seeds)
    assert all(len(runs) == 12 for runs in found.values())
    mean = {
        arm: {k: sum(m[k] for m in runs.values()) / len(runs) for k in held_out.CLAIM.measures}
        for arm, runs in found.items()
    }
    assert min(mean["learned"][k] for k in ("stroke", "paper", "line")) >= 0.7 and mean["learned"]["all three"] >= 0.4
    assert mean["learned"]["shape"] > mean["described"]["shape"] - 0.05


def test_the_results_are_of_the_models_that_ship():
    found = [r for i in range(6) for claim in (learn_style, held_out) for r in claims.read(claim.CLAIM, f"style-{i}")]
    assert found and {r["models"] for r in found} == {claims.models_hash()}


def test_the_committed_plot_is_drawn_from_the_results():
    drawing = claims.RESULTS / "learn_style" / f"{learn_style.CONDITION}.svg"
    assert drawing.read_text(encoding="utf-8") == claims.plot(
        learn_style.CLAIM, learn_style.CONDITION, learn_style.SEEDS
    )


def test_every_run_is_a_file_and_is_done_once(results):
    asked = []
    assert claims.run(CLAIM, CLAIM.confirm, "m", toy(asked))
    assert len(asked) == 12 and len(list(results.rglob("*.json"))) == 12
    (results / "b" / "paper-2.json").unlink()
    assert claims.run(CLAIM, CLAIM.confirm, "m", toy(asked))
    assert asked[12:] == [("b", "paper", 2)]
    record = json.loads((results / "b" / "paper-2.json").read_text())
    assert record.pop("seconds") >= 0
    assert record == {
        "condition": "b",
        "arm": "paper",
        "seed": 2,
        "models": "m",
        "measures": {"leak": 0.75},
        "more": "facts",
    }


def test_a_broken_off_plan_goes_on(results):
    asked = []

    def breaking(*key):
        if len(asked) == 5:
            raise KeyboardInterrupt
        return toy(asked)(*key)

    with pytest.raises(KeyboardInterrupt):
        claims.run(CLAIM, CLAIM.confirm, "m", breaking)
    assert claims.run(CLAIM, CLAIM.confirm, "m", toy(asked)) and len(asked) == len(set(asked)) == 12


def test_over_the_budget_nothing_runs_unasked(results, capsys):
    asked, plan = [], CLAIM.confirm._replace(seeds=tuple(range(11)))
    assert not claims.run(CLAIM, plan, "m", toy(asked)) and not asked
    assert "66 runs to do, 0 on record; about 66 minutes" in (said := capsys.readouterr().out)
    assert "over the budget of 60 minutes" in said
    assert claims.run(CLAIM, plan, "m", toy(asked), over_budget=True) and len(asked) == 66


def test_the_estimate_learns_from_the_records(results):
    assert claims.estimate(CLAIM, 3) == 180
    for seed, seconds in ((1, 10), (2, 20), (3, 1000)):
        file = claims.file_of(CLAIM, "a", "plain", seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"seconds": seconds}))
    assert claims.estimate(CLAIM, 3) == 60


def test_records_of_other_models_are_named_and_kept(results, capsys):
    asked = []
    claims.run(CLAIM, CLAIM.confirm, "old", toy(asked))
    assert not claims.run(CLAIM, CLAIM.confirm, "new", toy(asked))
    assert "12 records were made with other models" in capsys.readouterr().out and len(asked) == 12


def test_differences_are_paired_by_seed(results, pack):
    claims.run(CLAIM, CLAIM.confirm, "m", toy([]))
    (results / "a" / "paper-2.json").unlink()
    assert claims.table(CLAIM, ("b",)).splitlines() == [
        "| | runs | leak |",
        "|---|---|---|",
        "| base | 2 | 0.38 |",
        "| plain | 2 | 0.38 |",
        "| paper | 2 | 0.62 |",
        "| paper - plain | 2 | +0.25 (+0.25 to +0.25) |",
    ]
    found = claims.records(CLAIM, ("a",))
    assert claims.differences(found, "paper", "plain", "leak") == [0.25]
    assert "paper - plain" not in claims.table(CLAIM, ("a",)), "one pair is no interval"


def test_conditions_together_are_paired_by_condition_and_seed(results, pack):
    claims.run(CLAIM, CLAIM.confirm, "m", toy([]))
    (results / "a" / "paper-2.json").unlink()
    lines = claims.table(CLAIM, ("a", "b")).splitlines()
    assert lines[2] == "| base | 4 | 0.38 |" and lines[-1] == "| paper - plain | 3 | +0.25 (+0.25 to +0.25) |"


def test_the_plot_has_a_dot_for_each_run(results):
    claims.run(CLAIM, CLAIM.confirm, "m", toy([]))
    assert claims.plot(CLAIM, "a").count("<circle") == 6
    assert claims.plot(CLAIM, "a", seeds=(1,)).count("<circle") == 3


def test_the_model_card_in_words_is_the_model_card(pack):
    pocket_card = importlib.import_module(f"{pack.__name__}.nodes.pocket_card")
    card = json.loads((ROOT / "models" / "pocket-card.json").read_text(encoding="utf-8"))
    assert pocket_card.in_words(card) == (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    assert card | pocket_card.files_say() == card, "other files ship than the card speaks of"


def paired(pack, found: dict, arm: str, baseline: str, measure: str) -> str:
    """A difference of three digits with its interval, as a sentence says it."""
    each = claims.differences(found, arm, baseline, measure)
    low, high = pack.training.intervals.bootstrap(each)
    return f"{sum(each) / len(each):+.3f}, {low:+.3f} to {high:+.3f}"


def test_the_readmes_tables_of_shared_attention_come_from_the_results(pack):
    plan, said = attention.CLAIM.confirm, " ".join(README.split())
    found = {c: claims.records(attention.CLAIM, (c,), plan.seeds) for c in plan.conditions}
    for condition, arms in found.items():
        assert set(arms) == set(plan.arms) and all(len(runs) == 8 for runs in arms.values())
        assert claims.table(attention.CLAIM, (condition,), attention.README, plan.seeds) in README
    words, whole, anchor = "shared, by words", "whole picture", "one anchor, whole"
    everything, unsaid = found["all-said"], found["colour-unsaid"]
    for arms, minus, measure, before in (
        (everything, whole, "identity", "as alike"),
        (everything, whole, "place followed", "keep more of the places"),
        (everything, "shared, a square", "place followed", "also than a square does"),
        (unsaid, whole, "place followed", "as many places"),
        (unsaid, whole, "identity", "a little less alike"),
    ):
        assert f"{before} ({paired(pack, arms, words, minus, measure)})" in said
    assert f"scenes more alike too ({paired(pack, everything, 'StyleAligned', 'unshared', 'scenes apart')})" in said
    assert f"words minus one anchor {paired(pack, unsaid, words, anchor, 'identity')})" in said
    assert f"keep more of their places ({paired(pack, unsaid, words, anchor, 'place followed')})" in said


def test_what_the_readme_says_of_priors_comes_from_the_results(pack):
    plan, said = prior.CLAIM.confirm, " ".join(README.split())
    found, screened = (
        claims.records(prior.CLAIM, plan.conditions, seeds) for seeds in (plan.seeds, prior.CLAIM.screen.seeds)
    )
    assert set(found) == set(plan.arms) and all(len(runs) == 3 for runs in found.values())
    assert prior.by_steps(plan.seeds) in README and prior.perfect() in README
    for before, arm, minus in (
        ("it does not help either (frechet ", "shift only, unnormed", "none, unnormed"),
        ("The scale does: ", "scale only", "none"),
        ("and *unnormed* ", "scale only, unnormed", "none, unnormed"),
        ("no better than one Gaussian for all (", "clusters", "whitened"),
        ("five times as wide they do worse (", "clusters x5", "clusters"),
        ("a mean computed from the text (", "ridge", "whitened"),
        ("the flow schedule (", "whitened, flow", "whitened"),
        ("(as fast as they: ", "last layer as fast", "whitened"),
    ):
        assert before + paired(pack, found, arm, minus, "frechet") in said
    fresh = claims.records(prior.CLAIM, plan.conditions, prior.LAST_CHOSEN_BEFORE)
    assert f"on three fresh ones: {paired(pack, fresh, 'last layer as fast', 'whitened', 'frechet')};" in said
    assert found["shift only"] == found["none"] and "the shift does nothing at all" in said
    whatever, collapsed = (mean(found[arm], "diversity", 3) for arm in ("paper", "none, as paper"))
    assert (
        f"(diversity {whatever}), and so does ordinary diffusion trained in its way (*none, as paper*, {collapsed})"
        in said
    )
    best, ours, true = (mean(found[arm], "cosine", 3) for arm in ("paper", "whitened", "real"))
    assert f"({best} against {ours}; true pictures {true})" in said
    assert f"other true pictures have {mean(found['real'], 'frechet', 3)}." in said
    longer = {arm: screened[f"{arm}four times as long"] for arm in ("", "paper, ", "linear, P2, ")}
    assert f"nothing in `paper` (diversity {mean(longer['paper, '], 'diversity', 3)})" in said
    linear = [mean(longer["linear, P2, "], measure, 3) for measure in ("diversity", "frechet")]
    assert f"*linear, P2*: {linear[0]}, frechet {linear[1]}, where ours has {mean(longer[''], 'frechet', 3)})" in said


@pytest.mark.parametrize("released", [False, True])
def test_paper_and_released_code_sample_as_published(pack, released):
    """Of Zhou et al.: respaced betas, the mean of the posterior with its shift written as they do, variance beta, levels 999 to 0."""
    process, starts = (
        importlib.import_module(f"{pack.__name__}.training.prior.{name}") for name in ("process", "starts")
    )
    clusters = published_clusters(starts, numbers(3, 4, seed=1), numbers(3, 4, seed=2).abs() + 0.2, scale=5.0)
    texts, noise = numbers(5, 4, seed=3).double(), [numbers(5, 4, seed=10 + i).double() for i in range(8)]
    kept, start = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0), clusters.start(texts)

    def network(z, t):
        return 0.7 * z.sin() - 0.001 * t

    std, grid, asked = start.scale * (not released), [0, 143, 285, 428, 571, 714, 856, 999], []
    z = start.mean + std * noise[0]
    for i in reversed(range(8)):
        x0, now = network(z, grid[i]), kept[grid[i]]
        before = kept[grid[i - 1]] if i else torch.ones(())
        beta = 1 - now / before
        c1, c2 = beta * before.sqrt() / (1 - now), (1 - beta).sqrt() * (1 - before) / (1 - now)
        c3 = beta * (1 - before.sqrt()) / (1 - now)
        mean = clusters.start(x0).mean if released else start.mean
        z = (
            c1 * x0
            + c2 * z
            + (c3 - c2 * (1 - (1 - beta).sqrt())) * mean
            + (i > 0) * beta.sqrt() * std * noise[8 - i - (i == 0)]
        )

    def predict(x, t):
        asked.append(t)
        return network(x, t)

    name = "released" if released else "fixed large"
    *_, made = prior.as_published(name, clusters, predict, start, process.schedule("linear"), 8, iter(noise))
    assert asked == grid[::-1] and torch.allclose(made, z, atol=1e-12)
    again = [-x for x in noise]
    *_, other = prior.as_published(name, clusters, predict, start, process.schedule("linear"), 8, iter(again))
    assert torch.equal(made, other) == released
    asked.clear()
    list(prior.as_published(name, clusters, predict, start, process.schedule("linear"), 1, iter(noise)))
    assert asked == [0], "one step is asked at the level of least noise"


def test_the_readmes_table_of_feature_warp_comes_from_the_results(pack):
    claim, said = views.CLAIM, " ".join(README.split())
    found = claims.records(claim, (views.CONDITION,), claim.confirm.seeds)
    assert set(found) == set(claim.confirm.arms) and all(len(runs) == 6 for runs in found.values())
    assert claims.table(claim, (views.CONDITION,), views.README, claim.confirm.seeds) in README
    unshared, early, late, features, rendered = (
        mean(found[arm], "texture alike")
        for arm in ("unshared", "latents, end 0.2", "latents, end 1.0", "features, end 1.0", "rendered, one object")
    )
    assert (
        f"share no pattern ({unshared})" in said
        and f"most of it ({late}; the painter's own pictures {rendered};" in said
    )
    page = (ROOT / "js" / "docs" / "CounterpointFeatureWarp.md").read_text(encoding="utf-8")
    assert (
        f"by {unshared} without it, by {early} with latents until 0.2 of the sampling, by {late} with latents to the end"
        in page
    )
    assert f"by {features} with features to the end; in the painter's own pictures by {rendered}." in page


def test_agreement_is_a_mean_distance_and_a_correlation_at_the_points(pack):
    """Against loops over pixels: what lies beside the object counts for nothing, near the border of the picture neither."""
    generator = torch.Generator().manual_seed(3)
    pictures = torch.rand(2, 3, 12, 14, generator=generator)
    inside = torch.zeros(2, 12, 14, dtype=torch.bool)
    inside[0, 0:9, 2:12], inside[1, 3:12, 1:14] = True, True
    here, there = [(4, 3), (0, 2), (7, 10), (5, 6)], [(5, 4), (11, 13), (8, 2), (3, 1)]

    def around(view: int, at: tuple[int, int], size: int) -> torch.Tensor:
        (row, column), half = at, size // 2
        near = [
            pictures[view, :, r, c]
            for r in range(max(0, row - half), min(12, row + half + 1))
            for c in range(max(0, column - half), min(14, column + half + 1))
            if inside[view, r, c]
        ]
        return torch.stack(near).mean(0)

    def band(view: int, at: tuple[int, int]) -> float:
        return float(around(view, at, views.FINE).mean() - around(view, at, views.COARSE).mean())

    apart = [
        float((around(0, a, views.FINE) - around(1, b, views.FINE)).abs().mean())
        for a, b in zip(here, there, strict=True)
    ]
    a, b = [band(0, at) for at in here], [band(1, at) for at in there]
    points = tuple(torch.tensor([((c + 0.5) / 14, (r + 0.5) / 12) for r, c in each]) for each in (here, there))
    matches = pack.nodes.views.correspondences.Correspondences(2, (12, 14), {(0, 1): points, (1, 0): points[::-1]})
    colour, texture = views.agreement(pictures, inside, matches)
    assert colour == pytest.approx(sum(apart) / 4, abs=1e-5)
    assert texture == pytest.approx(statistics.correlation(a, b), abs=1e-4)


def test_the_readmes_table_of_decoders_comes_from_the_results(pack):
    claim, said = decoder.CLAIM, " ".join(README.split())
    found = claims.records(claim, (decoder.CONDITION,), claim.confirm.seeds)
    assert set(found) == set(claim.confirm.arms) and all(len(runs) == 3 for runs in found.values())
    assert {r["models"] for r in claims.read(claim, decoder.CONDITION)} == {claims.models_hash(*decoder.USED)}
    assert claims.table(claim, (decoder.CONDITION,), decoder.README, claim.confirm.seeds) in README
    style, judged = (mean(found[arm], "style") for arm in ("tokens", "true picture"))
    assert f"style is right in {style} of the pictures, where the judge finds it in {judged} of the true ones" in said
    for measure, before in (("all said", "learned from captions"), ("pattern", "mostly of the pattern")):
        pair = " instead of ".join(mean(found[arm], measure) for arm in ("tokens", "text decoder"))
        assert f"{before} ({pair})" in said
    regressor, whitened = (mean(found[arm], "CMMD") for arm in ("prior, regressor", "prior, whitened"))
    assert f"(CMMD {regressor} instead of {whitened})" in said
    for arm, minus, measure, before in (
        ("prior, guidance 1.5", "tokens", "all said", "than told a true picture ("),
        ("prior, N(0, I)", "prior, whitened", "all said", "N(0, I) minus whitened (all said "),
        ("prior, N(0, I)", "prior, whitened", "CMMD", "; CMMD "),
        ("prior, guidance 1.5", "prior, guidance 1", "all said", "guidance 1.5 minus 1 (all said "),
        ("tokens and caption", "tokens", "all said", "of a true picture adds little ("),
        ("tokens and caption", "tokens", "style", "and takes style away ("),
        ("500 steps, LoRA", "500 steps, projection alone", "alike", "than the projection alone (alike "),
    ):
        assert before + paired(pack, found, arm, minus, measure) in said
    page = (ROOT / "js" / "docs" / "CounterpointTrainImageTokens.md").read_text(encoding="utf-8")
    ships, begun = (mean(found[arm], "colour") for arm in ("tokens", "500 steps, LoRA"))
    assert f"the style of the picture in {style} of the pictures and its colour in {ships}" in page
    assert f"has the colour right in {begun}" in page
    assert f"a beginning, though CMMD does not say so: the colour is right in {begun}." in said
