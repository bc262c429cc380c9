"""Servers on loopback for tests of remote shards: HTTP with ranges and faults, a hub, and S3.

with FileServer(folder) as server: ... server.url, server.sent

Each counts what it sends, and ends with its `with` block.
"""

from __future__ import annotations

import html
import json
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a busy machine accepts late; what finds no room waits a second


class FileServer:
    """Serves a folder over HTTP/1.1; `faults` says what goes wrong with the next requests.

    A fault is taken from `faults[suffix]` by a GET of a path with that suffix: an int is a status
    to answer with, "cut" closes the connection in the middle of the body, "slow" stalls there for
    `stall` seconds, "flip" damages one byte.
    """

    def __init__(self, folder: Path, *, ranges: bool = True, listing: bool = True) -> None:
        self.folder, self.ranges, self.listing = folder, ranges, listing
        self.faults: dict[str, list[int | str]] = {}
        self.stall, self.delay = 1.0, 0.0
        self.sent: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self.handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """What answers a request."""
        return _handler(self)

    def path(self, name: str) -> Path:
        """The file or folder behind a name."""
        return self.folder / name.lstrip("/")

    def tar_bytes(self) -> int:
        """Bytes of tars sent so far."""
        with self.lock:
            return sum(count for path, count in self.sent.items() if path.endswith(".tar"))

    def take_fault(self, path: str) -> int | str | None:
        """The fault of the next GET of a path."""
        with self.lock:
            for suffix, faults in self.faults.items():
                if path.endswith(suffix) and faults:
                    return faults.pop(0)
        return None


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            name = unquote(self.path)
            path = server.path(name)
            fault = server.take_fault(name) if body else None
            with server.lock:
                server.requests[f"{self.command} {name}"] += 1
            if isinstance(fault, int):
                self._send(fault, b"", body)
            elif path.is_dir():
                names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
                links = "".join(f'<a href="{html.escape(n)}">{n}</a>\n' for n in names)
                answer = (200, links.encode()) if server.listing else (403, b"")
                self._send(*answer, body, {"Content-Type": "text/html"})
            elif path.is_file():
                self._file(name, path, body, fault)
            else:
                self._send(404, b"", body)

        def _file(self, name: str, path: Path, body: bool, fault: object) -> None:
            data, status = path.read_bytes(), 200
            headers = {"ETag": f'"{path.stat().st_mtime_ns:x}"'}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted and server.ranges:
                start, size = int(wanted[1]), len(data)
                end = min(int(wanted[2] or size - 1) + 1, size)
                if start >= size:
                    self._send(416, b"", body)
                    return
                data, status = data[start:end], 206
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            time.sleep(server.delay if body else 0)
            if fault == "flip":
                data = bytes([data[0] ^ 255]) + data[1:]
            self._send(status, data, body, headers, name, fault)

        def _send(
            self,
            status: int,
            data: bytes,
            body: bool,
            headers: dict[str, str] | None = None,
            name: str = "",
            fault: object = None,
        ) -> None:
            half = len(data) // 2 if fault in ("cut", "slow") else len(data)
            if body:
                with server.lock:
                    server.sent[name] += half  # first: who has the answer may look at once
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not body:
                return
            with suppress(OSError):
                self.wfile.write(data[:half])
                if fault == "cut":
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif fault == "slow":
                    time.sleep(server.stall)
                    self.wfile.write(data[half:])

    return Handler


class HubServer(FileServer):
    """A folder as the data set `repo` of a hub: its API for data sets, and its files.

    Paths and answers are those that huggingface_hub asks for and reads (hub API: `/api/datasets/
    REPO[/revision/REV]`, `.../tree/REV/PATH`, `.../paths-info/REV`, `/datasets/REPO/resolve/REV/
    PATH`); which of tree and paths-info it asks is its choice. With a `token`, whoever does not
    send it is refused like at a gated repository.
    """

    def __init__(self, folder: Path, repo: str, token: str | None = None) -> None:
        self.repo, self.token = repo, token
        super().__init__(folder)

    def path(self, name: str) -> Path:
        """The file behind a name; no listing of folders by that way."""
        prefix = f"/datasets/{self.repo}/resolve/main/"
        inside = name.removeprefix(prefix) if name.startswith(prefix) else ".nothing"
        return self.folder / (inside if (self.folder / inside).is_file() else ".nothing")

    def entry(self, path: Path) -> dict[str, object]:
        """What the hub says of a file or folder."""
        named = {"path": str(path.relative_to(self.folder)), "oid": f"{hash(path) % 2**64:040x}"}
        if path.is_dir():
            return {**named, "type": "directory"}
        return {**named, "type": "file", "size": path.stat().st_size}

    def answer(self, path: str, form: dict[str, list[str]]) -> object:
        """The API's answer to a path, or None where there is nothing."""
        base = f"/api/datasets/{self.repo}"
        if path in (base, f"{base}/revision/main"):
            return {"id": self.repo, "sha": "0" * 40, "siblings": [], "tags": []}
        if path == f"{base}/paths-info/main":
            found = (self.folder / name for name in form.get("paths", []))
            return [self.entry(path) for path in found if path.exists()]
        folder = self.folder / path.removeprefix(f"{base}/tree/main").strip("/")
        if path.startswith(f"{base}/tree/main") and folder.is_dir():
            return [self.entry(child) for child in sorted(folder.iterdir())]
        return None

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """Files as a plain server has them, `/api/` from `answer`."""
        server = self

        class Handler(_handler(server)):
            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                self._api(parse_qs(form))

            def _answer(self, body: bool) -> None:
                if not self._refused():
                    self._api({}) if self.path.startswith("/api/") else super()._answer(body)

            def _refused(self) -> bool:
                if server.token in (None, self.headers.get("Authorization", "")[7:]):
                    return False
                self._send(403, b"", True, {"X-Error-Code": "GatedRepo"})
                return True

            def _api(self, form: dict[str, list[str]]) -> None:
                path = unquote(urlsplit(self.path).path)
                with server.lock:
                    server.requests[f"{self.command} {path}"] += 1
                found = server.answer(path, form)
                known = path.startswith(f"/api/datasets/{server.repo}")
                code = {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"}
                if found is None:
                    self._send(404, b"", True, code)
                else:
                    kind = {"Content-Type": "application/json"}
                    self._send(200, json.dumps(found).encode(), True, kind)

        return Handler


@contextmanager
def s3_server(bucket: str) -> Iterator[tuple[str, Counter[str]]]:
    """An S3-compatible server with an empty bucket: (its address, bytes sent by object).

    The environment is set for s3fs (address and credentials) and put back afterwards.
    """
    import boto3
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)
    sent: Counter[str] = Counter()
    lock = threading.Lock()

    def counting(environ: dict, start_response) -> Iterator[bytes]:
        for piece in application(environ, start_response):
            if environ["REQUEST_METHOD"] == "GET":
                with lock:
                    sent[environ["PATH_INFO"]] += len(piece)
            yield piece

    server = make_server("127.0.0.1", 0, counting, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()  # one of an earlier server has that one's address
    try:
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket=bucket)
        yield address, sent
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.shutdown()
        thread.join()
