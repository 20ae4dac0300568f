"""`tinylm import hf:OWNER/NAME` downloads from a local server that imitates the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from untrained_runs import MakeRun

from tinylm.errors import InputError, WorkError
from tinylm.interchange import hub
from tinylm.interchange.exporting import export
from tinylm.interchange.importing import import_model
from tinylm.run import Run

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/small"


class HubServer(ThreadingHTTPServer):
    """Serves the files in `folder` as the files of the model `NAME`."""

    folder: Path
    requested: list[str]


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, include_body: bool) -> None:
        path = self.path.partition("?")[0]
        files = {file.name: file.read_bytes() for file in self.server.folder.iterdir()}
        if path.startswith(f"/api/models/{NAME}/revision/"):
            if path.rpartition("/")[2] not in ("main", COMMIT):
                return self.send(404, b"{}", include_body, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in files]
            return self.send(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode(), include_body, {})
        if path.startswith(f"/api/models/{NAME}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self.send(200, json.dumps(entries).encode(), include_body, {})
        name = path.rpartition("/")[2]
        if path.startswith(f"/{NAME}/resolve/") and name in files:
            self.server.requested.append(name)
            content = files[name]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.send(200, content, include_body, headers)
        return self.send(404, b"{}", include_body, {"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, content: bytes, include_body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if include_body:
            self.wfile.write(content)


@pytest.fixture
def server(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    export(make_run("llama", name="original"), "hf", tmp_path / "files")
    (tmp_path / "files" / "pytorch_model.bin").write_bytes(b"not needed")
    running = HubServer(("127.0.0.1", 0), Handler)
    running.folder, running.requested = tmp_path / "files", []
    threading.Thread(target=running.serve_forever, daemon=True).start()
    import huggingface_hub.constants

    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield running
    running.shutdown()
    running.server_close()


def test_a_model_is_downloaded_and_imported(server: HubServer, tmp_path: Path) -> None:
    result = import_model(f"hf:{NAME}", tmp_path / "run")
    assert result.source == f"hf:{NAME}"
    assert result.largest_difference == pytest.approx(0, abs=1e-4)
    assert set(server.requested) == {"config.json", "model.safetensors", "tokenizer.json"}
    run = Run.open(tmp_path / "run")
    assert run.recipe.data.train == (f"imported:hf:{NAME}",)  # type: ignore[union-attr]
    assert run.tokenizer.fingerprint == Run.open(tmp_path / "original").tokenizer.fingerprint
    import_model(f"hf:{NAME}@{COMMIT}", tmp_path / "again")


def test_invalid_names_and_an_unreachable_hub_are_reported(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the Hub has no such public model"):
        hub.download("hf:someone/else")
    with pytest.raises(InputError, match="the model has no revision v2"):
        hub.download(f"hf:{NAME}@v2")
    with pytest.raises(InputError, match="expected hf:OWNER/NAME"):
        hub.download("hf:a/b/c")
    (server.folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"the repository has no config\.json"):
        hub.download(f"hf:{NAME}@main")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WorkError, match="cannot download hf:someone/new"):
        hub.download("hf:someone/new")
