"""ComfyUI's own page in a real Chromium, in a known state: English, no dialogs, the renderer that a test asks for."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
QUIET = {  # the page asks and announces nothing on its first load
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Workflow.ShowMissingNodesWarning": False,
    "Comfy.Workflow.Persist": False,
    "Comfy.Release.Status": "skipped",
    "Comfy.Locale": "en",
}
READY = "() => window.app?.extensionManager && window.app?.graph && window.app?.vueAppReady !== false"
LISTEN = """() => {
    window.heard = [];
    for (const name of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(name, (event) => window.heard.push([name, event.detail]));
}"""
DIALOG = "[role=dialog]"


def find_chromium() -> str | None:
    """The system's Chromium or one of its kin."""
    found = (shutil.which(name) for name in NAMES)
    return next((path for path in found if path), None) or next(
        (place for place in PLACES if os.path.exists(place)), None
    )


class Page:
    """One open page of ComfyUI; `page.raw` is playwright's own."""

    def __init__(self, raw: Any, url: str, shots: Path) -> None:
        self.raw, self.shots = raw, shots
        self.errors: list[str] = []
        raw.on("console", lambda message: message.type == "error" and self.errors.append(describe(message)))
        raw.on("pageerror", lambda error: self.errors.append(f"{error.message}\n{error.stack}"))
        raw.goto(url, wait_until="domcontentloaded")
        raw.wait_for_function(READY, timeout=120_000)
        raw.evaluate(LISTEN)
        raw.wait_for_timeout(1500)  # dialogs come late
        self.close_dialogs()

    def close_dialogs(self) -> None:
        for _ in range(5):
            if not self.raw.locator(DIALOG).count():
                return
            self.raw.keyboard.press("Escape")
            self.raw.wait_for_timeout(300)
        raise RuntimeError(f"a dialog stays open: {self.raw.locator(DIALOG).first.inner_text()[:200]}")

    def command(self, name: str) -> None:
        """Run one of the page's commands, as its menus and shortcuts do."""
        self.raw.evaluate("(name) => app.extensionManager.command.execute(name)", name)

    def open_template(self, pack: str, name: str) -> None:
        """Templates, Extensions, the pack, the card: as a person does it; until its nodes are on the canvas."""
        self.raw.evaluate("() => app.graph.clear()")
        self.command("Comfy.BrowseTemplates")
        dialog = self.raw.get_by_role("dialog")
        dialog.get_by_text(pack, exact=True).first.click()
        dialog.get_by_text(name, exact=True).first.click()
        self.raw.wait_for_function("() => app.graph._nodes.length > 0", timeout=30_000)
        self.close_dialogs()
        self.command("Comfy.Canvas.FitView")
        self.raw.wait_for_timeout(1000)  # the view glides

    def select_new_node(self, node_id: str) -> None:
        """A canvas with this one node on it, selected."""
        self.raw.evaluate(
            """(type) => {
                app.graph.clear();
                const node = LiteGraph.createNode(type);
                node.pos = [300, 150];
                app.graph.add(node);
                app.canvas.selectNode(node);
                app.canvas.setDirty(true, true);
            }""",
            node_id,
        )

    def press_run(self, timeout: float = 300) -> str:
        """Press the Run button; the name of the event that ended the prompt."""
        self.raw.evaluate("() => { window.heard.length = 0; }")
        self.raw.get_by_test_id("queue-button").first.click()
        self.raw.wait_for_function("() => window.heard.length > 0", timeout=timeout * 1000)
        return self.raw.evaluate("() => window.heard[0][0]")

    def shot(self, name: str) -> Path:
        path = self.shots / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.raw.screenshot(path=path)
        return path

    def errors_of(self, pack: str) -> list[str]:
        """What the console blames on a pack, but for a translated help page that it does not have."""
        blamed = [error for error in self.errors if f"/extensions/{pack}/" in error]
        return [error for error in blamed if not re.search(r"404 .*/docs/\w+/\w+\.md", error)]


@contextmanager
def open_page(url: str, chromium: str, shots: Path) -> Iterator[Page]:
    """A fresh browser without history; playwright's event loop ends with it, for asyncio is used by other tests."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, sync_playwright() as playwright:
        size = {"width": 1600, "height": 1000}
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, headless=True, viewport=size, args=list(ARGUMENTS)
        )
        try:
            yield Page(context.pages[0], url, shots)
        finally:
            context.close()


def describe(message: Any) -> str:
    return f"{message.text} ({message.location.get('url', '')})"
