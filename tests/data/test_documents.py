"""Documents of every kind of file, and what is said of a bad one."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from data.documents import corpus_digest, corpus_files, read_documents
from data.errors import DataError

WIKI = (
    '<doc id="1" url="?curid=1" title="One">\nOne\n\nFirst line.\nSecond & last.\n\n</doc>\n'
    '<doc id="2" url="?curid=2" title="Empty">\nEmpty\n\n\n</doc>\n'
    '<doc id="3" url="?curid=3" title="Three">\nThree\n\nBödy.\n</doc>\n'
)
WIKI_DOCUMENTS = ["One\n\nFirst line.\nSecond & last.", "Three\n\nBödy."]
TEXT = "A book.\n\n  With <doc> in it, and an end.\n"
LINES = json.dumps({"text": "one\ntwo"}) + "\n\n" + json.dumps({"article": "three", "abstract": "no"}) + "\n"
PACKERS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
    return file


def write_tar(file: Path, members: dict[str, str]) -> Path:
    with tarfile.open(file, "w:" + {".xz": "xz", ".gz": "gz", ".tgz": "gz", ".tar": ""}[file.suffix]) as archive:
        for name, text in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return file


def read(path: Path) -> list[str]:
    return list(read_documents(path))


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".bz2", ".zip"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("book.txt", TEXT, [TEXT]),
        ("notes.md", TEXT, [TEXT]),  # named by hand, any file is text
        ("wiki_00", WIKI, WIKI_DOCUMENTS),
        ("wiki.txt", "\ufeff\r\n" + WIKI.replace("\n", "\r\n"), WIKI_DOCUMENTS),
        ("lines.jsonl", LINES, ["one\ntwo", "three"]),
    ],
)
def test_a_file_packed_or_not(tmp_path, name, content, expected, ending):
    file = tmp_path / (name + ending)
    if ending == ".zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name.replace(".md", ".txt"), content)
    else:
        file.write_bytes(PACKERS.get(ending, bytes)(content.encode()))
    assert read(file) == expected


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.xz"])
def test_a_tar_is_read_in_its_order_without_a_file_beside_it(tmp_path, ending):
    members = {"text/AA/wiki_01": WIKI, "b.txt": TEXT, "a.jsonl": LINES, "README.md": "no", "._b.txt": "\0"}
    file = write_tar(tmp_path / f"corpus{ending}", members)
    assert read(file) == [*WIKI_DOCUMENTS, TEXT, "one\ntwo", "three"]
    assert list(tmp_path.iterdir()) == [file]


def test_a_zip_of_several_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "corpus.zip", "w") as archive:
        for name, text in {"b.txt": TEXT, "a/wiki_00": WIKI, "table.csv": "1,2"}.items():
            archive.writestr(name, text)
    assert read(tmp_path / "corpus.zip") == [*WIKI_DOCUMENTS, TEXT]


def test_a_folder_in_sorted_order(tmp_path):
    write(tmp_path / "b" / "two.txt", "two")
    write(tmp_path / "a.txt", "one")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    write_tar(tmp_path / "d.v2.tar", {"x.txt": "four"})
    for ignored in ("README.md", ".hidden.txt", "table.tsv", ".git/config.txt"):
        write(tmp_path / ignored, "no")
    (tmp_path / "table.tsv.gz").write_bytes(gzip.compress(b"no"))
    write(tmp_path / "empty.txt", "")
    assert read(tmp_path) == ["one", "two", "three", "four"]
    assert [file.name for file in corpus_files(tmp_path)] == ["a.txt", "two.txt", "c.txt.gz", "d.v2.tar"]


def test_the_digest_follows_contents_and_names(tmp_path):
    write(tmp_path / "a.txt", "one")
    before = corpus_digest(tmp_path)
    assert corpus_digest(tmp_path) == before
    write(tmp_path / "a.txt", "two")
    changed = corpus_digest(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({before, changed, corpus_digest(tmp_path)}) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is an empty file"),
        ("a.txt", b" \n\t\n", r"a\.txt holds no document"),
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt, line 2 is no UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2 is no JSON"),
        (
            "a.jsonl",
            b'\n{"title": "x", "body": "y"}\n',
            r"a\.jsonl, line 2 has no text in .* text or article; .* title, b",
        ),
        ("a.jsonl", b"[1]\n", r"line 1 has no text .* a list"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1 has no text in a field"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1 holds half a character, \\ud800"),
        ("wiki_00", WIKI[:-8].encode(), r"wiki_00 ends inside of the <doc> of line 13: it was cut off"),
        ("wiki_00", WIKI.replace("</doc>\n", "", 1).encode(), "line 7: a <doc> begins within that of line 1"),
        ("wiki_00", (WIKI + "stray\n").encode(), r"line 18 stands outside of every <doc>"),
        ("a.txt.gz", gzip.compress(b"x" * 10**5)[:-9], r"a\.txt\.gz \(.*truncated or damaged gz"),
        ("a.tar", b"no tar at all" * 100, r"a\.tar \(.*truncated or damaged tar"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_cut_archive_is_named(tmp_path):
    file = write_tar(tmp_path / "corpus.tar.xz", {"a.txt": "".join(map(str, range(10**5)))})
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"corpus\.tar\.xz \(.*truncated or damaged tar"):
        read(file)


def test_a_bad_member_is_named_with_its_archive(tmp_path):
    file = write_tar(tmp_path / "corpus.tar", {"good.txt": "x", "bad.jsonl": "{"})
    with pytest.raises(DataError, match=r"bad\.jsonl in .*corpus\.tar, line 1 is no JSON"):
        read(file)


def test_missing_paths_and_folders_without_text(tmp_path):
    with pytest.raises(DataError, match="none does not exist"):
        read(tmp_path / "none")
    write(tmp_path / "table.csv", "1,2")
    with pytest.raises(DataError, match=r"has no file of text .*table\.csv"):
        read(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.txt cannot be read: No such file"):
        read(tmp_path)


def test_documents_of_wikipedia(data_file):
    documents = read_documents(data_file("wikipedia_text/wikiextractor_text_AA.tar.xz"))
    first = list(itertools.islice(documents, 300))
    documents.close()
    assert first[0].startswith("Jarred Shaw\n\nJarred Shaw (born September 28, 1990)")
    assert not any("<doc" in document or "</doc>" in document for document in first)
    assert all(document.count("\n") >= 1 and document == document.strip() for document in first)
