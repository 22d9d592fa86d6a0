"""Text that is no text: byte models take every byte as it is, text8 names the place, cleaning counts what it drops."""

import json

import pytest

from data import prepare
from data.chars import load_chars
from data.errors import DataError
from tests.command import run_train, small_run

BAD = {
    "byte order mark": b"\xef\xbb\xbf",
    "nul": b"\0",
    "invalid start": b"\xff",
    "cut sequence": b"\xc3",
    "lone surrogate": b"\xed\xa0\x80",
    "latin 1": b"caf\xe9",
    "accent": "é".encode(),
}


@pytest.mark.fault(23)
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("place", [0, 1500])
def test_text8_names_file_offset_and_byte(tmp_path, name, place):
    raw = bytearray(b"plain words " * 200)
    raw[place:place] = BAD[name]
    (tmp_path / "text").write_bytes(raw)
    (offset,) = [at for at in range(place, place + 4) if raw[at] not in b"abcdefghijklmnopqrstuvwxyz "][:1]
    with pytest.raises(DataError) as error:
        load_chars("text8", path=tmp_path / "text", cache_dir=tmp_path)
    assert str(error.value) == (
        f"text8 holds only a-z and space, but {tmp_path / 'text'} has {bytes([raw[offset]])!r} at byte {offset:,}: "
        "clean it first with `python -m data.prepare text8 text OUTPUT`"
    )
    assert error.value.exit_code == 3


@pytest.mark.fault(23)
@pytest.mark.parametrize("dataset", ["enwik8", "python_source"])
def test_byte_models_train_on_every_byte_as_it_is(tmp_path, monkeypatch, dataset):
    monkeypatch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")
    raw = (b"".join(BAD.values()) + bytes(range(256)) + b" and words\r\n") * 100
    (tmp_path / "text").write_bytes(raw)
    corpus = load_chars(dataset, path=tmp_path / "text", cache_dir=tmp_path / "cache")
    assert b"".join(bytes(corpus.splits[split]) for split in ("train", "valid", "test")) == raw
    arguments = (*small_run(tmp_path), f"task.dataset={dataset}", f"data.path={tmp_path / 'text'}")
    ended = run_train(*arguments, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert ended.code == 0 and "Traceback" not in ended.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["data"]["bytes"] == len(raw) and 0 < result["bpc"] < 20
    (sample,) = (tmp_path / "run" / "samples").iterdir()
    sample.read_text(encoding="utf-8")


@pytest.mark.fault(23)
@pytest.mark.parametrize("size", [1, 5, 1 << 20])
def test_cleaning_counts_the_bytes_that_are_no_text(size):
    pieces = b"".join(BAD.values()) + "é �".encode() + b"\xe2\x82"
    watch = prepare.BadBytes()
    dump = [pieces[start : start + size] for start in range(0, len(pieces), size)]
    assert b"".join(watch.watch(dump)) == pieces
    # one NUL, one byte, half a sequence, a surrogate of three, one of Latin 1, the end cut off; marks, accents are text
    assert watch.count == 1 + 1 + 1 + 3 + 1 + 2


@pytest.mark.fault(23)
def test_cleaning_turns_bad_bytes_into_spaces_and_says_how_many(tmp_path, capsys):
    dump = b"\xef\xbb\xbf<text xml:space=x>one\0two \xff\xfe three caf\xe9s " + "é".encode() + b"</text>"
    (tmp_path / "dump").write_bytes(dump)
    assert prepare.main(["text8", str(tmp_path / "dump"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes() == b" one two three caf s"
    printed = capsys.readouterr().out
    assert f"4 bytes of {tmp_path / 'dump'} are no UTF-8 text: like every mark they became spaces" in printed
    (tmp_path / "sound").write_text("<text x>naïve — text</text>")
    assert prepare.main(["text8", str(tmp_path / "sound"), str(tmp_path / "other")]) == 0
    assert "UTF-8" not in capsys.readouterr().out


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{file} is an empty file (0 bytes): name a file that holds text"),
        (b" \n\t\r\n" * 300, "text.txt holds only white space (1,500 bytes): name a file of text"),
        (b"a", "text.txt holds 1 bytes, too few to split 90/5/5 (at least 200)"),
    ],
    ids=["empty", "blank", "one byte"],
)
@pytest.mark.parametrize("dataset", ["text8", "enwik8", "python_source"])
def test_file_without_text_ends_the_run_before_it_begins(tmp_path, dataset, content, message):
    if dataset == "text8" and content.strip(b" ") and b"\n" in content:
        message = "text8 holds only a-z and space, but {file} has b'\\n' at byte 1"
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    arguments = (*small_run(tmp_path), f"task.dataset={dataset}", f"data.path={file}", f"run_dir={tmp_path / 'run'}")
    ended = run_train(*arguments, cwd=tmp_path)
    assert ended.code == 3 and message.format(file=file) in ended.err
    assert len(ended.err.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.fault(24)
@pytest.mark.parametrize("text", ["", "   \n\t "])
def test_dump_whose_articles_are_empty_is_refused(tmp_path, capsys, text):
    (tmp_path / "dump").write_text(f'<mediawiki><text xml:space="preserve">{text}</text></mediawiki>')
    assert prepare.main(["text8", str(tmp_path / "dump"), str(tmp_path / "out")]) == 3
    assert f"INPUT={tmp_path / 'dump'} has no article text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(22)
def test_hidden_files_and_folders_are_listed_last(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".hidden").touch()
    for name in ("zeta.txt", "alpha.txt"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"does not exist; .* holds: alpha\.txt, zeta\.txt, \.cache/, \.hidden$"):
        load_chars("enwik8", path=tmp_path / "none.txt", cache_dir=tmp_path)
