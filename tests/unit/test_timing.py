"""The bench frame: order, pairing, and what is said."""

from harness.timing import Timing, interleaved, table


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
