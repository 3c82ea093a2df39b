"""What a training leaves on disk: always whole, never somebody else's, resumed as if it had never stopped."""

import contextlib
import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from harness.boot import ROOT

# Trains until it is killed, a checkpoint of 2 MB every 0.05 s, and says each step with its own clock.
CHILD = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("counterpoint", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
sys.modules["counterpoint"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
import torch
from pathlib import Path
from counterpoint.training.loop import train
from counterpoint.training.run import Run
class Counter:
    def __init__(self): self.x = torch.zeros(500_000)
    def step(self, i):
        time.sleep(0.002)
        self.x += i
        return {"loss": float(i)}
    def state_dict(self): return {"x": self.x}
    def load_state_dict(self, state): self.x = state["x"]
with Run(Path(sys.argv[2]), {"a": 1}) as run:
    for progress in train(Counter(), run, 10**6, checkpoint_every=0.05):
        print(progress.step, time.monotonic(), flush=True)
"""


class Counter:
    """A trainer whose state tells which steps it has done, and in which order."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None):
        self.x, self.done, self.fail_at, self.error = torch.zeros(3, dtype=torch.float64), 0, fail_at, error

    def step(self, i: int) -> dict[str, float]:
        if i == self.fail_at:
            raise self.error
        self.x, self.done = self.x * 1.5 + i, self.done + 1
        return {"loss": 1 / (i + 1)}

    def state_dict(self) -> dict:
        return {"x": self.x, "done": self.done}

    def load_state_dict(self, state: dict) -> None:
        self.x, self.done = state["x"], state["done"]


def after(steps: int) -> torch.Tensor:
    counter = Counter()
    for i in range(steps):
        counter.step(i)
    return counter.x


@pytest.fixture
def t(pack):
    """The modules under test: t.Run, t.train..."""
    training = pack.training
    return SimpleNamespace(
        Run=training.run.Run, RunError=training.run.RunError, run=training.run, train=training.loop.train,
        Diverged=training.loop.Diverged, artefact=training.artefact,
    )  # fmt: skip


def stored(t, folder) -> tuple[int, torch.Tensor]:
    tree = t.artefact.read_tree(folder / "checkpoint.safetensors")
    return tree["step"], tree["state"]["x"]


# Killed


@pytest.fixture(scope="module")
def killed(pack, tmp_path_factory):
    """What was seen while another process trained, and after it was killed in the middle, twice."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    seen = SimpleNamespace(folder=folder, refused=[], lives=[])
    command = [sys.executable, "-c", CHILD, str(ROOT), str(folder)]
    for _ in range(2):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said = list(itertools.islice(child.stdout, 120))
        with pytest.raises(pack.training.run.RunError) as refused, pack.training.run.Run(folder, {"a": 1}):
            pass
        seen.refused.append(str(refused.value))
        os.kill(child.pid, signal.SIGKILL)
        said += child.stdout.readlines()
        child.wait()
        told = [(int(step), float(clock)) for step, clock in (line.split() for line in said if line.endswith("\n"))]
        tree = pack.training.artefact.read_tree(folder / "checkpoint.safetensors")
        seen.lives.append((told, tree["step"], tree["state"]["x"]))
    return seen


def test_kill_loses_at_most_one_checkpoint_interval(killed):
    for told, kept, _ in killed.lives:
        clocks = dict(told)
        last, slowest = told[-1][0], max(b - a for (_, a), (_, b) in itertools.pairwise(told))
        assert kept >= told[0][0], "nothing was kept at all"
        lost = clocks[last] - clocks.get(kept, clocks[last])
        assert lost <= 0.05 + 2 * slowest


def test_what_a_kill_leaves_is_whole(killed):
    for _, kept, x in killed.lives:
        assert torch.equal(x, torch.full((500_000,), float(sum(range(kept)))))


def test_a_killed_run_goes_on_from_its_checkpoint(killed):
    (_, kept, _), (told, _, _) = killed.lives
    assert told[0][0] == kept + 1


def test_the_log_of_killed_runs_has_each_step_once(killed, pack):
    run = pack.training.run.Run(killed.folder, {"a": 1})
    steps = [record["step"] for record in run.history(killed.lives[1][1])]
    assert steps == list(range(1, killed.lives[1][1] + 1))


def test_a_second_process_is_refused_in_one_sentence(killed):
    for sentence in killed.refused:
        assert "'run'" in sentence and "trained right now" in sentence and "'run-2'" in sentence
        assert sentence.count(". ") == 0 and sentence.endswith(".")


def test_a_kill_gives_the_lock_back(killed, t):
    with t.Run(killed.folder, {"a": 1}) as run:
        assert run.load_checkpoint()[0] == killed.lives[1][1]


# Lock and config


def test_the_lock_holds_within_one_process_and_is_given_back(t, tmp_path):
    with t.Run(tmp_path / "run", {}):
        with pytest.raises(t.RunError, match="trained right now"), t.Run(tmp_path / "run", {}):
            pass
    with contextlib.suppress(KeyboardInterrupt), t.Run(tmp_path / "run", {}):
        raise KeyboardInterrupt
    with t.Run(tmp_path / "run", {}):
        pass


CONFIG = {"method": "plain", "batch": 8, "rate": 0.02, "prompts": ["a", "b"], "keep": False}
OTHERS = [
    ({**CONFIG, "method": "paper"}, ["method", "'plain'", "'paper'"]),
    ({**CONFIG, "rate": 0.021}, ["rate", "0.02", "0.021"]),
    ({**CONFIG, "prompts": ["a", "c"]}, ["prompts", "'b'", "'c'"]),
    ({k: v for k, v in CONFIG.items() if k != "keep"}, ["keep", "False"]),
    ({**CONFIG, "more": 3}, ["more", "3"]),
]


@pytest.mark.parametrize("config, words", OTHERS, ids=[words[0] for _, words in OTHERS])
def test_other_settings_under_the_same_name_are_refused(t, tmp_path, config, words):
    (tmp_path / "mine-2").mkdir()
    with t.Run(tmp_path / "mine", CONFIG) as run:
        run.save_checkpoint(1, Counter().state_dict())
    kept = {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()}
    with pytest.raises(t.RunError) as refused, t.Run(tmp_path / "mine", config):
        pass
    assert all(word in str(refused.value) for word in ["'mine'", "'mine-3'", *words]), refused.value
    assert kept == {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()}
    with t.Run(tmp_path / "mine", CONFIG) as run:  # and the refusal did not keep the lock
        assert run.load_checkpoint()[0] == 1


def test_the_same_settings_in_another_order_are_the_same(t, tmp_path):
    with t.Run(tmp_path / "run", CONFIG):
        pass
    with t.Run(tmp_path / "run", dict(reversed(CONFIG.items()))):
        pass


def test_free_settings_may_change_and_are_written_down(t, tmp_path):
    for steps in (10, 20):
        with t.Run(tmp_path / "run", CONFIG, {"steps": steps}):
            pass
        assert json.loads((tmp_path / "run" / "config.json").read_text())["free"] == {"steps": steps}


# The loop


def test_steps_are_told_one_by_one(t, tmp_path):
    with t.Run(tmp_path / "run", {}) as run:
        told = list(t.train(Counter(), run, 5))
    assert [(p.step, p.steps, p.scalars["loss"]) for p in told] == [(i, 5, 1 / i) for i in range(1, 6)]
    assert all(math.isfinite(p.eta) and p.eta >= 0 for p in told) and told[-1].eta == 0
    step, x = stored(t, tmp_path / "run")
    assert step == 5 and x.equal(after(5))


LEAVE = {"close": None, "error": RuntimeError("no memory"), "interruption": KeyboardInterrupt()}


@pytest.mark.parametrize("how", LEAVE)
def test_leaving_early_keeps_the_last_step(t, tmp_path, how):
    trainer = Counter(fail_at=3, error=LEAVE[how]) if LEAVE[how] else Counter()
    with t.Run(tmp_path / "run", {}) as run, contextlib.suppress(RuntimeError, KeyboardInterrupt):
        with contextlib.closing(t.train(trainer, run, 10)) as steps:
            for progress in steps:
                if progress.step == 3 and how == "close":
                    break
    step, x = stored(t, tmp_path / "run")
    assert step == 3 and x.equal(after(3))
    again = Counter()
    with t.Run(tmp_path / "run", {}) as run:
        assert [p.step for p in t.train(again, run, 10)] == list(range(4, 11))
    assert again.x.equal(after(10)) and again.done == 10


def test_divergence_keeps_the_last_good_state_and_says_so(t, tmp_path):
    with t.Run(tmp_path / "run", {}) as run, pytest.raises(t.Diverged, match="not a number"):
        list(t.train(Counter(4, t.Diverged("The loss is not a number")), run, 10))
    step, x = stored(t, tmp_path / "run")
    assert step == 4 and x.equal(after(4))


def test_more_steps_go_on_and_fewer_change_nothing(t, tmp_path):
    for steps, told in ((4, [1, 2, 3, 4]), (7, [5, 6, 7]), (3, [])):
        with t.Run(tmp_path / "run", {}) as run:
            assert [p.step for p in t.train(Counter(), run, steps)] == told
    assert stored(t, tmp_path / "run")[0] == 7


def test_checkpoints_come_with_time(t, tmp_path):
    kept = []
    with t.Run(tmp_path / "run", {}) as run:
        for _ in t.train(Counter(), run, 4, checkpoint_every=-1.0):
            kept.append(stored(t, tmp_path / "run")[0] if run.checkpoint_file.exists() else 0)
    assert kept[:3] == [1, 2, 3] and stored(t, tmp_path / "run")[0] == 4


def test_without_a_run_nothing_is_written(t, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [p.step for p in t.train(Counter(), None, 5, start=2)] == [3, 4, 5]
    assert not list(tmp_path.iterdir())


def test_the_log_has_each_step_once_however_often_it_was_stopped(t, tmp_path):
    """Steps beyond the checkpoint were logged before a kill and are logged again after it."""
    with t.Run(tmp_path / "run", {}) as run:
        list(t.train(Counter(), run, 6))
        old = run.checkpoint_file.read_bytes()
        list(t.train(Counter(), run, 9))
        run.checkpoint_file.write_bytes(old)
        assert [r["step"] for r in run.history(6)] == [1, 2, 3, 4, 5, 6]
        list(t.train(Counter(), run, 8))
        assert [r["step"] for r in run.history(8)] == list(range(1, 9))
        assert [r["loss"] for r in run.history(8)] == [1 / i for i in range(1, 9)]


def test_half_a_line_in_the_log_stops_nothing(t, tmp_path):
    """A power cut or a full disk ends the log anywhere."""
    with t.Run(tmp_path / "run", {}) as run:
        list(t.train(Counter(), run, 3))
        with open(run.log_file, "a") as log:
            log.write('{"time": 1.0, "st')
    with t.Run(tmp_path / "run", {}) as run:
        list(t.train(Counter(), run, 5))
        assert [r["step"] for r in run.history()][:3] == [1, 2, 3] and run.history()[-1]["step"] == 5


def test_only_finite_numbers_are_logged(t, tmp_path):
    class Odd(Counter):
        def step(self, i):
            return {**super().step(i), "cosine": math.nan, "norm": math.inf}

    with t.Run(tmp_path / "run", {}) as run:
        list(t.train(Odd(), run, 2))
        assert [set(r) for r in run.history()] == [{"time", "step", "loss"}] * 2


# A full disk


class FullDisk:
    """An open file on which only so many bytes fit."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data):
        self.file.write(data[: self.room])
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def fill_disk(monkeypatch, module, at: str) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if at == "write":
        monkeypatch.setattr(module, "open", lambda *a, **k: FullDisk(open(*a, **k), 100), raising=False)
    else:
        monkeypatch.setattr(module.os, at, full)


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(t, tmp_path, monkeypatch, at):
    with t.Run(tmp_path / "run", {}) as run:
        list(t.train(Counter(), run, 3))
        names = {file.name for file in (tmp_path / "run").iterdir()}
        with monkeypatch.context() as patched, pytest.raises(t.RunError) as failed:
            for progress in t.train(Counter(), run, 9, checkpoint_every=-1.0):
                if progress.step == 4:
                    fill_disk(patched, t.artefact, at)
        assert "step 5" in str(failed.value) and "No space left on device" in str(failed.value)
        assert "free some disk space" in str(failed.value) and "run" in str(failed.value)
        step, x = stored(t, tmp_path / "run")
        assert step == 4 and x.equal(after(4))
        assert {file.name for file in (tmp_path / "run").iterdir()} == names, "half a file was left behind"
    with t.Run(tmp_path / "run", {}) as run:
        again = Counter()
        list(t.train(again, run, 9))
        assert again.x.equal(after(9))


def test_a_full_disk_is_one_sentence_wherever_it_is_met_first(t, tmp_path, monkeypatch):
    """The log is written at every step, so it is the first to find the disk full."""
    with t.Run(tmp_path / "run", {}) as run:
        with monkeypatch.context() as patched, pytest.raises(t.RunError, match="No space left on device.*disk space"):
            for progress in t.train(Counter(), run, 9):
                if progress.step == 4:
                    fill_disk(patched, t.run, "write")
    with t.Run(tmp_path / "run", {}) as run:
        list(t.train(Counter(), run, 9))
        assert [r["step"] for r in run.history(9)] == list(range(1, 10))


# Trees of tensors


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def test_an_optimiser_comes_back_as_it_was(t, tmp_path):
    parameters = [
        torch.nn.Parameter(torch.randn(shape, dtype=dtype))
        for shape, dtype in (((3, 2), torch.float32), ((5,), torch.float64))
    ]
    optimiser = torch.optim.Adam(parameters, lr=0.1 + 0.2, betas=(0.9, 0.99))
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimiser.step()
    t.artefact.write_tree(tmp_path / "adam.safetensors", optimiser.state_dict())
    back = t.artefact.read_tree(tmp_path / "adam.safetensors")
    assert same(optimiser.state_dict(), back), "keys are numbers, 'step' is a tensor, lr has all its digits"
    other = torch.optim.Adam([torch.nn.Parameter(p.detach().clone()) for p in parameters], lr=9.0)
    other.load_state_dict(back)
    for mine, theirs in zip(parameters, other.param_groups[0]["params"], strict=True):
        theirs.grad = mine.grad
    optimiser.step(), other.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, other.param_groups[0]["params"], strict=True))


TREES = {
    "nothing": {},
    "plain values": {"a": None, "b": True, "c": 3, "d": 0.1 + 0.2, "e": "é\n", "f": [], "g": {}},
    "keys": {0: "zero", "0": "text", "deep": {1: {2: torch.ones(1)}}},
    "kinds": [
        torch.ones(2, dtype=d)
        for d in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    ],
    "shapes": [torch.tensor(3.0), torch.zeros(0, 4), torch.arange(6).view(2, 3).T, torch.ones(1, 1).expand(3, 2)],
    "not finite": [torch.tensor([math.nan, math.inf]).nan_to_num(1.0), {"x": math.inf}],
}
_shared = torch.arange(4.0)
TREES["one tensor in two places"] = {"a": _shared, "b": _shared, "part": _shared[1:3]}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_as_it_was(t, tmp_path, name):
    t.artefact.write_tree(tmp_path / "tree.safetensors", TREES[name])
    assert same(TREES[name], t.artefact.read_tree(tmp_path / "tree.safetensors"))


def test_the_same_content_is_the_same_bytes(t):
    """Else saving an unchanged thing again could not be told from saving another."""
    facts = {f"fact {i}": i for i in range(12)}
    tensors = {name: torch.ones(2) for name in "hgfedcba"}
    assert len({t.artefact.encode(tensors, facts) for _ in range(20)}) == 1


def test_metadata_is_text_in_the_header_and_comes_back(t, tmp_path):
    t.artefact.write(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"name": "é", "steps": 3, "list": [1.5, None]})
    tensors, facts = t.artefact.read(tmp_path / "x.safetensors")
    assert list(tensors) == ["a"] and facts["name"] == "é"
    assert {k: json.loads(v) for k, v in facts.items() if k != "name"} == {"steps": 3, "list": [1.5, None]}
