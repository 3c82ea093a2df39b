"""A claim as data, and the one runner of all claims: every run a JSON file, paired differences, tables, plots."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from .boot import ROOT

RESULTS = ROOT / "tests" / "evidence" / "results"
Measures = dict[str, float]
Records = dict[str, dict[tuple[str, int], Measures]]  # arm -> condition and seed -> what was measured


class Plan(NamedTuple):
    """What is run: every arm under every condition with every seed."""

    conditions: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Claim:
    """What is compared, and how far the runs may go."""

    name: str  # folder under tests/evidence/results
    about: str  # for --help
    screen: Plan  # small: which conditions and arms are worth confirming
    confirm: Plan  # on seeds that chose nothing
    measures: tuple[str, ...]
    baseline: str  # the arm that others are paired with
    seconds: float  # that a run takes on two cores, until there are records to ask
    budget: float = 3600.0  # seconds beyond which --over-budget must be said
    digits: int = 2  # after the point, in tables


def file_of(claim: Claim, condition: str, arm: str, seed: int) -> Path:
    slug = arm.replace(", ", "-").replace(" ", "-")
    return RESULTS / claim.name / condition / f"{slug}-{seed}.json"


def read(claim: Claim, condition: str) -> list[dict]:
    files = sorted((RESULTS / claim.name / condition).glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def estimate(claim: Claim, runs: int) -> float:
    """Seconds for so many runs, by the median of those on record."""
    records = [r for folder in sorted((RESULTS / claim.name).glob("*/")) for r in read(claim, folder.name)]
    known = [r["seconds"] for r in records if "seconds" in r]
    return runs * (statistics.median(known) if known else claim.seconds)


def run(
    claim: Claim, plan: Plan, models: str, measure: Callable[[str, str, int], dict], over_budget: bool = False
) -> bool:
    """Do what is not on record; True when all of the plan is. `measure` gives {"measures": {...}, other facts}.

    A record made with other models is not repeated silently: it is named, and nothing runs until it is deleted.
    """
    todo = [(c, a, s) for c, a, s in product(*plan) if not file_of(claim, c, a, s).exists()]
    stale = [file_of(claim, *k) for k in product(*plan) if k not in todo]
    stale = [file for file in stale if json.loads(file.read_text(encoding="utf-8"))["models"] != models]
    if stale:
        print(f"{len(stale)} records were made with other models, {stale[0]} for one: delete them to measure again.")
        return False
    seconds = estimate(claim, len(todo))
    print(
        f"{len(todo)} runs to do, {len(list(product(*plan))) - len(todo)} on record; about {seconds / 60:.0f} minutes.",
        flush=True,
    )
    if seconds > claim.budget and not over_budget:
        print(
            f"That is over the budget of {claim.budget / 60:.0f} minutes: name fewer arms or seeds, or say --over-budget."
        )
        return False
    for condition, arm, seed in todo:
        started = time.monotonic()
        found = measure(condition, arm, seed)
        facts = {"condition": condition, "arm": arm, "seed": seed, "models": models}
        record = {**facts, "seconds": round(time.monotonic() - started, 1), **found}
        file = file_of(claim, condition, arm, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(condition, arm, seed, found["measures"], flush=True)
    return True


def records(claim: Claim, conditions: tuple[str, ...], seeds: tuple[int, ...] = ()) -> Records:
    """Of all seeds there are, or of those."""
    found: Records = {}
    for record in (r for condition in conditions for r in read(claim, condition)):
        if not seeds or record["seed"] in seeds:
            found.setdefault(record["arm"], {})[record["condition"], record["seed"]] = record["measures"]
    return found


def differences(found: Records, arm: str, baseline: str, measure: str) -> list[float]:
    """Arm minus baseline, run by run, for the conditions and seeds that both have."""
    shared = sorted(found[arm].keys() & found.get(baseline, {}).keys())
    return [found[arm][key][measure] - found[baseline][key][measure] for key in shared]


def table(
    claim: Claim, conditions: tuple[str, ...], measures: tuple[str, ...] = (), seeds: tuple[int, ...] = ()
) -> str:
    """Means over conditions and seeds, and paired differences to the baseline with 95 % intervals, in Markdown."""
    from counterpoint.training.intervals import bootstrap

    measures = measures or claim.measures
    found = records(claim, conditions, seeds)
    arms = [a for a in dict.fromkeys((*claim.confirm.arms, *claim.screen.arms)) if a in found]
    lines = ["| | runs | " + " | ".join(measures) + " |", "|---" * (len(measures) + 2) + "|"]
    for arm in arms:
        cells = [f"{statistics.mean(m[k] for m in found[arm].values()):.{claim.digits}f}" for k in measures]
        lines.append(f"| {arm} | {len(found[arm])} | " + " | ".join(cells) + " |")
    for arm in arms:
        paired = {k: differences(found, arm, claim.baseline, k) for k in measures}
        count = len(paired[measures[0]])
        if arm not in ("base", claim.baseline) and count > 1:
            figures = [(statistics.mean(d), *bootstrap(d)) for d in paired.values()]
            cells = ["{} ({} to {})".format(*(f"{x:+.{claim.digits}f}" for x in three)) for three in figures]
            lines.append(f"| {arm} - {claim.baseline} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(claim: Claim, condition: str, seeds: tuple[int, ...] = ()) -> str:
    """An SVG: a strip for each measure from 0 to 1, or to its largest value, a row for each arm, a dot for each seed, a bar at the mean."""
    found = records(claim, (condition,), seeds)
    width, left, row = 360, 230, 20
    height = len(claim.measures) * (len(found) + 1) * row + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    y = 20
    for measure in claim.measures:
        most = max(1.0, *(m[measure] for by_seed in found.values() for m in by_seed.values()))
        title = measure if most == 1 else f"{measure}, to {most:.3g}"
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{title}</text>')
        for arm, by_seed in found.items():
            y += row
            values = [m[measure] / most for m in by_seed.values()]
            mean = left + width * statistics.mean(values)
            parts.append(f'<text x="24" y="{y}">{arm}</text><path d="M{left} {y - 4}h{width}" stroke="#ccc"/>')
            parts += [
                f'<circle cx="{left + width * v:.1f}" cy="{y - 4}" r="4" fill="#d2502d" fill-opacity=".5"/>'
                for v in values
            ]
            parts.append(f'<path d="M{mean:.1f} {y - 10}v12" stroke="black" stroke-width="2"/>')
        y += row
    return "\n".join([*parts, "</svg>\n"])


def command(claim: Claim, argv: list[str], laboratory: Callable[[], tuple[str, Callable]]) -> int:
    """`laboratory()` is called when something is to be measured; it gives what the models are, and `measure`."""
    words = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(
        prog=f"dev.py evidence {claim.name}", description=claim.about, formatter_class=words
    )
    parser.add_argument("--screen", action="store_true", help="the small plan instead of the one that confirms")
    parser.add_argument("--conditions", nargs="+", help="only these")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--over-budget", action="store_true", help=f"run on beyond {claim.budget / 60:.0f} minutes")
    options = parser.parse_args(argv)
    plan = claim.screen if options.screen else claim.confirm
    chosen = {k: tuple(v) for k in plan._fields if (v := getattr(options, k))}
    plan = plan._replace(**chosen)
    models, measure = laboratory()
    whole = run(claim, plan, models, measure, options.over_budget)
    seeds = () if options.screen else plan.seeds  # those that chose what to confirm say nothing about it
    for condition in plan.conditions:
        print(condition, table(claim, (condition,), seeds=seeds), sep="\n")
        if whole and not options.screen:  # what is shown beside a claim is what was confirmed
            drawing = RESULTS / claim.name / f"{condition}.svg"
            drawing.write_text(plot(claim, condition, seeds), encoding="utf-8")
    if len(plan.conditions) > 1:
        print("all together", table(claim, plan.conditions, seeds=seeds), sep="\n")
    return 0 if whole else 1


def models_hash(*names: str) -> str:
    """12 hex digits of weights that ship, by name under models/; of what paints, and of the judge, unless told."""
    import hashlib

    digest = hashlib.sha256()
    for name in names or ("pocket-unet", "pocket-text", "pocket-vae", "pocket-judge"):
        digest.update((ROOT / "models" / f"{name}.safetensors").read_bytes())
    return digest.hexdigest()[:12]
