"""Uploads to the Hugging Face hub: what a stand-in for it receives, and refusals."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard

from flowalign.api import export
from flowalign.cli import main
from flowalign.errors import UserError
from flowalign.runs.adapter import ADAPTER_FILE
from flowalign.runs.adapter_card import adapter_card
from tests.runs.damage import STEPS
from tests.tiny import ROOT, small_config


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the hub that keeps what it is asked to make and the files of commits."""

    made: dict
    files: dict[str, bytes]
    status = 200

    def do_GET(self):
        self.answer({"name": "me", "type": "user"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            type(self).made = json.loads(body)
            self.answer({"url": "http://127.0.0.1/me/adapter", "name": "me/adapter", "id": "x"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.answer({"files": [{"path": name, **regular} for name in names]})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            url = "http://127.0.0.1/me/adapter/commit/1"
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": url})

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("Handler", (Hub,), {"made": {}, "files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield handler
    server.shutdown()


def is_private(request: dict) -> bool:
    """True if a repository is to be made private, as older and newer clients write it."""
    return request.get("private", request.get("visibility") == "private")


def test_an_adapter_is_uploaded_with_card_figures_pictures_and_settings(hub, run, tmp_path):
    assert main(["export", str(run), "--push", "me/adapter"]) == 0
    assert is_private(hub.made)
    assert (hub.made["name"], hub.made["organization"]) == ("adapter", "me")
    exported = run / "adapter-step-000004"
    assert set(hub.files) == {ADAPTER_FILE, "README.md", "before-after.png", "config.yaml"}
    assert hub.files[ADAPTER_FILE] == (exported / ADAPTER_FILE).read_bytes()
    assert hub.files["config.yaml"] == (run / "config.yaml").read_bytes()
    (tmp_path / "card.md").write_bytes(hub.files["README.md"])
    card = ModelCard.load(tmp_path / "card.md")
    assert "pipe.load_lora_weights('me/adapter')" in card.text
    assert "| reward | base | trained |" in card.text
    assert "](before-after.png)" in card.text
    # The exported folder itself is as without an upload.
    assert {path.name for path in exported.iterdir()} == {ADAPTER_FILE, "README.md"}


def test_an_earlier_step_has_no_figures_and_a_public_repository_is_asked_for(hub, run):
    assert main(["export", str(run), "--step", "3", "--push", "me/adapter", "--public"]) == 0
    assert not is_private(hub.made)
    assert set(hub.files) == {ADAPTER_FILE, "README.md", "config.yaml"}
    assert b"| reward |" not in hub.files["README.md"]


def test_a_refused_upload_leaves_the_adapter_and_says_what_to_do(hub, run, capsys):
    hub.status = 403
    assert main(["export", str(run), "--push", "me/adapter"]) == 2
    message = capsys.readouterr().err
    assert "me/adapter: the hub refused the upload. Run `hf auth login`" in message
    assert (run / "adapter-step-000004" / ADAPTER_FILE).is_file()


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))


@pytest.mark.usefixtures("logged_out")
@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("adapter", "hf_of_a_test", "is not a repository. Write --push owner/name"),
        ("me/ad apter", "hf_of_a_test", "Write --push owner/name"),
        ("me/adapter", "", "needs an account of the Hugging Face hub. Run `hf auth login`"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_the_export(
    repository, token, message, run, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message):
        export(run, push=repository)
    assert not (run / "adapter-step-000004").exists()


def test_a_format_without_a_card_is_not_pushed(hub, run):
    with pytest.raises(UserError, match="--push uploads the format diffusers"):
        export(run, format="comfyui", push="me/adapter")


def test_a_hub_that_cannot_be_reached_is_refused(run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert main(["export", str(run), "--push", "me/adapter"]) == 2
    assert "me/adapter: the hub cannot be reached. Try again" in capsys.readouterr().err


def test_the_metadata_of_a_card_name_licence_base_and_pipeline(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "assets" / "tiny-sd3", model)
    licence = "license: other\nlicense_name: small-licence\nlicense_link: LICENSE.md\n"
    (model / "README.md").write_text(f"---\n{licence}tags: [x]\n---\n# A model\n")
    config = small_config(tmp_path / "run", *STEPS, f"model.path={model}")
    (tmp_path / "card.md").write_text(adapter_card(config, tmp_path / "adapter"))
    data = ModelCard.load(tmp_path / "card.md").data.to_dict()
    assert data == {
        "base_model": str(model),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "text-to-image", "flowalign"],
        "license": "other",
        "license_name": "small-licence",
        "license_link": "LICENSE.md",
        "instance_prompt": data["instance_prompt"],
    }
    assert f"pipe({data['instance_prompt']!r}" in (tmp_path / "card.md").read_text()
