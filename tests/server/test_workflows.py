"""Every saved graph, converted by comfy-cli and run to its end on a real server."""

from pathlib import Path

import pytest

from harness.boot import ROOT
from harness.convert import to_prompt
from harness.server import Server

SMALL = ROOT / "tests" / "harness" / "small_models" / "workflows"
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
