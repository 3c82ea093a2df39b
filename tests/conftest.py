"""Fixtures for all layers: `pack` and `graph` are ComfyUI in this process, `server` and `page` the real thing outside."""

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from harness.boot import DEV, ROOT, boot, load_pack, node_list, prepare
from harness.browser import QUIET, find_chromium, open_page
from harness.client import Client
from harness.server import Server, make_base

LAYERS = ("unit", "graph", "server", "browser")  # the cheap ones first
SMALL_MODELS = ROOT / "tests" / "harness" / "small_models"
SECONDS = pytest.StashKey[dict[str, float]]()
BASE = pytest.StashKey[tempfile.TemporaryDirectory]()


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported, so that each may import parts of ComfyUI at its top."""
    config.stash[SECONDS] = {}
    config.stash[BASE] = tempfile.TemporaryDirectory(prefix="counterpoint-tests-", ignore_cleanup_errors=True)
    try:
        prepare(Path(config.stash[BASE].name))
    except FileNotFoundError as missing:
        pytest.exit(str(missing), returncode=4)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[BASE].cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    layer = {name: number for number, name in enumerate(LAYERS)}
    items.sort(key=lambda item: layer.get(item.path.parent.name, len(LAYERS)))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    seconds = config.stash[SECONDS]
    if seconds:
        terminalreporter.section("seconds for each saved graph, through the server")
        for name, spent in seconds.items():
            terminalreporter.write_line(f"{spent:8.1f}  {name}")
        terminalreporter.write_line(f"{sum(seconds.values()):8.1f}  all together")


@pytest.fixture(scope="session")
def comfy(pytestconfig: pytest.Config) -> Path:
    """ComfyUI imported into this process; the value is its base directory, a temporary one."""
    boot()
    return Path(pytestconfig.stash[BASE].name)


@pytest.fixture(scope="session")
def pack(comfy):
    """Our pack as ComfyUI loads it: `pack.nodes`, `pack.training` and what they import."""
    return load_pack()


@pytest.fixture(scope="session")
def schemas(pack) -> list:
    """The schema of every node of ours."""
    return [node.GET_SCHEMA() for node in asyncio.run(node_list(pack))]


@pytest.fixture(scope="session")
def small_models(comfy):
    """The test pack of small models: `small_models.builders` and its loader nodes."""
    return load_pack(SMALL_MODELS, "small_models")


@pytest.fixture
def folders(comfy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's input, output, temp and models folders, empty and this test's own; the value is what they lie in."""
    import folder_paths

    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    moved = {
        kind: ([entry.replace(str(comfy), str(tmp_path), 1) for entry in paths], extensions)
        for kind, (paths, extensions) in folder_paths.folder_names_and_paths.items()
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", moved)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def graph(pack, small_models, folders):
    """A fresh executor: `run = graph(prompt)`; see harness.executor.Run for what it returns."""
    from harness.executor import Graph

    return Graph()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory):
    """The one real server of this run: our pack and the small models, nothing else, in a base directory of its own."""
    packs = {"counterpoint": ROOT, "small_models": SMALL_MODELS}
    folder = tmp_path_factory.mktemp("server")
    base = make_base(folder / "base", packs)
    only_ours = ("--disable-all-custom-nodes", "--whitelist-custom-nodes", *packs)
    with Server(base, folder / "server.log", only_ours, spare_cores=1) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server.url)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Show the server's log under a failed test that talked to it."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and server is not None:
        report.sections.append((f"ComfyUI's log, {server.log}", server.log_tail()))
    return report


@pytest.fixture
def graph_seconds(request: pytest.FixtureRequest) -> dict[str, float]:
    """Name -> seconds; the run prints it at its end."""
    return request.config.stash[SECONDS]


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where the browser is; without one its tests are skipped, and on a CI machine (CI=true) that is a failure."""
    path = find_chromium()
    if path is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say("no Chromium or Chrome on this machine (Debian: apt-get install chromium)")
    return path


@pytest.fixture
def browse(server: Server, client: Client, chromium: str):
    """`with browse(settings) as page:` opens ComfyUI in a fresh browser under these settings of the page."""

    def browse(settings: dict[str, Any]):
        client.post("/settings", {**QUIET, **settings})
        return open_page(server.url, chromium, DEV / "shots")

    return browse
