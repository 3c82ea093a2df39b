"""Every saved graph, converted by comfy-cli and run to its end on a real server."""

import json
from pathlib import Path

import pytest

from harness.boot import ROOT
from harness.convert import to_prompt
from harness.server import Server

SMALL = ROOT / "tests" / "harness" / "small_models" / "workflows"
OFF = (2, 4)  # muted, bypassed
SAVED = sorted((ROOT / "workflows").glob("*.json")) + sorted(SMALL.glob("*.json"))


@pytest.mark.parametrize("workflow", SAVED, ids=lambda path: path.stem)
def test_runs_to_its_end(workflow: Path, server: Server, client, graph_seconds):
    result = client.run(to_prompt(workflow, server.url))
    graph_seconds[workflow.stem] = result.seconds
    assert result.status == "success", result.error
    assert not result.node_errors
    assert result.pictures, "it neither saved nor showed a picture"
    for place in result.pictures:
        low, high = client.picture(place).convert("L").getextrema()
        assert high - low >= 16, f"{place['filename']} is one flat colour"


def all_nodes(saved: dict) -> list[dict]:
    """The nodes of a saved graph and of the subgraphs in it."""
    inner = saved.get("definitions", {}).get("subgraphs", [])
    return [node for part in (saved, *inner) for node in part["nodes"]]


def with_parts_off() -> list[Path]:
    read = {path: json.loads(path.read_text(encoding="utf-8")) for path in SAVED}
    return [path for path, saved in read.items() if any(node.get("mode") in OFF for node in all_nodes(saved))]


@pytest.mark.parametrize("workflow", with_parts_off(), ids=lambda path: path.stem)
def test_parts_that_are_off_lack_nothing_but_weights(workflow: Path, server: Server, graph, tmp_path):
    """They need a person's own checkpoint; switched on, they may miss that file and nothing else."""
    saved = json.loads(workflow.read_text(encoding="utf-8"))
    for node in all_nodes(saved):
        node["mode"] = 0 if node.get("mode") in OFF else node.get("mode", 0)
    restored = tmp_path / workflow.name
    restored.write_text(json.dumps(saved), encoding="utf-8")
    _, error, _, node_errors = graph.validate(to_prompt(restored, server.url))
    assert error is None or node_errors, error
    for node in node_errors.values():
        assert "Load" in node["class_type"], node
        assert {each["type"] for each in node["errors"]} == {"value_not_in_list"}, node
