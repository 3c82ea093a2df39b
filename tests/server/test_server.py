"""What a real server makes of the pack, before any saved graph is run."""

import json
import subprocess
import sys
import time

from harness.boot import ROOT
from harness.prompts import paint
from harness.server import Server

CLIENT_THAT_SAYS_WHEN_IT_RUNS = """
import json, sys
from harness.client import Client
url, prompt = sys.argv[1], json.loads(sys.argv[2])
Client(url).run(prompt, lambda name, data: name == "progress" and print("running", flush=True))
"""


def test_both_packs_were_imported(server: Server):
    log = server.log.read_text(encoding="utf-8")
    for complaint in ("IMPORT FAILED", "Cannot import", "Error while calling comfy_entrypoint"):
        assert complaint not in log


def test_every_node_is_offered_complete(client, schemas):
    offered = client.get("/object_info")
    ours = {name: node for name, node in offered.items() if node["python_module"] == "custom_nodes.counterpoint"}
    assert set(ours) == {schema.node_id for schema in schemas}
    for name, node in ours.items():
        assert node["display_name"] and node["description"], name
        assert node["category"].startswith("Counterpoint"), name
        assert len(node["output"]) == len(node["output_name"]) == len(node["output_tooltips"]), name


def test_templates_and_scripts_are_served(client):
    saved = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    assert sorted(client.get("/workflow_templates").get("counterpoint", [])) == saved
    scripts = [path.relative_to(ROOT / "js").as_posix() for path in (ROOT / "js").rglob("*.js")]
    assert {f"/extensions/counterpoint/{script}" for script in scripts} <= set(client.get("/extensions"))


def test_a_killed_client_leaves_the_server_at_work(server: Server, client):
    command = [sys.executable, "-c", CLIENT_THAT_SAYS_WHEN_IT_RUNS, server.url, json.dumps(paint(steps=5000))]
    with subprocess.Popen(command, cwd=ROOT / "tests", stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"running\n"
        other.kill()
    client.post("/interrupt", {})
    while client.get("/queue")["queue_running"]:
        time.sleep(0.1)
    assert client.run(paint(seed=2)).status == "success"
