"""An export on the hub: huggingface_hub itself against a server of our own on loopback."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest

from training import export
from training.checkpoint.push import check_push, push_folder
from training.errors import UserError

TOKEN = "hf_" + "s3cret" * 5


class Hub:
    """What the hub's API says to one upload. files: path -> bytes of the last commit."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.created: list[dict] = []
        self.refuses = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

            def do_GET(self) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if self.path.startswith("/api/whoami"):
                    return self.answer(
                        {"name": "me", "type": "user"} if known else {"error": "?"}, 200 if known else 401
                    )
                return self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

            def do_POST(self) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if hub.refuses:
                    return self.answer({"error": "You don't have the rights"}, 403)
                if self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    return self.answer({"url": f"{hub.address}/me/model", "id": "me/model", "name": "me/model"})
                if "/preupload/" in self.path:
                    files = json.loads(body)["files"]
                    modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
                    return self.answer({"files": modes})
                if "/commit/" in self.path:
                    lines = [json.loads(line) for line in body.splitlines()]
                    found = [line["value"] for line in lines if line["key"] == "file"]
                    hub.files = {one["path"]: base64.b64decode(one["content"]) for one in found}
                    return self.answer({"commitUrl": f"{hub.address}/me/model/commit/1", "commitOid": "1"})
                return self.answer({})

            def answer(self, content: dict, code: int = 200) -> None:
                data = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


def test_an_export_is_uploaded_whole_and_its_token_is_never_said(hub, tmp_path, monkeypatch, capfd, caplog):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\0weights")
    monkeypatch.setattr(export, "export_checkpoint", lambda *_, **__: folder)
    with caplog.at_level(logging.DEBUG):
        assert export.main(["runs/x", "-o", str(folder), "--push", "me/model"]) == 0
    assert hub.files == {"config.json": b"{}", "model.safetensors": b"\0weights"}
    assert [one["visibility"] for one in hub.created] == ["private"]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    said = capfd.readouterr()
    assert f"uploaded: {hub.address}/me/model/commit/1" in said.out
    assert TOKEN not in said.out + said.err + caplog.text
    push_folder(folder, "me/model", public=True)
    assert hub.created[-1]["visibility"] == "public"


def test_what_the_hub_refuses_is_one_line(hub, tmp_path, monkeypatch):
    for name in ("model", "a/b/c", "../x", "a/ b", "-a/b"):
        with pytest.raises(UserError, match="--push: expected OWNER/NAME"):
            check_push(name)
    hub.refuses = True
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"--push me/model: .*403.*the export is whole in") as caught:
        push_folder(tmp_path, "me/model")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="--push: the hub does not know this login") as caught:
        check_push("me/model")
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="not logged in to the hub; run `hf auth login`"):
        check_push("me/model")


def test_a_push_is_checked_before_the_export(hub, monkeypatch, capsys):
    monkeypatch.setattr(export, "export_checkpoint", lambda *_, **__: pytest.fail("exported"))
    monkeypatch.setattr(export, "push_folder", SimpleNamespace)
    assert export.main(["runs/x", "-o", "out", "--push", "model"]) == 2
    assert "expected OWNER/NAME, got 'model'" in capsys.readouterr().err
