"""A Hugging Face Hub small enough to read: one repository's files, served on 127.0.0.1."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """State of the stand-in: files by name, requests seen, and whether a token is needed."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.token: str | None = None
        self.url = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def file(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            _, owner, name, _, revision, path = self.path.split("/", 5)
            if hub.token and self.headers.get("authorization") != f"Bearer {hub.token}":
                self.answer(401, X_Error_Code="RepoNotFound")
            elif f"{owner}/{name}" != "me/rule":
                self.answer(404, X_Error_Code="RepoNotFound")
            elif revision not in ("main", COMMIT):
                self.answer(404, X_Error_Code="RevisionNotFound")
            elif path not in hub.files:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                body = hub.files[path]
                self.answer(200, body, ETag=f'"{hash(body) & 0xFFFFFFFF:x}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET = file

        def do_POST(self) -> None:
            hub.requests.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "/preupload/" in self.path:
                wanted = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]
                reply: dict[str, object] = {"files": modes}
            elif "/commit/" in self.path:
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                reply = {"commitOid": COMMIT, "commitUrl": f"{hub.url}/me/rule/commit/{COMMIT}", "success": True}
            else:
                reply = {"url": f"{hub.url}/me/rule"}
            self.answer(200, json.dumps(reply).encode(), Content_Type="application/json")

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the stand-in until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
