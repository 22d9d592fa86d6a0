"""The embedded corpus: determinism, files in one split only, what is left out, and a stripped library."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from pathlib import Path

import pytest

from data import python_source as module
from data.chars import load_chars
from data.errors import DataError
from data.python_source import python_source, source_files, split_of


@pytest.fixture
def library(tmp_path) -> Path:
    """A small tree of 120 sources, each with a line no other has, and things that must stay out."""
    root = tmp_path / "lib"
    for number in range(120):
        folder = root / f"package{number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module{number}.py").write_text(f"# file {number:03d}\n" * 1650)
    for outside in (
        "test/a.py",
        "pkg/tests/b.py",
        "idlelib/idle_test/c.py",
        "site-packages/d.py",
        "__pycache__/e.py",
    ):
        (root / outside).parent.mkdir(parents=True, exist_ok=True)
        (root / outside).write_text("outside\n" * 10)
    (root / "_sysconfigdata__linux.py").write_text("outside\n")
    (root / "notes.txt").write_text("outside\n")
    return root


def split_texts(file: Path, record: dict) -> dict[str, bytes]:
    raw, start, texts = file.read_bytes(), 0, {}
    for split, length in record["split_bytes"].items():
        texts[split] = raw[start : start + length]
        start += length
    assert start == len(raw) == record["bytes"]
    return texts


def test_each_file_is_in_the_one_split_its_path_names(library, tmp_path):
    texts = split_texts(*python_source(tmp_path / "cache", root=library))
    for number in range(120):
        path = f"package{number % 5}/module{number}.py"
        holding = [split for split, text in texts.items() if f"# file {number:03d}\n".encode() in text]
        assert holding == [split_of(path)]
    assert all(b"outside" not in text for text in texts.values())
    assert all(texts.values()), "the tree is large enough for every split to have files"


def test_files_stand_in_sorted_order_with_the_separator(library, tmp_path):
    texts = split_texts(*python_source(tmp_path / "cache", root=library))
    names = [name for name in source_files(library) if split_of(name) == "valid"]
    assert names == sorted(names)
    assert texts["valid"] == b"".join((library / name).read_bytes() + module.SEPARATOR for name in names)


def test_split_follows_the_path_alone_and_keeps_the_shares():
    paths = [f"package/module{number}.py" for number in range(10_000)]
    splits = [split_of(path) for path in paths]
    assert splits == [split_of(path) for path in paths]
    digest = int(hashlib.sha256(paths[0].encode()).hexdigest(), 16) % 20
    assert splits[0] == {0: "test", 1: "valid"}.get(digest, "train")
    assert abs(splits.count("test") / 10_000 - 0.05) < 0.01
    assert abs(splits.count("valid") / 10_000 - 0.05) < 0.01


def test_fingerprint_follows_the_content_and_not_the_place(library, tmp_path):
    _, first = python_source(tmp_path / "cache", root=library)
    assert first["num_files"] == 120 and first["python_version"] == platform.python_version()
    moved = library.rename(tmp_path / "elsewhere")
    _, second = python_source(tmp_path / "other_cache", root=moved)
    assert second == first
    (moved / "package0" / "module0.py").write_text("# file 000\n" * 1650 + "x = 1\n")
    _, third = python_source(tmp_path / "cache", root=moved)
    assert third["list_sha256"] != first["list_sha256"]


def test_list_hash_is_over_path_size_and_digest(library, tmp_path):
    _, record = python_source(tmp_path / "cache", root=library)
    lines = []
    for name in source_files(library):
        text = (library / name).read_bytes()
        lines.append(f"{name} {len(text)} {hashlib.sha256(text).hexdigest()}\n")
    assert record["list_sha256"] == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_stripped_library_names_the_way_out(tmp_path, library):
    for file in library.glob("package[1-4]/*.py"):
        file.unlink()
    with pytest.raises(DataError, match=r"only 435,600 bytes .*at least 2,000,000.*data\.path="):
        python_source(tmp_path / "cache", root=library)
    with pytest.raises(DataError, match=r"only 0 bytes"):
        python_source(tmp_path / "cache", root=tmp_path / "nowhere")


def test_unwritable_cache_names_the_setting(tmp_path, library):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DataError, match=r"data\.cache_dir="):
        python_source(tmp_path / "cache", root=library)


def test_the_running_interpreter(tmp_path):
    corpus = load_chars("python_source", cache_dir=tmp_path)
    again = load_chars("python_source", cache_dir=tmp_path / "again")
    assert corpus.fingerprint == again.fingerprint
    assert all((corpus.splits[split] == again.splits[split]).all() for split in corpus.splits)
    assert all(len(split) > 50_000 for split in corpus.splits.values())
    root = Path(sysconfig.get_paths()["stdlib"])
    names = source_files(root)
    assert corpus.fingerprint["num_files"] == len(names) > 200
    assert "json/decoder.py" in names
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in Path(name).parts)


def test_a_local_text_replaces_the_library(tmp_path):
    (tmp_path / "novel.txt").write_bytes(b"call me Ishmael. " * 1000)
    corpus = load_chars("python_source", path=tmp_path / "novel.txt", cache_dir=tmp_path)
    assert [len(split) for split in corpus.splits.values()] == [15_300, 850, 850]
    assert corpus.fingerprint["source"] == "novel.txt"
