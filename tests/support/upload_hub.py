"""A hub on loopback that takes uploads: the endpoints that huggingface_hub calls for a commit.

    with UploadHub() as hub:    # HF_ENDPOINT=hub.url, HF_TOKEN=hub.TOKEN
        ...
    hub.repos["me/mine"]        # path → bytes, as committed

Weights go the way of large files (LFS): their bytes come before the commit that names their hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class UploadHub:
    """Knows one owner, ``me``, whose token may write to ``me/...`` alone."""

    TOKEN = "hf_test"

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failing: dict[str, int] = {}
        """Endings of addresses, and the status that they answer with."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> UploadHub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, object]:
        """Status and JSON."""
        if token != f"Bearer {self.TOKEN}" and not path.startswith("/store/"):
            return 401, {"error": "Invalid credentials"}
        for ending, status in self.failing.items():
            if path.endswith(ending):
                return status, {"error": "out of order"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/store/(\w+)", path):
            self.stored[found[1]] = body
            return (200, {}) if hashlib.sha256(body).hexdigest() == found[1] else (400, {})
        if path == "/api/validate-yaml":
            head = json.loads(body)["content"].partition("\n---\n")[0]
            whole = head.startswith("---\n") and "pipeline_tag: image-text-to-text" in head
            return (200, {}) if whole else (400, {"errors": [{"message": "no metadata"}]})
        repo = re.match(r"(?:/api/models)?/(me/[\w-]+?)(?:\.git)?/", path)
        if not repo or repo[1] not in self.repos:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{self.url}/store/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {"objects": objects}
        if "/commit/" in path:
            return self._commit(repo[1], body)
        return 404, {"error": f"{method} {path} is not spoken here"}

    def _create(self, asked: dict) -> tuple[int, object]:
        owner, name = asked.get("organization") or "me", asked["name"]
        if owner != "me":
            return 403, {"error": f"You don't have the rights to create a model under {owner}"}
        repo = f"me/{name}"
        if repo in self.repos:
            return 409, {
                "error": "You already created this model repo",
                "url": f"{self.url}/{repo}",
            }
        self.repos[repo], self.private[repo] = (
            {},
            asked.get("visibility") == "private" or bool(asked.get("private")),
        )
        return 200, {"url": f"{self.url}/{repo}", "name": repo}

    def _commit(self, repo: str, body: bytes) -> tuple[int, object]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.stored[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1"}


def _handler(hub: UploadHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size)
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            token = self.headers.get("Authorization", "")
            status, answer = hub.answer(self.command, path, token, body)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status >= 400:
                self.send_header("X-Error-Message", answer.get("error", ""))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, *args: object) -> None:
            """Nothing: tests look at `requests`."""

    return Handler
