"""Caption Images through ComfyUI's executor, with small real models."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import comfy.model_management
import comfy.utils
import nodes
import pytest
import torch

from harness import captioners
from harness.executor import Graph
from harness.training import node, one_sentence


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Each kind once."""
    root, made = tmp_path_factory.mktemp("caption_models"), {}

    def built(kind: str):
        if kind not in made:
            made[kind] = captioners.KINDS[kind](root / kind)
        return made[kind]

    return built


@pytest.fixture
def models(folders, built):
    """`models("blip")` puts one into models/caption_models and gives its place."""

    def models(kind: str, name: str = "") -> str:
        place = folders / "models" / "caption_models" / (name or kind)
        return shutil.copytree(built(kind), place)

    return models


@pytest.fixture
def caption(given):
    def caption(images, clip=None, **inputs) -> dict[str, dict]:
        """1 pictures, 2 captions, 3 models where a CLIP is wanted."""
        values = {"model": "blip", "strip": "", "max_tokens": 6, "batch": 2, **inputs}
        prompt = {
            "1": given("IMAGE", images),
            "2": node("CounterpointCaptionImages", **{"images": ["1", 0], **values}),
        }
        if clip:
            prompt["3"] = node("SmallModelsLoadSD15")
            prompt["2"]["inputs"]["clip"] = ["3", 1]
        return prompt

    return caption


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache on this machine, empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def kept(folders) -> dict[str, str]:
    (file,) = (folders / "output" / "counterpoint" / "captions").glob("*.json")
    return json.loads(file.read_text(encoding="utf-8"))["replies"]


def new(run) -> str:
    return run.value("2", 1).splitlines()[0].split(": ")[1]


@pytest.mark.parametrize("kind", ["blip", "florence2", "internvl"])
def test_captions_are_the_models_own_words(graph, pack, models, caption, kind):
    folder, images = models(kind), captioners.pictures(5)
    run = graph(caption(images, model=kind, prompt="a red cat on the mat"))
    captioner, tidy = pack.training.captioner, pack.training.captions.tidy
    alone = captioner.load(folder, pack.nodes.caption.fitting_dtype())
    asked = captioner.question(kind, "a red cat on the mat")
    assert run.outputs["2"][0] == [tidy(alone.replies([p[0]], asked, 6)[0]) for p in images]
    assert run.value("2", 1).startswith(f"5 captions by {kind}: 5 new, 0 known")
    assert list(run.ui["2"]["text"]) == [run.value("2", 1)]


def test_batches_see_through_pictures_and_doubles(graph, models, caption):
    models("blip")
    first, second = captioners.pictures(1, 1)[0], captioners.pictures(1, 2)[0]
    veil = torch.rand(1, *first.shape[1:3], 1)
    run = graph(caption([torch.cat([first, second]), torch.cat([first, veil], -1)]))
    a, b, c = run.outputs["2"][0]
    assert a == c and new(run) == "2 new, 1 known from before"
    assert graph(caption([first])).outputs["2"][0] == [a] and graph(caption([second])).outputs["2"][0] == [b]


def test_what_was_described_once_is_not_described_again(graph, pack, models, caption, monkeypatch):
    models("blip")
    images = captioners.pictures(3)
    first = graph(caption(images))
    load, loaded = pack.training.captioner.load, []
    monkeypatch.setattr(pack.training.captioner, "load", lambda *args: loaded.append(args) or load(*args))
    again = Graph()(caption(images))
    assert again.outputs["2"][0] == first.outputs["2"][0] and new(again) == "0 new, 3 known from before"
    other_strip = Graph()(caption(images, strip=", ".join(first.outputs["2"][0][0].split()), batch=1, prompt="more"))
    assert other_strip.outputs["2"][0][0] == "" and not loaded, "the prompt is nothing that BLIP is asked"
    more = Graph()(caption([*images, *captioners.pictures(1, 9)]))
    assert more.outputs["2"][0][:3] == first.outputs["2"][0] and new(more) == "1 new, 3 known from before"
    assert len(loaded) == 1 and more.sent("progress")[0]["value"] == 3 * 6


def test_other_words_asked_and_other_weights_are_described_anew(graph, models, caption):
    folder, images = models("qwen2_vl"), captioners.pictures(5)
    first = graph(caption(images, model="qwen2_vl", prompt="a red cat on the mat"))
    other = graph(caption(images, model="qwen2_vl", prompt="sea"))
    assert new(other) == "5 new, 0 known from before" and other.outputs["2"][0] != first.outputs["2"][0]
    assert new(graph(caption(images, model="qwen2_vl", prompt="sea", max_tokens=5))) == "5 new, 0 known from before"
    captioners.blip(folder.parent / "blip")
    before = graph(caption(images, model="blip"))
    assert graph(caption(images, model="blip")).executed == []
    shutil.rmtree(folder.parent / "blip")
    captioners.blip(folder.parent / "blip", seed=5)
    after = graph(caption(images, model="blip"))
    assert new(after) == "5 new, 0 known from before" and after.outputs["2"][0] != before.outputs["2"][0]


def test_the_same_model_in_another_place_is_known(graph, models, caption):
    models("blip")
    models("blip", "renamed")
    images = captioners.pictures(2)
    graph(caption(images))
    assert new(graph(caption(images, model="renamed"))) == "0 new, 2 known from before"


def test_cancelled_and_queued_again_it_goes_on(graph, folders, models, caption, monkeypatch):
    """Cancelled in the middle of the second of three batches, between two words."""
    models("blip")
    images, move, moved = captioners.pictures(5), comfy.utils.ProgressBar.update_absolute, []

    def cancel_after(bar, value, *rest):  # core sends only some of them to the browser
        moved.append(value)
        if value == 2 * 6 + 2 * 2:  # of 5 * 6
            nodes.interrupt_processing()
        return move(bar, value, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils.ProgressBar, "update_absolute", cancel_after)
        stopped = graph(caption(images))
    assert stopped.interrupted and not stopped.errors
    assert moved == [0, 2, 4, 6, 8, 10, 12, 12, 12, 14, 16], (
        "two at once, six words each; then a batch, two words of it"
    )
    done = kept(folders)
    assert len(done) == 2
    rest = graph(caption(images))
    assert new(rest) == "3 new, 2 known from before"
    assert [data["value"] for data in rest.sent("progress")][:: len(rest.sent("progress")) - 1] == [2 * 6, 5 * 6]
    assert done.items() <= kept(folders).items()
    shutil.rmtree(folders / "output" / "counterpoint")
    assert Graph()(caption(images)).outputs["2"][0] == rest.outputs["2"][0]


def test_the_model_leaves_memory(graph, models, caption):
    models("blip")
    graph(caption(captioners.pictures(2)))
    held = [
        type(m.model.model[0]).__name__
        for m in comfy.model_management.current_loaded_models
        if hasattr(m.model.model, "__getitem__")
    ]
    assert not [name for name in held if "Blip" in name]


def test_warnings_stand_before_the_captions(graph, models, caption):
    models("blip")
    (first,) = captioners.pictures(1)
    said = graph(caption([first])).outputs["2"][0][0]
    second = captioners.pictures(1, 9)[0]
    report = graph(caption([first, second, first], strip=", ".join(said.split()))).value("2", 1).splitlines()
    assert "Style words were taken out of" in report[1] and report[2] == "Look at:"
    assert report[3].startswith("- pictures 1, 3: the caption is empty")
    assert report[-3].startswith("1. ") and report[-1].startswith("3. ")


def test_a_connected_clip_counts_its_pieces_of_words(graph, pack, models, caption):
    models("blip")
    run = graph(caption(captioners.pictures(2), clip=True))
    count = pack.nodes.caption.token_counter(run.value("3", 1))
    assert count("a red cat") == (3, 75) and count("") == (0, 75)
    assert count(" ".join(["cat"] * 200)) == (200, 75)
    said = run.outputs["2"][0]
    look = pack.training.captions.warnings([*said, " ".join(["cat"] * 71)], count)
    assert look[-1] == "picture 3: 76 pieces of words with 'in the style of ...', and CLIP reads 75"


def test_folders_are_offered(pack, models, folders):
    models("blip")
    (folders / "models" / "caption_models" / "notes.txt").write_text("no model")
    assert pack.nodes.caption.choices() == ["hub id below", "blip"]


@pytest.mark.parametrize(
    ("missing", "words"),
    [("*.safetensors", "has no weights"), ("config.json", "has no config.json"), ("[tv]o*", "has no tokenizer")],
)
def test_an_incomplete_folder_is_named(graph, models, caption, missing, words):
    folder = models("blip")
    for file in folder.glob(missing):
        file.unlink()
    one_sentence(graph(caption(captioners.pictures(1)), check=False), "blip", words, "copy")


@pytest.mark.parametrize("model", ["../blip", "a/b", "nothing", "..", ""])
def test_a_folder_that_is_not_there(graph, pack, models, caption, model):
    """Core refuses what is not in its list; what comes over a wire is refused by us."""
    models("blip")
    one_sentence(graph(caption(captioners.pictures(1), model=model), check=False), "model", "not in list")
    with pytest.raises(ValueError, match="put the model's folder there and press R"):
        pack.nodes.caption.folder_of(model, "", False)


@pytest.mark.parametrize("hub_id", ["", "../secret", "https://example.org/model", "me/tiny/more", "me", "./me"])
def test_what_is_no_hub_id_is_never_looked_up(graph, caption, hub, no_network, hub_id):
    run = graph(caption(captioners.pictures(1), model="hub id below", hub_id=hub_id, download=True), check=False)
    one_sentence(run, "is no hub id" if hub_id else "No model is chosen", "write a hub id such as")
    assert not no_network and not hub.exists()


def test_a_star_alone_is_refused_before_the_queue(graph, models, caption):
    models("blip")
    run = graph(caption(captioners.pictures(1), strip="oil, *"), check=False)
    assert run.node_errors
    one_sentence(run, "The style word '*' has no letters", "write words")


def test_nothing_is_downloaded_unasked(graph, caption, hub, no_network):
    run = graph(caption(captioners.pictures(1), model="hub id below", hub_id="me/tiny"), check=False)
    one_sentence(run, "me/tiny is not on this machine", "turn `download` on", "models/caption_models")
    assert not no_network and not hub.exists()


def test_a_download_that_fails_is_one_sentence(graph, caption, hub, no_network):
    run = graph(caption(captioners.pictures(1), model="hub id below", hub_id="me/tiny", download=True), check=False)
    one_sentence(run, "me/tiny could not be downloaded", "look at its name and at your network")
    assert no_network


def test_a_hub_id_that_is_here_needs_no_network(graph, caption, built, hub, no_network):
    """The hub's cache as its own program lays it out."""
    place = hub / "models--me--tiny"
    shutil.copytree(built("blip"), place / "snapshots" / "0a1b")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0a1b")
    run = graph(caption(captioners.pictures(2), model="hub id below", hub_id=" me/tiny "))
    assert run.value("2", 1).startswith("2 captions by me/tiny: 2 new") and not no_network


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download needs; `asked` are the files that were fetched."""

    folder, asked = None, []

    def do_HEAD(self):
        self.answer(self.path.split("/resolve/")[1].split("/", 1)[1])

    def do_GET(self):
        if self.path.startswith("/api/models/me/tiny"):
            files = [f for f in self.folder.rglob("*") if f.is_file()]
            names = [f.relative_to(self.folder).as_posix() for f in files]
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": f.stat().st_size,
                    "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                }
                for f, name in zip(files, names, strict=True)
            ]
            info = {"id": "me/tiny", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in names]}
            return self.say(json.dumps(tree if "/tree/" in self.path else info).encode())
        if "/resolve/" not in self.path:
            return self.send_error(404)
        name = self.path.split("/resolve/")[1].split("/", 1)[1]
        self.asked.append(name)
        self.answer(name)

    def answer(self, name: str) -> None:
        data = (self.folder / name).read_bytes()
        self.say(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "a" * 40})

    def say(self, data: bytes, headers: dict = {}) -> None:  # noqa: B006
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_asked_to_download_it_fetches_once_and_only_what_is_read(graph, caption, built, hub, tmp_path, monkeypatch):
    """A small hub on this machine, with program code, weights of another kind and a folder beside the model."""
    from huggingface_hub import constants, file_download

    Hub.folder = shutil.copytree(built("blip"), tmp_path / "there")
    for name in ("modeling_evil.py", "pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors"):
        (Hub.folder / name).parent.mkdir(exist_ok=True)
        (Hub.folder / name).write_text("not wanted")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", here)
        for module in (constants, file_download):  # older versions have a copy there
            file = here + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", file, raising=False)
        inputs = {"model": "hub id below", "hub_id": "me/tiny", "download": True}
        first = graph(caption(captioners.pictures(2), **inputs))
        server.shutdown()
    assert sorted(Hub.asked) == sorted(f.name for f in built("blip").iterdir())
    again = graph(caption(captioners.pictures(3), **{**inputs, "download": False}))
    assert new(again) == "1 new, 2 known from before" and again.outputs["2"][0][:2] == first.outputs["2"][0]
