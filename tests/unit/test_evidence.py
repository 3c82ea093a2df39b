"""What is said about results is what the result files say."""

import importlib
import json

from evidence import learn_style
from harness.boot import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_table_comes_from_the_results(pack):
    assert learn_style.table(learn_style.STYLE, learn_style.README, learn_style.SEEDS) in README


def test_differences_are_paired_by_seed(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(learn_style, "RESULTS", tmp_path)
    (tmp_path / "style-0").mkdir()
    for arm, values in {"plain": {1: 0.5, 2: 1.0, 3: 0.0}, "paper": {2: 0.75, 1: 0.25}}.items():
        for seed, value in values.items():
            record = {"arm": arm, "seed": seed, "measures": {"leak": value}}
            (tmp_path / "style-0" / f"{arm}-{seed}.json").write_text(json.dumps(record))
    rows = learn_style.table(0, ("leak",)).splitlines()
    assert rows[2:] == [
        "| plain | 3 | 0.50 |",
        "| paper | 2 | 0.50 |",
        "| paper - plain | 2 | -0.25 (-0.25 to -0.25) |",
    ]


def test_the_model_card_in_words_is_the_model_card(pack):
    pocket_card = importlib.import_module(f"{pack.__name__}.nodes.pocket_card")
    card = json.loads((ROOT / "models" / "pocket-card.json").read_text(encoding="utf-8"))
    assert pocket_card.in_words(card) == (ROOT / "models" / "README.md").read_text(encoding="utf-8")
