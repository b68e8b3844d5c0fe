"""A Hugging Face Hub small enough to read: one repository, ``me/rule``, on 127.0.0.1."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

REPO = "me/rule"
OLD, NEW = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"


class Hub:
    """What the stand-in holds and has seen."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.branches = {"main": OLD}
        self.commits: dict[str, dict[str, bytes]] = {OLD: {}}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.token: str | None = None
        self.upload_mode = "regular"
        self.storage_status = 200
        self.error: tuple[int, str] | None = None
        self.message: str | None = None

    @property
    def files(self) -> dict[str, bytes]:
        """Files of the branch main."""
        return self.commits[self.branches["main"]]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content_Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refused(self) -> bool:
            """Note the request; answer it if it fails before anything is looked up."""
            hub.requests.append(f"{self.command} {self.path}")
            if hub.error:
                self.answer(hub.error[0], X_Error_Code=hub.error[1])
            elif hub.token and self.headers.get("authorization") != f"Bearer {hub.token}":
                self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
            else:
                return False
            return True

        def file(self) -> None:
            if self.refused():
                return
            owner, name, _, revision, path = self.path.removeprefix("/").split("/", 4)
            commit = hub.branches.get(revision, revision)
            if f"{owner}/{name}" != REPO:
                self.answer(404, X_Error_Code="RepoNotFound")
            elif commit not in hub.commits:
                self.answer(404, X_Error_Code="RevisionNotFound")
            elif path not in hub.commits[commit]:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            else:
                body = hub.commits[commit][path]
                self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit)

        do_HEAD = do_GET = file

        def do_PUT(self) -> None:
            body = self.body()  # To a presigned address, so without a token.
            assert hashlib.sha256(body).hexdigest() == self.path.rsplit("/", 1)[1]
            if hub.storage_status == 200:
                hub.uploads[hashlib.sha256(body).hexdigest()] = body
            self.answer(hub.storage_status)

        def do_POST(self) -> None:
            body = self.body()
            if not self.refused():
                self.answer(200, json.dumps(self.reply(body)).encode(), Content_Type="application/json")

        def reply(self, body: bytes) -> dict[str, Any]:
            if "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {name: hub.upload_mode if name.endswith(".safetensors") else "regular" for name in names}
                files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
                return {"files": files}
            if self.path.endswith("/objects/batch"):
                objects = json.loads(body)["objects"]
                return {
                    "transfer": "basic",
                    "objects": [
                        {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}} for item in objects
                    ],
                }
            if "/commit/" in self.path:
                return self.commit([json.loads(line) for line in body.splitlines()])
            return {"url": f"{hub.url}/{REPO}"}

        def commit(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
            files = dict(hub.files)
            for entry in entries:
                value = entry["value"]
                if entry["key"] == "header":
                    hub.message = value["summary"]
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.uploads[value["oid"]]
                else:
                    files[value["path"]] = base64.b64decode(value["content"])
            hub.commits[NEW] = files
            hub.branches["main"] = NEW
            return {"commitOid": NEW, "commitUrl": f"{hub.url}/{REPO}/commit/{NEW}", "success": True}

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the stand-in until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = _handler(hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def close_session() -> None:
    """Close the client's connections, which would outlive the server."""
    from huggingface_hub import utils

    close = utils.close_session if hasattr(utils, "close_session") else utils.reset_sessions  # Below version 1.
    close()


def ask(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Send this process's Hub client to a server.

    It reads its settings from the environment when it is imported, so they are replaced where it keeps them.
    """
    from huggingface_hub import constants, file_download

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    if hasattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):  # Version 0.26 has a copy.
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    close_session()


def redirect(monkeypatch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    """Send this process's Hub client to a server and a home of its own."""
    from huggingface_hub import constants

    settings = {
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value, raising=name != "HF_HUB_DISABLE_XET")  # Older ones know no Xet.
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)  # Between the client's attempts.
    ask(monkeypatch, url)
