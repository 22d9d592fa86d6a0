"""Downloads from a local server: resume, restart, digests, and failures that say what to do."""

from __future__ import annotations

import hashlib
import http.client
import socket
import urllib.request

import numpy as np
import pytest

from data import download as module
from data.download import download
from data.errors import DataError

CONTENT = np.random.default_rng(0).bytes(700_001)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)


def test_first_download_prints_and_stores_its_digest(server, tmp_path, capsys):
    server.content = CONTENT
    file = download(server.url, tmp_path / "corpus.zip")
    assert file.read_bytes() == CONTENT
    assert (tmp_path / "corpus.zip.sha256").read_text().split() == [DIGEST, "corpus.zip"]
    assert DIGEST in capsys.readouterr().err
    download(server.url, tmp_path / "corpus.zip")
    assert len(server.seen_ranges) == 1, "a checked file must not be fetched again"
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"corpus.zip", "corpus.zip.sha256", "corpus.zip.lock"}


@pytest.mark.fault(21)
def test_early_close_continues_from_the_byte(server, tmp_path):
    server.content, server.cut_after = CONTENT, [300_000, 100_000]
    file = download(server.url, tmp_path / "corpus.zip", sha256=DIGEST, progress=False)
    assert file.read_bytes() == CONTENT
    assert server.seen_ranges == [None, "bytes=300000-", "bytes=400000-"]


@pytest.mark.fault(21)
def test_a_part_left_by_another_process_is_continued(server, tmp_path):
    server.content, server.cut_after = CONTENT, [250_000, 0, 0, 0]
    with pytest.raises(DataError, match=r"250,000 bytes are kept in .*corpus\.zip\.part"):
        download(server.url, tmp_path / "corpus.zip", progress=False)
    server.seen_ranges.clear()
    assert download(server.url, tmp_path / "corpus.zip", progress=False).read_bytes() == CONTENT
    assert server.seen_ranges == ["bytes=250000-"]


@pytest.mark.fault(21)
def test_no_part_is_told_of_where_nothing_came(server, tmp_path):
    server.content, server.cut_after = CONTENT, [0, 0, 0]
    with pytest.raises(DataError, match=r"closed the connection early\); without a network give a local file"):
        download(server.url, tmp_path / "corpus.zip", progress=False)


@pytest.mark.fault(21)
def test_server_without_ranges_restarts(server, tmp_path):
    server.content, server.ranges, server.cut_after = CONTENT, False, [300_000]
    assert download(server.url, tmp_path / "corpus.zip", progress=False).read_bytes() == CONTENT
    assert server.seen_ranges == [None, "bytes=300000-"]


@pytest.mark.fault(21)
def test_server_that_always_breaks_off_is_given_up(server, tmp_path):
    server.content, server.ranges, server.cut_after = CONTENT, False, [100, 300, 200, 300, 250, 300, 300]
    with pytest.raises(DataError, match=r"the server closed the connection early.*data\.path="):
        download(server.url, tmp_path / "corpus.zip", progress=False)


@pytest.mark.fault(21)
def test_a_file_changed_on_the_server_is_not_glued_to_the_old_part(server, tmp_path):
    server.content, server.cut_after = b"x" * 600_000, [200_000, 0, 0, 0]
    with pytest.raises(DataError):
        download(server.url, tmp_path / "corpus.zip", progress=False)
    server.content, server.etag = CONTENT, '"two"'
    assert download(server.url, tmp_path / "corpus.zip", progress=False).read_bytes() == CONTENT


@pytest.mark.fault(21)
def test_a_whole_part_is_kept(server, tmp_path):
    server.content, server.cut_after = CONTENT, [300_000, 0, 0, 0]
    with pytest.raises(DataError):
        download(server.url, tmp_path / "corpus.zip", progress=False)
    (tmp_path / "corpus.zip.part").write_bytes(CONTENT)
    assert download(server.url, tmp_path / "corpus.zip", sha256=DIGEST, progress=False).exists()
    assert server.seen_ranges[-1] == f"bytes={len(CONTENT)}-"


@pytest.mark.fault(20)
def test_wrong_digest_is_fetched_once_more_then_refused(server, tmp_path):
    server.content = b"not the corpus"
    found = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(DataError) as caught:
        download(server.url, tmp_path / "corpus.zip", sha256=DIGEST, progress=False)
    assert found in str(caught.value) and DIGEST in str(caught.value) and "data.path=" in str(caught.value)
    assert len(server.seen_ranges) == 2
    assert not (tmp_path / "corpus.zip").exists()


@pytest.mark.fault(20)
@pytest.mark.parametrize("publisher_digest", [None, DIGEST], ids=["stored", "published"])
def test_an_edited_file_is_deleted_and_fetched_again(server, tmp_path, publisher_digest):
    server.content = CONTENT
    file = download(server.url, tmp_path / "corpus.zip", sha256=publisher_digest, progress=False)
    file.write_bytes(CONTENT[:-1] + b"?")
    assert download(server.url, file, sha256=publisher_digest, progress=False).read_bytes() == CONTENT
    assert len(server.seen_ranges) == 2


@pytest.mark.fault(20)
def test_content_that_differs_from_the_first_download_is_refused(server, tmp_path):
    server.content = CONTENT
    file = download(server.url, tmp_path / "corpus.zip", progress=False)
    file.unlink()
    server.content = b"changed"
    with pytest.raises(DataError, match=rf"expected {DIGEST}.*delete .*corpus\.zip\.sha256"):
        download(server.url, file, progress=False)


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, 3)])
def test_http_errors_name_the_status_and_the_way_out(server, tmp_path, status, requests):
    server.status = status
    with pytest.raises(DataError, match=rf"HTTP {status}.*data\.path="):
        download(server.url, tmp_path / "corpus.zip", progress=False)
    assert len(server.seen_ranges) == requests


def test_no_server_is_a_data_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/corpus.zip"
        with pytest.raises(DataError, match=r"cannot download .*refused\); without a network .*data\.path=") as caught:
            download(url, tmp_path / "corpus.zip", progress=False)
    assert caught.value.exit_code == 3


def test_a_silent_server_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/corpus.zip"
        with pytest.raises(DataError, match="timed out"):
            download(url, tmp_path / "corpus.zip", progress=False)


def test_an_unreachable_host_while_reading_is_not_a_disk_error(server, tmp_path, monkeypatch):
    def lost(response, size=None):
        raise OSError(113, "No route to host")

    server.content = CONTENT
    monkeypatch.setattr(http.client.HTTPResponse, "read", lost)
    with pytest.raises(DataError, match=r"cannot download .*No route to host"):
        download(server.url, tmp_path / "corpus.zip", progress=False)


def test_unwritable_folder_names_the_setting(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write the data cache .*data\.cache_dir="):
        download(server.url, tmp_path / "file" / "corpus.zip", progress=False)


def test_every_request_has_a_timeout(server, tmp_path, monkeypatch):
    timeouts, original = [], urllib.request.urlopen

    def recording(request, timeout=None):
        timeouts.append(timeout)
        return original(request, timeout=timeout)

    monkeypatch.setattr(urllib.request, "urlopen", recording)
    server.content = CONTENT
    download(server.url, tmp_path / "corpus.zip", progress=False)
    assert timeouts == [module.TIMEOUT_SECONDS]
