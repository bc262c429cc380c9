"""Reading objects of a store: exact byte ranges and whole objects, retried with back-off.

    reader = RemoteReader()
    reader.fetch("s3://bucket/shards/vsr/vsr-train-000000.tar", 512, 2048, size=250_000_000)

`http(s)://`, `s3://`, `hf://` and whatever else fsspec knows, through fsspec. Its settings are the
user's: credentials come from where each library looks (`AWS_*`, `~/.aws`, `HF_TOKEN`), anything
else from fsspec's own environment variables and configuration files, for instance
`FSSPEC_S3_ENDPOINT_URL=https://store.example` or `FSSPEC_S3_ANON=true`.

Two things are not left to fsspec. Its file objects read ahead in blocks of megabytes, so ranges
are asked for as such and their length is checked. And of failures it knows little: here whatever
may pass (a connection cut, a time-out, a 500 or 429) is tried again with back-off, and what will
not (404, 403, a missing package) is an error at once. Every error names the URL and the bytes.

Objects are taken in blocks, several at a time, so a cut connection costs one block and a single
slow stream does not set the pace; a server that ignores ranges is read as one stream.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ldistill.common.errors import TransientError

BLOCK = 8 * 1024 * 1024
"""Bytes of one request when a whole object is read."""
BLOCKS_AHEAD = 4
"""Blocks of an object that are under way at a time."""
THREADS = 16
"""Requests that one process has under way at a time."""
PASSING_STATUS = (408, 409, 425, 429)
NO_RANGES = "doesn't appear to support range requests"
TAGS = ("ETag", "etag", "blob_id", "xet_hash", "Last-Modified", "LastModified")
T = TypeVar("T")
_opened: dict[int, Any] = {}
"""File systems in use, by id, so that none ends in a forked child. fsspec forgets them there, and
their end would close the parent's connections in the one epoll set that both have: the parent
would wait for answers that nobody tells it of (fsspec 2026.9, `HTTPFileSystem.close_session`)."""


class RemoteError(OSError):
    """A store that does not give what was asked; the message says what and what to do."""


class Unreachable(RemoteError, TransientError):
    """A store that still failed at the last attempt."""


class ObjectChanged(RemoteError):
    """An object that is not, or no longer, the one its index describes."""


class Refused(RemoteError):
    """A store that denies access, or rejects the request."""


class RangesUnsupported(RemoteError):
    """A server that answers a request for a range with the whole object."""


class ShortRead(RemoteError):
    """Fewer or more bytes than asked for."""


@dataclass(frozen=True)
class Retry:
    """How often and how patiently to try again: pauses double from `first` up to `longest`.

    As it stands, a store may be out of reach for about a minute and a half.
    """

    attempts: int = 10
    first: float = 0.5
    """Seconds before the second attempt."""
    longest: float = 30.0
    timeout: float = 60.0
    """Seconds without a byte after which a connection counts as dead."""

    def pause(self, attempt: int) -> float:
        """Seconds to wait after a failed attempt, with jitter lest ranks march in step."""
        return min(self.longest, self.first * 2**attempt) * random.uniform(0.5, 1.0)


def is_remote(root: str | Path) -> bool:
    """Whether shards lie behind a URL rather than in a folder."""
    return "://" in str(root) and not str(root).startswith("file://")


class RemoteReader:
    """Reads objects by URL; safe in threads, after a fork, and pickled to another process.

    Every method raises FileNotFoundError for what is missing and RemoteError for what a store
    refuses or, to the last attempt, fails to give.
    """

    def __init__(self, retry: Retry | None = None) -> None:
        self.retry = retry or Retry()
        self._owner = os.getpid()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return RemoteReader, (self.retry,)

    # requests --------------------------------------------------------------------------------

    def fetch(self, url: str, start: int, end: int, size: int) -> bytes:
        """Bytes [start, end) of an object that is `size` bytes long.

        Raises RangesUnsupported where the server sends the whole object instead, and ObjectChanged
        where the object has another size.
        """

        def attempt() -> bytes:
            try:
                data = _read_range(self._filesystem(url), url, start, end, size)
            except Exception as error:  # each store's library raises its own
                if _outside(error):
                    self._check_size(url, size)
                raise
            self._check_length(len(data), end - start, url, size)
            return data

        return self._retried(f"{url}, bytes {start} to {end}", attempt)

    def get(self, url: str) -> bytes:
        """A small object as a whole."""
        return self._retried(url, lambda: self._fresh(url).cat_file(url))

    def info(self, url: str) -> tuple[int | None, str | None]:
        """(size, tag) of an object now; None where the store says none. Content changes the tag."""
        found = self._retried(url, lambda: self._fresh(url).info(url))
        tag = next((str(found[name]) for name in TAGS if found.get(name)), None)
        return found.get("size"), tag

    def names(self, url: str) -> list[str]:
        """Names of the objects and folders right below a URL; empty where the store lists none."""
        folder = url.rstrip("/") + "/"
        try:
            found = self._retried(url, lambda: self._fresh(url).ls(folder, detail=False))
        except (FileNotFoundError, Refused):
            return []
        return sorted({name.rstrip("/").rpartition("/")[2] for name in found})

    def each(self, items: Iterable[Any], action: Callable[[Any], T]) -> list[T]:
        """`action` of every item, several at a time, in order. Never call it from an action."""
        futures = [self.submit(action, item) for item in items]
        return [future.result() for future in futures]

    def submit(self, action: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run something in one of this process's threads."""
        if self._owner != os.getpid():  # threads do not survive a fork
            self.__init__(self.retry)  # type: ignore[misc]
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(THREADS, "remote")
            return self._pool.submit(action, *arguments)

    # whole objects ---------------------------------------------------------------------------

    def download(self, url: str, size: int, file: BinaryIO) -> str:
        """Write an object of `size` bytes to a file at its beginning; returns its SHA-256."""
        try:
            return _write(self._blocks(url, size), file)
        except RangesUnsupported:
            return self._retried(url, lambda: self._stream(url, size, file))

    def _blocks(self, url: str, size: int) -> Iterator[bytes]:
        waiting: deque[Future[bytes]] = deque()
        try:
            for start in range(0, size, BLOCK):
                end = min(start + BLOCK, size)
                waiting.append(self.submit(self.fetch, url, start, end, size))
                if len(waiting) == BLOCKS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _stream(self, url: str, size: int, file: BinaryIO) -> str:
        with self._filesystem(url).open(url, "rb", block_size=0) as stream:
            digest = _write(iter(lambda: stream.read(BLOCK), b""), file)
        self._check_length(file.tell(), size, url, size)
        return digest

    # failures --------------------------------------------------------------------------------

    def _retried(self, what: str, attempt: Callable[[], T]) -> T:
        number = 0
        while True:
            try:
                return attempt()
            except Exception as error:  # each store's library raises its own
                last = _cause(error)
            number += 1
            if (refusal := _refusal(what, last)) or number == self.retry.attempts:
                break
            time.sleep(self.retry.pause(number - 1))
        raise refusal or Unreachable(
            f"{what}: failed {number} times, at last with {_say(last)}. Check that the store can "
            "be reached from here; a run goes on from its last checkpoint"
        ) from last

    def _check_length(self, came: int, asked: int, url: str, size: int) -> None:
        if came != asked:
            self._check_size(url, size)
            raise ShortRead(f"{came} of {asked} bytes came")

    def _check_size(self, url: str, size: int) -> None:
        found, _ = self.info(url)
        if found not in (None, size):
            raise ObjectChanged(
                f"{url} has {found} bytes instead of {size}: it is truncated or was replaced; "
                "upload it again with the index beside it"
            )

    def _fresh(self, url: str) -> Any:
        filesystem = self._filesystem(url)
        filesystem.invalidate_cache()
        return filesystem

    def _filesystem(self, url: str) -> Any:
        import fsspec  # like what it loads, only where shards are remote
        from fsspec.config import apply_config

        protocol = url.partition("://")[0].lower()
        try:
            users = apply_config(fsspec.get_filesystem_class(protocol), {})
            ours = _options(protocol, self.retry.timeout)
            # Given as arguments, they would replace the whole dictionaries of the user's.
            merged = {name: (users.get(name) or {}) | values for name, values in ours.items()}
            filesystem = fsspec.filesystem(protocol, **merged)
        except ImportError as error:
            advice = "pip install 'ldistill[s3]'" if protocol == "s3" else str(error)
            raise ValueError(f"{url} cannot be read without another package: {advice}") from error
        return _opened.setdefault(id(filesystem), filesystem)


def _options(protocol: str, timeout: float) -> dict[str, dict[str, Any]]:
    """What a file system is opened with, over what fsspec's configuration says."""
    if protocol in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        return {"client_kwargs": {"timeout": limits}}
    if protocol in ("s3", "s3a"):
        limits = {"connect_timeout": timeout, "read_timeout": timeout}
        return {"config_kwargs": {**limits, "max_pool_connections": THREADS}}
    return {}


def _read_range(filesystem: Any, url: str, start: int, end: int, size: int) -> bytes:
    if "http" in filesystem.protocol:
        # Unlike cat_file, the file object does not swallow a whole object sent instead of a range.
        with filesystem.open(url, "rb", cache_type="none", size=size) as file:
            file.seek(start)
            return file.read(end - start)
    buffering = {} if filesystem.async_impl else {"cache_type": "none"}
    return filesystem.cat_file(url, start=start, end=end, **buffering)


def _write(pieces: Iterable[bytes], file: BinaryIO) -> str:
    """Write pieces from the file's beginning; returns their SHA-256."""
    file.seek(0)
    digest = hashlib.sha256()
    for piece in pieces:
        file.write(piece)
        digest.update(piece)
    return digest.hexdigest()


def _cause(error: Exception) -> Exception:
    """A failed HEAD request and a gated repository are reported as missing files: look behind."""
    behind = error.__cause__
    known = type(behind).__module__.partition(".")[0] in ("aiohttp", "huggingface_hub")
    return behind if isinstance(behind, Exception) and known else error


def _refusal(what: str, error: Exception) -> Exception | None:
    """The error to raise for a failure that trying again will not mend."""
    if NO_RANGES in str(error):
        return RangesUnsupported(
            f"{what}: the server ignores ranges: read whole shards (--shard_reads whole)"
        )
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(f"{what}: not there: check the address, or upload it again")
    if isinstance(error, PermissionError) or "CredentialsError" in type(error).__name__:
        return Refused(f"{what}: access denied ({error}): check your credentials")
    if type(error).__name__ == "OfflineModeIsEnabled":  # huggingface_hub's; a ConnectionError
        return RemoteError(f"{what}: HF_HUB_OFFLINE is set, and this lies on the hub: unset it")
    final = isinstance(error, RemoteError) and not isinstance(error, ShortRead)
    if final or isinstance(error, ValueError | TypeError | NotImplementedError):
        return error
    if status is not None and 400 <= status < 500 and status not in PASSING_STATUS:
        return Refused(f"{what}: refused with status {status}: check address and credentials")
    return None


def _outside(error: Exception) -> bool:
    """Whether a range may lie behind the object's end; s3fs says EINVAL, to other things too."""
    return _status(error) == 416 or getattr(error, "errno", None) == errno.EINVAL


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error, wherever its library keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder in (error, response):
        for name in ("status", "status_code"):
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return None


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
