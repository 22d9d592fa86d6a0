"""The experiment of a lengthened encoder, tiny, its commands run in this process."""

import csv
import sys

import pytest

import models.convert
from benchmarks import lengthening
from tests.command import run_eval, run_train
from tests.corpus import write_corpus, write_tokenizer

SMALL = ("model.config.hidden_size=16", "model.config.intermediate_size=24", "model.config.vocab_size=330")
QUICK = ("schedule.cap.steps=4", "precision=fp32", "device=cpu", "task.holdout=0.1")


def test_the_command_trains_converts_and_scores(tmp_path, monkeypatch, capsys):
    said = []

    def call(script, arguments):
        if script == "-m":
            assert models.convert.main([str(word) for word in arguments[1:]]) == 0
            return
        ended = {"train.py": run_train, "eval.py": run_eval}[script](*arguments, cwd=tmp_path)
        assert ended.code == 0, ended.err
        said.append(ended.out)

    monkeypatch.setattr(lengthening, "call", call)
    tokenizer, corpus = write_tokenizer(tmp_path), write_corpus(tmp_path, documents=400)
    command = [
        "--tokenizer",
        tokenizer,
        "--corpus",
        corpus,
        "--folder",
        tmp_path / "runs",
        "--output",
        tmp_path / "rows.csv",
    ]
    given = [*command, *QUICK, f"data.cache_dir={tmp_path / 'cache'}", *SMALL]
    monkeypatch.setattr(sys, "argv", ["lengthening", *map(str, given)])
    lengthening.main()
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == list(lengthening.NAMES.values())
    assert [int(row["context"]) for row in rows] == [128, 1024, 1024, 1024, 1024]
    assert [int(row["steps"]) for row in rows] == [4, 0, 0, 4, 4]
    assert all(float(row["bits_per_token"]) > 0 and row["git_commit"] for row in rows)
    assert sorted(path.name for path in (tmp_path / "runs").glob("*_score/*")) == ["test-step-0.json"] * 2
    assert not (tmp_path / "runs" / "copy" / "eval").exists()
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in lengthening.NAMES.values())
    # all of it is there: nothing is trained again, and the numbers are the same
    said.clear()
    lengthening.main()
    assert sum(text.startswith("finished already") for text in said) == 3
    with (tmp_path / "rows.csv").open() as file:
        assert [row["bits_per_token"] for row in csv.DictReader(file)] == [row["bits_per_token"] for row in rows]


def test_a_command_that_fails_ends_it():
    with pytest.raises(SystemExit) as ended:
        lengthening.call("-c", ["import sys; sys.exit(3)"])
    assert ended.value.code == 3
