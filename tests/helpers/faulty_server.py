"""An http server of a folder that does wrong what a test asks it to, and remembers what it was asked for."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: answers a request for a file of that content in its own way
Fault = Callable[[BaseHTTPRequestHandler, bytes], None]


class FaultyServer(ThreadingHTTPServer):
    """Serves the files of `folder`. `faults[name]` has what goes wrong in the next requests for a file, one each."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        self.faults: dict[str, list[Fault]] = defaultdict(list)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        self.server.asked.append(path)
        file = self.server.folder / path
        faults = self.server.faults[Path(path).name]
        fault = faults.pop(0) if faults else fine
        if file.is_file() or fault is not fine:
            fault(self, file.read_bytes() if file.is_file() else b"")
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


# ---- faults ---------------------------------------------------------------------------------------------------------


def fine(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    _begin(handler, len(content))
    handler.wfile.write(content)


def status(code: int, **headers: str) -> Fault:
    def answer(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def cut(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """Says how long the file is, and ends half way."""
    _begin(handler, len(content))
    handler.wfile.write(content[: len(content) // 2])


def cut_unseen(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """Ends half way and never said how long the file is."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])


def changed(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """One bit is another."""
    at = len(content) // 2
    fine(handler, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def hung_up(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    """Resets the connection instead of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def late(seconds: float) -> Fault:
    """Sends half of the file, and the rest after some time."""

    def answer(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        _begin(handler, len(content))
        handler.wfile.write(content[: len(content) // 2])
        handler.wfile.flush()
        time.sleep(seconds)
        handler.wfile.write(content[len(content) // 2 :])

    return answer


def trickling(seconds: float) -> Fault:
    """Sends a byte now and then."""

    def answer(handler: BaseHTTPRequestHandler, content: bytes) -> None:
        _begin(handler, len(content))
        for byte in content:
            handler.wfile.write(bytes([byte]))
            time.sleep(seconds)

    return answer


def instead(other: bytes) -> Fault:
    """Sends something else."""
    return lambda handler, content: fine(handler, other)


def _begin(handler: BaseHTTPRequestHandler, length: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()
