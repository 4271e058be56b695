"""Sets of shards that lie elsewhere: named by URL or by a command, and kept in a folder of this node.

    https://host/path/set                      files of an http(s) server
    pipe:aws s3 cp s3://bucket/set/{name} -    what a command prints; {name} stands for the name of the file

The cache is a folder that all processes of a node share:

    CACHE/4f1c.../manifest.json       a set, by the hash of its manifest: another set at the same URL is another folder
    CACHE/4f1c.../shard-000000.tar    and its .idx; has its name if and only if it is whole and has the manifest's sum
    CACHE/4f1c.../.shard-000000.tar.lock    held by the one process that fetches the shard, while others wait
    CACHE/.lock                       held while room is made: shards that were not used for longest are removed

What is fetched is not trusted: names are checked before they are used, sizes before anything is written, and nothing
of it is run. Commands come from the config alone and are run without a shell.

WebDataset's own cache is not used: every worker would fetch for itself, without checksums or a reliable limit, two sets
would share their files' names, and `pipe:` goes to a shell.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import itertools
import json
import logging
import os
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit, urlunsplit

from fasthmr.data.index import MANIFEST, Manifest, ShardError, ShardIndex, index_path
from fasthmr.files import write_text, written_whole

__all__ = ["RemoteSet", "ShardCache", "is_remote"]

log = logging.getLogger(__name__)
T = TypeVar("T")

_PIPE, _NAME = "pipe:", "{name}"
_BLOCK = 1 << 20
#: a manifest of 100,000 shards has 10 MB, the index of a shard of 1,000 clips 0.3 MB; anything larger is no such file
_MAX_TEXT = 1 << 26
#: files that one process fetches at once, where it knows that it needs many
STREAMS = 8
#: seconds before the second attempt, twice as many before the third, and so on up to the longest
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 64.0
#: answers of a server that may be others later: time-out, too early, too many requests; and all from 500 on
_PASSING = {408, 425, 429}
#: in the cache, of all sets
_SHARDS, _UNFINISHED = "*/*.tar", "*/.*.tar.[0-9]*.tmp"
#: bytes a second that must come at least, or a server that trickles would be waited for for days
_SLOWEST = 10_000


@dataclass(frozen=True)
class ShardCache:
    """Where and how files of remote sets are kept.

    Attributes:
        folder: on a disk of the node; shared by its processes, also those of other runs. `~` and `$NAME` are expanded.
            null: the one that the environment names as FASTHMR_SHARD_CACHE, or else ~/.cache/fasthmr/shards.
        gigabytes: of shards at most, 1e9 bytes each; the ones that were not used for longest make room for others.
        attempts: to fetch a file, with pauses of 1, 2, 4, ... 64 s between them.
        timeout_s: seconds after which an attempt has failed if no byte came in them, or fewer than 10 kB for each.

    Raises:
        ValueError: a number is not positive.
    """

    folder: str | None = None
    gigabytes: float = 100.0
    attempts: int = 10
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("gigabytes", "attempts", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"shard_cache.{name} must be positive, got {getattr(self, name)}")

    @property
    def root(self) -> Path:
        """The folder.

        Raises:
            ShardError: it names a variable that is not set.
        """
        folder = self.folder or os.environ.get("FASTHMR_SHARD_CACHE") or "~/.cache/fasthmr/shards"
        expanded = os.path.expandvars(folder)
        if "$" in expanded:
            raise ShardError(f"shard_cache.folder is {folder!r}, which names a variable that is not set here")
        return Path(expanded).expanduser()

    @property
    def bytes(self) -> int:
        return int(self.gigabytes * 1e9)


def is_remote(place: str | Path) -> bool:
    """Whether a set is named by a URL or a command, not by a folder."""
    return re.match(rf"{_PIPE}|[a-z][a-z0-9+.-]*://", str(place), re.IGNORECASE) is not None


class RemoteSet:
    """A set that lies elsewhere. On opening, manifest and indices are fetched; shards when they are asked for.

    Args:
        source: URL of the set's folder, or `pipe:` and a command with {name} in it.
        cache: where files are kept.

    Raises:
        ShardError: the source cannot be understood or reached, or has no set; or what it sends breaks the format.
    """

    def __init__(self, source: str, cache: ShardCache) -> None:
        self.source, self.cache = source, cache
        self._command = _command(source) if source.startswith(_PIPE) else None
        if self._command is None:
            _require_url(source)
        manifest = self._text(MANIFEST)
        self._checksums = Manifest.from_json(manifest, self._where(MANIFEST)).shards
        self.folder = cache.root / hashlib.sha256(manifest.encode()).hexdigest()[:16]
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with ThreadPoolExecutor(STREAMS) as pool:
                list(pool.map(self._fetch_index, self._checksums))
            if not (self.folder / MANIFEST).exists():
                write_text(self.folder / MANIFEST, manifest)
            os.utime(self.folder / MANIFEST)  # a disk that cannot be written shows now, not in the midst of training

    def require_room(self, size: int, in_sequence: bool = False) -> None:
        """Refuse what could never be in the cache at once, or for what its disk has no room.

        Args:
            size: of all shards that are to be read, in bytes.
            in_sequence: they may take turns in the cache.

        Raises:
            ShardError: the cache is smaller, or would be.
        """
        root = self.cache.root
        files = itertools.chain(root.glob(_UNFINISHED), root.glob(_SHARDS))
        room = sum(map(_written, _sizes(files))) + shutil.disk_usage(root).free
        if min(size, self.cache.bytes) > room:
            raise ShardError(
                f"{size / 1e9:.3g} GB of shards are to be read, and the cache {root} may hold "
                f"{self.cache.gigabytes:g} GB, but with the free space on its disk it comes to {room / 1e9:.3g} GB: "
                "free some space, choose another with shard_cache.folder, or lower shard_cache.gigabytes"
            )
        if size > self.cache.bytes and not in_sequence:
            raise ShardError(
                f"{size / 1e9:.3g} GB of shards are to be read at random, and the cache {root} may hold "
                f"{self.cache.gigabytes:g} GB: raise shard_cache.gigabytes, or read in sequence (streaming: true)"
            )

    def open(self, name: str, size: int) -> int:
        """A descriptor of a shard of `size` bytes, which is fetched if it is not here; the caller closes it.

        Whoever has a shard open may go on reading it when others make room.

        Raises:
            ShardError: it cannot be fetched, or the cache cannot be written.
        """
        path = self.folder / name
        with self._writing():
            while True:
                try:
                    os.utime(path)  # used now: what was not for longest makes room
                    return os.open(path, os.O_RDONLY)
                except FileNotFoundError:
                    self.fetch(name, size)

    def fetch(self, name: str, size: int, attempts: int | None = None) -> None:
        """Fetch a shard of `size` bytes, or wait for the process that does.

        Raises:
            ShardError: after `attempts`, by default the cache's; naming the place and the last reason.
        """
        path = self.folder / name
        with self._writing(), _locked(_lock_of(path)):
            if path.exists():
                return
            with written_whole(path) as file:
                self._reserve(file, size)

                def receive() -> None:
                    file.seek(0)
                    sha256 = hashlib.sha256()
                    with closing(self._blocks(name, size)) as blocks:
                        for block in blocks:
                            sha256.update(block)
                            file.write(block)
                    if file.tell() < size:
                        raise _FailedError(f"it ended after {file.tell()} of {size} bytes")
                    if sha256.hexdigest() != self._checksums[name]:
                        raise _FailedError(
                            f"its checksum is {sha256.hexdigest()[:16]}..., the manifest says "
                            f"{self._checksums[name][:16]}..."
                        )

                self._attempt(name, receive, attempts or self.cache.attempts)

    def fetch_ahead(self, name: str, size: int) -> None:
        """Begin to fetch a shard that will be needed soon. Trouble is left to who needs it."""

        def fetch() -> None:
            with suppress(ShardError):
                self.fetch(name, size, attempts=1)

        if not (self.folder / name).exists():
            # A daemon: a process that ends need not wait for it. What it leaves is found by its lock, see `_reserve`.
            threading.Thread(target=fetch, daemon=True).start()

    # ---- internals ------------------------------------------------------------------------------------------------

    def _fetch_index(self, name: str) -> None:
        path = index_path(self.folder / name)
        if path.exists():
            return
        text = self._text(path.name)
        index = ShardIndex.from_json(text, self._where(path.name))
        if index.sha256 != self._checksums[name]:
            raise ShardError(f"{self._where(path.name)} belongs to another shard than the manifest's {name}")
        if index.bytes > self.cache.bytes:
            raise ShardError(
                f"{self._where(name)} has {index.bytes / 1e9:.3g} GB, more than the cache may hold: raise "
                f"shard_cache.gigabytes, which is {self.cache.gigabytes:g}"
            )
        write_text(path, text)

    def _text(self, name: str) -> str:
        """A file of JSON."""

        def receive() -> str:
            text = b"".join(self._blocks(name, _MAX_TEXT))
            try:
                json.loads(text)
                return text.decode()
            except (ValueError, RecursionError) as error:
                raise _FailedError(f"it is no JSON ({error})") from error

        return self._attempt(name, receive, self.cache.attempts)

    def _attempt(self, name: str, receive: Callable[[], T], attempts: int) -> T:
        """What `receive` gives, at the last of `attempts`."""
        for attempt in range(1, attempts + 1):
            try:
                return receive()
            except _FailedError as error:
                failure = error
            told = f"attempt {attempt} of {attempts} to fetch {self._where(name)} failed: {failure}"
            if attempt < attempts:
                wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1))
                wait_s *= random.SystemRandom().uniform(0.5, 1)  # not all nodes at once; and no seed is touched
                log.warning("%s; the next in %.1f s", told, wait_s)
                time.sleep(wait_s)
        raise ShardError(f"{told}; giving up") from failure

    def _blocks(self, name: str, limit: int) -> Generator[bytes]:
        """A file in pieces, not more than `limit` bytes."""
        if self._command is None:
            blocks = _body(_url(self.source, name), self._where(name), self.cache.timeout_s)
        else:
            blocks = _output([word.replace(_NAME, name) for word in self._command], self.cache.timeout_s)
        received = came = 0
        waited_s = 0.0
        with closing(blocks):
            block = next(blocks, b"")  # a server may think about it first
            while block:
                received, came = received + len(block), came + len(block)
                if received > limit:
                    raise ShardError(f"{self._where(name)} is longer than {limit} bytes, which is refused")
                if waited_s > self.cache.timeout_s:
                    if came < _SLOWEST * waited_s and received < limit:
                        raise _FailedError(f"only {came} bytes in {waited_s:.1f} s (after {received - came} bytes)")
                    came, waited_s = 0, 0.0
                yield block
                asked = time.monotonic()
                block = next(blocks, b"")
                waited_s += time.monotonic() - asked

    def _where(self, name: str) -> str:
        """A file in messages: without the URL's query, which may be a signature."""
        return self.source.replace(_NAME, name) if self._command else _shown(_url(self.source, name))

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Make room for a shard, and give its unfinished file all of its size at once: others reckon with it."""
        root = self.cache.root
        with _locked(root / ".lock"):
            for unfinished in root.glob(_UNFINISHED):
                _remove_if_left(unfinished)
            held = _sizes(root.glob(_UNFINISHED))  # first: one that is finished meanwhile is counted twice
            shards = sorted(_sizes(root.glob(_SHARDS)), key=lambda shard: shard[1].st_mtime)
            free = shutil.disk_usage(root).free
            to_come = size + sum(state.st_size - _written((path, state)) for path, state in held)
            excess = max(size + sum(state.st_size for _, state in held + shards) - self.cache.bytes, to_come - free)
            for path, state in shards:
                if excess > 0:
                    path.unlink(missing_ok=True)
                    excess -= state.st_size
            if excess > 0:
                raise ShardError(
                    f"the cache {root} may hold {self.cache.gigabytes:g} GB, and its disk has {free / 1e9:.3g} GB "
                    "free, too little for the shards that are being fetched at the same time: raise "
                    "shard_cache.gigabytes or free some space, or take fewer workers or smaller shards"
                )
            file.truncate(size)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ShardError(
                f"cannot write into the cache {self.cache.root}: {error.strerror or error}; free some space, or choose "
                "another with shard_cache.folder"
            ) from error


class _FailedError(Exception):
    """A transfer that may go well another time."""


# ---- where from ------------------------------------------------------------------------------------------------


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a server only to other http(s) servers, and from https to https."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urlsplit(newurl).scheme
        if scheme not in ({"https"} if req.type == "https" else {"http", "https"}):
            raise urllib.error.HTTPError(newurl, code, f"leads from {req.type} to {scheme}, refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_opener = urllib.request.build_opener(_SafeRedirects)


def _body(url: str, where: str, timeout_s: float) -> Generator[bytes]:
    """The body of an answer; `where` names it in errors."""
    received = 0
    try:
        with _opener.open(urllib.request.Request(url, headers={"User-Agent": "fasthmr"}), timeout=timeout_s) as answer:
            expected = answer.length  # None where the server does not say
            while block := answer.read1(_BLOCK):
                received += len(block)
                yield block
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500 or error.code in _PASSING:
            raise _FailedError(f"{error.code} {error.reason}") from error
        raise ShardError(f"cannot fetch {where}: {error.code} {error.reason}; is this a set of shards?") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _FailedError(f"{reason or type(error).__name__} (after {received} bytes)") from error
    if expected is not None and received < expected:  # http.client does not mind when it reads in pieces
        raise _FailedError(f"it ended after {received} of {expected} bytes")


def _output(command: list[str], timeout_s: float) -> Generator[bytes]:
    """What a command prints. It is ended with all that it started, however this ends."""
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, start_new_session=True
            )
        except OSError as error:
            raise ShardError(f"cannot run {command[0]!r}: {error.strerror}; {_PIPE} takes a command") from error
        assert process.stdout is not None
        try:
            ready = select.poll()
            ready.register(process.stdout, select.POLLIN)
            while ready.poll(1000 * timeout_s):
                block = os.read(process.stdout.fileno(), _BLOCK)
                if not block:
                    break
                yield block
            else:
                raise _FailedError(f"the command printed nothing for {timeout_s:g} s")
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise _FailedError(f"the command did not end in {timeout_s:g} s") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # not SIGTERM: it is blocked where a run listens for it
            process.wait()
            process.stdout.close()
        if code != 0:
            complaints.seek(0)
            lines = complaints.read()[-2000:].decode(errors="replace").split("\n")
            said = [line.strip() for line in lines if line.strip()]
            raise _FailedError(f"exit code {code}" + (f": {said[-1]}" if said else ""))


def _command(source: str) -> list[str]:
    try:
        words = shlex.split(source.removeprefix(_PIPE))
    except ValueError as error:
        raise ShardError(f"{source!r} is no command: {error}") from error
    # What a manifest names must not choose the program.
    if any(_NAME in word for word in words[:1]) or not any(_NAME in word for word in words[1:]):
        raise ShardError(f"{source!r} must be a command with {_NAME} where the name of the file belongs")
    return words


def _require_url(source: str) -> None:
    parts = urlsplit(source)
    if parts.scheme not in ("http", "https"):
        raise ShardError(
            f"sets are in folders, at https://HOST/PATH, or printed by {_PIPE}COMMAND, got {source!r}: for S3 write "
            f"'{_PIPE}aws s3 cp s3://BUCKET/SET/{_NAME} -'"
        )
    if not parts.hostname or "@" in parts.netloc or re.search(r"[\s\x00-\x1f]", source):
        raise ShardError(f"a URL must be https://HOST/PATH, without user or spaces, got {_shown(source)!r}")


def _url(source: str, name: str) -> str:
    """URL of a file of a set; a query, e.g. a signature that is for all files, stays."""
    parts = urlsplit(source)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{name}", parts.query, ""))


def _shown(source: str) -> str:
    return source if source.startswith(_PIPE) else source.partition("?")[0]


# ---- the cache -------------------------------------------------------------------------------------------------


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock, which the system frees if the process is killed.

    Raises:
        BlockingIOError: another holds it, and `wait` is off.
    """
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing would not do: a process forked meanwhile has it open, too


def _remove_if_left(unfinished: Path) -> None:
    """Remove an unfinished file whose writer was killed: then nobody holds the shard's lock."""
    name = unfinished.name.removeprefix(".").rsplit(".", 2)[0]
    with suppress(BlockingIOError), _locked(_lock_of(unfinished.with_name(name)), wait=False):
        unfinished.unlink(missing_ok=True)


def _written(file: tuple[Path, os.stat_result]) -> int:
    """Bytes of a file that are on the disk; of an unfinished one the rest is still to come."""
    return min(file[1].st_size, 512 * file[1].st_blocks)


def _sizes(paths: Iterator[Path]) -> list[tuple[Path, os.stat_result]]:
    states = []
    for path in paths:
        with suppress(FileNotFoundError):  # finished or removed meanwhile
            states.append((path, path.stat()))
    return states
