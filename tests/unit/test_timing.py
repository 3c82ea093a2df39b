"""The bench frame: order, pairing, and what is said."""

import json
import subprocess
import sys
from pathlib import Path

from harness.timing import Peak, Timing, interleaved, table


def test_ways_take_turns_and_the_order_turns_round():
    done = []
    timings = interleaved({"a": lambda: done.append("a"), "b": lambda: done.append("b")}, rounds=3)
    assert "".join(done) == "ab" + "ab" + "ba" + "ab"
    assert [t.name for t in timings] == ["a", "b"] and all(len(t.seconds) == 3 for t in timings)


def test_the_ratio_is_paired_round_by_round():
    """A machine that is twice as slow in the second round changes the seconds and not the ratio."""
    lines = table([Timing("theirs", [2.0, 4.0, 2.0]), Timing("ours", [1.0, 2.0, 1.0])], "work").splitlines()
    assert lines[0] == "work, 3 rounds"
    assert lines[2].split() == ["theirs", "2.000", "2.000", "4.000", "1.00", "(1.00", "to", "1.00)"]
    assert lines[3].split() == ["ours", "1.000", "1.000", "2.000", "2.00", "(2.00", "to", "2.00)"]


def test_peaks_stand_beside_the_seconds():
    lines = table([Timing("ours", [1.0], Peak(12_300_000, None)), Timing("card", [1.0], Peak(1, 2_000_000))], "work")
    assert lines.splitlines()[1].endswith("peak MB")
    assert lines.splitlines()[2].split()[-1] == "12" and lines.splitlines()[3].split()[-2:] == ["0", "2"]


def test_the_peak_is_what_the_work_took_at_once():
    """200 MB held and given back count; the 300 MB that lay there before do not."""
    script = """if True:
        import json
        import torch  # with what it takes to be imported
        from harness.timing import peak
        before = b"x" * 300_000_000
        print(json.dumps(peak(lambda: len(b"y" * 200_000_000))))
    """
    tests, _ = Path(__file__).resolve().parents[1], b"z" * 900_000_000  # nor what the process that started it held
    done = subprocess.run([sys.executable, "-c", script], cwd=tests, check=True, stdout=subprocess.PIPE)
    main, cuda = json.loads(done.stdout)
    assert 190e6 < main < 215e6 and cuda in (None, 0)
