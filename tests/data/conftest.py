"""A local web server that can be told to misbehave; token splits made by hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from data.tokens import TokenSplit


class LocalServer:
    """Serves `content` at every path; answer i breaks off after `cut_after[i]` bytes."""

    def __init__(self) -> None:
        self.content = b""
        self.ranges = True
        self.etag = '"one"'
        self.cut_after: list[int] = []
        self.status: int | None = None
        self.seen_ranges: list[str | None] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/corpus.zip"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                server.seen_ranges.append(wanted)
                if server.status is not None:
                    self.send_error(server.status)
                    return
                start = 0
                if server.ranges and wanted and self.headers.get("If-Range", server.etag) == server.etag:
                    start = int(wanted.removeprefix("bytes=").rstrip("-"))
                size = len(server.content)
                if start >= size:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{size}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
                self.send_header("ETag", server.etag)
                self.send_header("Content-Length", str(size - start))
                self.end_headers()
                limit = server.cut_after.pop(0) if server.cut_after else size
                self.wfile.write(server.content[start : start + limit])

            def log_message(self, *arguments: object) -> None:
                """Silence."""

        return Handler


@pytest.fixture
def server() -> Iterator[LocalServer]:
    server = LocalServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def make_split(tmp_path_factory):
    """`make_split([[5, 6], [7]])` is a TokenSplit of these documents, in a file."""

    def make(documents: list[list[int]]) -> TokenSplit:
        file = tmp_path_factory.mktemp("split") / "tokens.bin"
        offsets = np.cumsum([0, *map(len, documents)])
        tokens = np.concatenate([np.array(document, np.int32) for document in documents])
        file.write_bytes(offsets.astype(np.int64).tobytes() + tokens.tobytes())
        return TokenSplit(file, "int32", offsets.nbytes, len(tokens), 0, len(documents))

    return make
