"""The graph layer itself: what the other tests here rely on."""

import nodes
import pytest

from harness.executor import Graph
from harness.prompts import paint


def test_a_prompt_paints_into_the_tests_own_folder(graph, folders):
    run = graph(paint())
    assert run.value("5").shape == (1, 64, 64, 3)
    assert (folders / "output" / run.ui["6"]["images"][0]["filename"]).is_file()
    assert run.sent("progress")[-1]["value"] == 3


def test_only_what_changed_runs_again(graph):
    assert graph(paint(seed=1)).executed == ["1", "3", "2", "4", "5", "6"]
    assert graph(paint(seed=1)).executed == []
    assert graph(paint(seed=2)).executed == ["4", "5", "6"]


def test_weights_are_drawn_from_the_seed(graph):
    first = graph(paint()).value("5")
    assert first.equal(Graph()(paint()).value("5"))
    assert not first.equal(graph(paint(weights=1)).value("5"))


def test_an_invalid_prompt_is_refused_before_it_runs(graph):
    run = graph(paint(steps=0), check=False)
    assert list(run.node_errors) == ["4"] and run.executed == []
    with pytest.raises(AssertionError, match="KSampler 4: Value 0 smaller than min"):
        graph(paint(steps=0))


def test_an_interrupt_stops_within_the_node(graph):
    def stop(event: str, data: dict) -> None:
        if event == "progress":
            nodes.interrupt_processing()

    run = graph(paint(), check=False, on_event=stop)
    assert run.interrupted and len(run.sent("progress")) == 1 and "4" not in run.outputs
    assert graph(paint()).value("5").shape == (1, 64, 64, 3)
