"""The pack as a whole: what it imports, how it presents itself, what is committed."""

import ast
import asyncio
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nodes
import pytest
from comfy_api.latest import io

from harness.boot import ROOT, load_pack, node_list

COMFYUI_MODULES = re.compile(r"^(comfy\w*|folder_paths|server|nodes|execution|latent_preview|node_helpers)(\.|$)")
HEAVY = {"diffusers", "transformers", "torchvision", "kornia"}
LONG = 500  # lines

# In the order in which a saved graph keeps their values; a new one comes last.
WIDGETS = {
    "CounterpointEmbedPairs": "images_folder recursive",
    "CounterpointFitStartDistribution": "kind clusters scale seed",
    "CounterpointTrainPrior": "preset steps batch learning_rate network empty seed look_every run",
    "CounterpointSavePrior": "name",
    "CounterpointLoadPrior": "prior",
    "CounterpointSamplePrior": "prompt negative count seed steps sampler guidance guide_to guide_from best_of variation",
    "CounterpointMixImageEmbeddings": "share",
    "CounterpointSaveImageEmbedding": "name",
    "CounterpointLoadImageEmbedding": "embedding",
    "CounterpointTrainImageTokens": "tokens rank steps batch learning_rate noise empty seed preview_every snapshot_every weighting size run "
    "mirror memory",
    "CounterpointApplyImageTokens": "strength text_weight",
}
NEVER_COMMITTED = {
    "a host of a package registry": r"(index-url|--registry)[ =]+https?:|https?://[^ \"]+\.(whl|tgz|deb|tar\.gz)\b",
    "a path of somebody's machine": r"(^|[^\w.])/(work|root|home|Users)/",
    "weights loaded by running code": r"pickle\.load|torch\.load\([^)]*weights_only *= *False",
    "code run from text": r"(^|[^_.\w])(eval|exec)\(",
}

ASK_FOR_HEAVY = """
import builtins, json, sys, tempfile
from pathlib import Path
from harness.boot import boot, load_pack, prepare
prepare(Path(tempfile.mkdtemp()))
boot()
asked, ordinary_import = set(), builtins.__import__
def watch(name, *rest):
    asked.add(name.split(".")[0])
    return ordinary_import(name, *rest)
builtins.__import__ = watch
load_pack()
builtins.__import__ = ordinary_import
print(json.dumps(sorted(asked)))
"""


def committed(pattern: str = "*") -> list[Path]:
    """The files git knows or would add; without git there is nothing to say about commits."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", pattern]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def imported_names(file: Path) -> list[str]:
    """The modules a file imports; a relative import that leaves the file's own top folder starts with a dot."""
    depth, names = len(file.relative_to(ROOT).parts) - 1, []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            leaves = "." if node.level > depth else ""
            names.append(leaves + (node.module or "") if node.level == 0 or leaves else "")
    return [name for name in names if name]


def test_training_never_imports_comfyui_or_our_nodes():
    wrong = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in (ROOT / "training").rglob("*.py")
        for name in imported_names(file)
        if COMFYUI_MODULES.match(name) or name.startswith(".")
    }
    assert not wrong


def test_importing_the_pack_asks_for_nothing_heavy():
    command = [sys.executable, "-c", ASK_FOR_HEAVY]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = set(json.loads(done.stdout.splitlines()[-1]))
    assert "comfy_api" in asked, "the watch saw nothing at all"
    assert not asked & HEAVY


def test_works_under_any_folder_name(schemas, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", dict(nodes.NODE_CLASS_MAPPINGS))  # other tests keep theirs
    elsewhere = tmp_path / "Some-Other_Name 2"
    shutil.copytree(ROOT, elsewhere, ignore=shutil.ignore_patterns(".*", "tests", "models", "__pycache__"))
    again = load_pack(elsewhere, "some_other_name")
    assert [node.GET_SCHEMA().node_id for node in asyncio.run(node_list(again))] == [each.node_id for each in schemas]


def test_dependencies_are_the_same_everywhere():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert project["project"]["dependencies"] == [line for line in lines if line and not line.startswith("#")]
    assert "web" not in project["tool"]["comfy"], "beside WEB_DIRECTORY it would load every script twice"


def test_every_node_introduces_itself(schemas):
    for schema in schemas:
        assert re.fullmatch(r"Counterpoint[A-Z]\w+", schema.node_id)
        assert schema.display_name and schema.description, schema.node_id
        assert re.match(r"Counterpoint/\w", schema.category), schema.node_id
        assert (ROOT / "js" / "docs" / f"{schema.node_id}.md").is_file(), f"{schema.node_id} has no help page"


def test_every_input_explains_itself(schemas):
    for schema in schemas:
        for each in (nested for given in schema.inputs for nested in given.get_all()):
            where = f"{schema.node_id}.{each.id}"
            assert each.tooltip, f"{where} has no tooltip"
            if each.get_io_type() in ("INT", "FLOAT"):
                assert re.search(r"\d", each.tooltip), f"{where}: the tooltip names no number to start from"


def test_saved_values_keep_their_places(schemas):
    inputs = {schema.node_id: schema.inputs for schema in schemas}
    for kind, kept in WIDGETS.items():
        named = [i.id for i in inputs[kind] if isinstance(i, io.WidgetInput) and not i.force_input]
        assert named[: len(kept.split())] == kept.split(), kind
        node = nodes.NODE_CLASS_MAPPINGS[kind]
        assert node.INPUT_TYPES() == node.INPUT_TYPES()


def test_every_output_explains_itself(schemas):
    unexplained = [f"{s.node_id}.{out.display_name}" for s in schemas for out in s.outputs if not out.tooltip]
    assert not unexplained


@pytest.mark.parametrize("what", NEVER_COMMITTED)
def test_what_is_never_committed(what: str):
    code_only = what in ("weights loaded by running code", "code run from text")
    pattern = re.compile(NEVER_COMMITTED[what], re.MULTILINE)
    found = []
    for file in committed("*.py" if code_only else "*"):
        content = file.read_bytes()
        if b"\0" not in content[:8192]:  # text
            found += [f"{file.relative_to(ROOT)}: {m.group().strip()}" for m in pattern.finditer(content.decode())]
    assert not found


def test_long_files_are_named():
    lines = {str(file.relative_to(ROOT)): len(file.read_bytes().splitlines()) for file in committed("*.py")}
    for file in (file for file in lines if lines[file] > LONG):
        warnings.warn(f"{file} has {lines[file]} lines; is it still one thing?", stacklevel=1)
    assert lines["dev.py"] <= 250


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_agrees(command: list[str]):
    words = [sys.executable, "-m", "ruff", *command, "--output-format", "concise", "."]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
