"""The text8 rules one by one, the real prefix byte for byte, and the command."""

from __future__ import annotations

import hashlib
import io
import lzma
import subprocess
import zipfile

import pytest

from data import chars
from data.prepare import main
from data.text8_clean import clean_dump
from tests.helpers import run_python


def clean(*pieces: bytes) -> bytes:
    return b"".join(clean_dump(pieces))


def article(text: bytes) -> bytes:
    return b'<page><title>Not kept</title><text xml:space="preserve">' + text + b"</text></page>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"Plain TEXT, with marks.", b" plain text with marks"),
        (b"In 1984", b" in one nine eight four"),
        (b"a&amp;nbsp;b &lt;!-- hidden --&gt; c", b" a b c"),
        (b"fact&lt;ref name=x&gt;Author 3&lt;/ref&gt; goes on", b" fact goes on"),
        (b"see [http://example.org/a?b label here]", b" see label here"),
        (b"[[Image:Photo.jpg|thumb|left|200px|A caption]]", b" a caption"),
        (b"[[IMAGE:Photo.jpg|Right|a|The caption]]", b" the caption"),
        (b"[[Category:Birds|*]]", b" birds"),
        (b"[[de:Vogel]] [[zh-min-nan:X]] bird", b" bird"),
        (b"[[United States|American]] [[bird]]s", b" american birds"),
        (b"{{stub}} {| table |} after", b" after"),
        (b"&amp;mdash; dash", b" dash"),
        (b"caf\xc3\xa9", b" caf"),
        (b"#REDIRECT [[Elsewhere]]", b""),
    ],
)
def test_rules(text, expected):
    assert clean(article(text)) == expected


def test_only_article_text_is_kept():
    dump = b"<mediawiki><siteinfo>Wiki</siteinfo>" + article(b"one") + article(b"two") + b"</mediawiki>"
    assert clean(dump) == b" one two"


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_pieces_of_any_size_give_the_same(size):
    dump = article(b"One [[two|three]] &lt;b&gt;four&lt;/b&gt; 5") + article(b"#redirect x") + article(b"six")
    pieces = [dump[start : start + size] for start in range(0, len(dump), size)]
    assert clean(*pieces) == clean(dump) == b" one three four five six"


def test_enwik8_prefix_gives_the_text8_prefix(data_file, tmp_path):
    """The published text8 is what these rules make of the published dump: all bytes produced must agree."""
    assert main(["text8", str(data_file("enwik8/enwik8_head.xz")), str(tmp_path / "text8")]) == 0
    produced = (tmp_path / "text8").read_bytes()
    published = lzma.decompress(data_file("text8/text8_head.xz").read_bytes())
    assert len(produced) == 3_010_294
    assert produced == published[: len(produced)]


def test_command_writes_the_text_and_says_what_next(tmp_path, capsys):
    (tmp_path / "dump.xz").write_bytes(lzma.compress(article(b"words " * 100)))
    assert main(["text8", str(tmp_path / "dump.xz"), str(tmp_path / "out")]) == 0
    text = (tmp_path / "out").read_bytes()
    assert text == b" words" * 100
    printed = capsys.readouterr().out
    assert hashlib.sha256(text).hexdigest() in printed
    assert f"data.path={tmp_path / 'out'}" in printed
    corpus = chars.load_chars("text8", path=tmp_path / "out", cache_dir=tmp_path)
    assert corpus.fingerprint["bytes"] == 600


def run(*arguments: object) -> subprocess.CompletedProcess:
    return run_python("-m", "data.prepare", *arguments, timeout=60)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "INPUT={file} does not exist; {folder} holds: present.txt"),
        (b"", "INPUT={file} is an empty file (0 bytes)"),
        (lzma.compress(article(b"words"))[:-8], "is a truncated or damaged xz file"),
        (lzma.compress(b"no article"), "INPUT={file} has no article text"),
    ],
    ids=["missing", "empty", "truncated", "no_article"],
)
def test_bad_input_ends_with_the_code_and_no_traceback(tmp_path, content, message):
    (tmp_path / "present.txt").write_text("x")
    file = tmp_path / "dump.xz"
    if content is not None:
        file.write_bytes(content)
    done = run("text8", file, tmp_path / "out")
    assert done.returncode == 3
    assert message.format(file=file, folder=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(
        ["present.txt"] + (["dump.xz"] if content is not None else [])
    )


def test_output_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "dump").write_bytes(article(b"words"))
    (tmp_path / "out").write_text("precious")
    assert main(["text8", str(tmp_path / "dump"), str(tmp_path / "out")]) == 3
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "precious"
    assert main(["text8", str(tmp_path / "dump"), str(tmp_path / "no" / "folder")]) == 3
    assert "cannot be written" in capsys.readouterr().err


def test_help_and_usage():
    done = run("--help")
    assert done.returncode == 0
    assert "clean a Wikipedia XML dump into text8 form" in done.stdout and "download" in done.stdout
    assert run("text8").returncode == 2


def test_download_command(server, tmp_path, monkeypatch, capsys):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("text8", b"some words " * 100)
    server.content = packed.getvalue()
    digest = hashlib.sha1(b"some words " * 100).hexdigest()
    monkeypatch.setitem(chars.SOURCES, "text8", chars.Source(server.url, "sha1", digest))
    assert main(["download", "text8", "--cache-dir", str(tmp_path)]) == 0
    assert "train 990, valid 55, test 55 characters" in capsys.readouterr().out
    server.status = 404
    assert main(["download", "text8", "--cache-dir", str(tmp_path / "new")]) == 3
    assert "HTTP 404" in capsys.readouterr().err
