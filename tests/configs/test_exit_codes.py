"""Exit codes and messages of faults outside the configuration, and that a process of its own says the same."""

import lzma

import pytest

from data.chars import SOURCES, Source
from data.errors import DataError
from tests.command import TINY, run_train
from tests.helpers import run_python
from training.errors import CheckpointError, NumericsError, ResourceError

TEXT = b"to be or not to be that is the question " * 200


def fault(code, tmp_path, *arguments):
    """The message of a command that ends with `code`, one paragraph, leaving no run folder."""
    folder = tmp_path / "run"
    arguments = (*TINY, "task=text8", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={folder}", *arguments)
    ended = run_train(*arguments, cwd=tmp_path)
    assert ended.code == code, ended
    assert ended.err.startswith("error: ") and len(ended.err.splitlines()) == 1 and "Traceback" not in ended.err
    assert not folder.exists()
    return ended.err


def test_truncated_file(tmp_path):
    file = tmp_path / "text8.xz"
    file.write_bytes(lzma.compress(TEXT)[:-20])
    message = fault(3, tmp_path, f"data.path={file}")
    assert f"{file} ({file.stat().st_size:,} bytes) is a truncated or damaged xz file" in message


@pytest.mark.fault(22)
def test_missing_file_lists_its_folder(tmp_path):
    (tmp_path / "text8_head.xz").write_bytes(b"x")
    message = fault(3, tmp_path, f"data.path={tmp_path}/text8_haed.xz")
    assert f"data.path={tmp_path}/text8_haed.xz does not exist" in message and "text8_head.xz" in message


@pytest.mark.fault(24)
def test_empty_file(tmp_path):
    file = tmp_path / "empty"
    file.touch()
    assert f"data.path={file} is an empty file (0 bytes)" in fault(3, tmp_path, f"data.path={file}")


@pytest.mark.fault(23)
def test_foreign_text(tmp_path):
    file = tmp_path / "upper.txt"
    file.write_bytes(TEXT + b"X" + TEXT)
    message = fault(3, tmp_path, f"data.path={file}")
    assert f"text8 holds only a-z and space, but {file} has b'X' at byte {len(TEXT):,}" in message


@pytest.mark.fault(20)
def test_wrong_checksum(tmp_path, monkeypatch):
    """A download whose bytes are not the published ones is fetched again once, then refused."""
    published = tmp_path / "published.xz"
    published.write_bytes(lzma.compress(TEXT))
    source = Source(published.as_uri(), "md5", "0" * 32)
    monkeypatch.setitem(SOURCES, "text8", source)
    fetched = []

    def fetch(name, cache_dir):
        fetched.append(name)
        copy = tmp_path / "cache" / "text8.xz"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(published.read_bytes())
        return copy

    monkeypatch.setattr("data.chars.fetch", fetch)
    message = fault(3, tmp_path)
    assert f"{source.url} does not unpack to the published text8, after a second download too" in message
    assert f"expected {source.digest}" in message and "data.path=" in message
    assert fetched == ["text8", "text8"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no such file"), 3),
        (CheckpointError("damaged"), 4),
        (NumericsError("the loss is nan"), 5),
        (ResourceError("disk full"), 6),
    ],
)
def test_typed_errors_of_a_job_become_a_line_and_their_code(tmp_path, error, code):
    def job(cfg):
        raise error

    ended = run_train(cwd=tmp_path, job=job)
    assert (ended.code, ended.err) == (code, f"error: {error}\n")


def test_bug_of_ours_shows_its_traceback(tmp_path):
    def job(cfg):
        raise RuntimeError("shapes do not match")

    ended = run_train(cwd=tmp_path, job=job)
    assert ended.code == 1
    assert ended.err.startswith("Traceback (most recent call last)")
    assert ended.err.endswith("RuntimeError: shapes do not match\n")


def test_value_error_of_a_job_is_no_configuration_error(tmp_path):
    ended = run_train("seed=3", cwd=tmp_path, job=lambda cfg: int("three"))
    assert ended.code == 1 and "Traceback" in ended.err


def test_interrupt(tmp_path):
    def job(cfg):
        raise KeyboardInterrupt

    ended = run_train(cwd=tmp_path, job=job)
    assert (ended.code, ended.err) == (130, "error: interrupted\n")


def test_sweep_runs_every_job_and_ends_with_the_largest_code(tmp_path):
    seen = []

    def job(cfg):
        seen.append(cfg.seed)
        if cfg.seed == 1:
            raise NumericsError("the loss is nan")
        if cfg.seed == 2:
            raise DataError("no such file")

    ended = run_train("-m", "seed=0,1,2,3", cwd=tmp_path, job=job)
    assert ended.code == 5 and seen == [0, 1, 2, 3]
    assert ended.err == "error: the loss is nan\nerror: no such file\n"


def test_interrupt_stops_a_sweep(tmp_path):
    seen = []

    def job(cfg):
        seen.append(cfg.seed)
        raise KeyboardInterrupt

    ended = run_train("-m", "seed=0,1,2", cwd=tmp_path, job=job)
    assert ended.code == 130 and seen == [0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sede=1"], 2, "there is no configuration key sede, did you mean seed?"),
        (["model.num_heads=5", "model.dim=32"], 2, "model.num_heads 5 does not divide model.dim 32"),
        (["experiment=text8_small", "data.path=no/such.xz"], 3, "data.path=no/such.xz does not exist"),
    ],
)
def test_process_of_its_own_says_the_same(tmp_path, arguments, code, message):
    folder = tmp_path / "run"
    ended = run_python("train.py", *arguments, f"run_dir={folder}", f"data.cache_dir={tmp_path}")
    assert ended.returncode == code
    assert ended.stderr.startswith(f"error: {message}") and len(ended.stderr.splitlines()) == 1
    assert ended.stdout == "" and not folder.exists()
