"""The evaluation benchmark: it times equal scores, counts what is read, writes every column, refuses the rest."""

import csv
from dataclasses import fields

import pytest

from benchmarks import evaluation
from benchmarks.evaluation import Row
from benchmarks.timing import environment
from tests.command import run_train, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three steps; its model sees 16 characters back."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")
        arguments = (*small_run(folder), "schedule.cap.steps=3", "eval.share=0.01")
        assert run_train(*arguments, f"run_dir={folder / 'run'}", cwd=folder).code == 0
    return folder / "run"


def test_every_protocol_gives_one_score_and_a_row(run, tmp_path, capsys):
    output = tmp_path / "evaluation.csv"
    sizes = ("--share", "0.25", "--context", "128", "--stride", "16", "--rounds", "2")
    assert evaluation.main([f"run_dir={run}", *sizes, "--output", str(output)]) == 0
    with output.open(encoding="utf-8") as file:
        rows = {row["protocol"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["streaming", "windowed", "uncut"]
    assert set(rows["uncut"]) == {field.name for field in fields(Row)} | set(environment())
    for row in rows.values():
        assert abs(float(row["bpc_difference"])) < 1e-5
        assert float(row["median_s"]) > 0 and float(row["characters_per_second"]) > 0
        assert (row["receptive_field"], row["num_rounds"], row["step"]) == ("16", "2", "3")
    assert float(rows["streaming"]["reads"]) == 1 and float(rows["streaming"]["ratio"]) == 1
    # two times 16 characters for 16 scored, the first of which have none before them; 128 for 16, but the first window
    assert float(rows["windowed"]["reads"]) == pytest.approx(2, abs=0.05)
    assert float(rows["uncut"]["reads"]) == pytest.approx(128 / 16, abs=2)
    shown = capsys.readouterr().out
    assert "time / streaming" in shown and f"written: {output}" in shown.replace("\n", "")


def test_scores_that_differ_are_not_timed(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "interleave", None)
    monkeypatch.setitem(evaluation.TOLERANCE, "fp32", 1e-9)
    output = tmp_path / "evaluation.csv"
    sizes = ("--share", "0.1", "--context", "20", "--stride", "16")
    assert evaluation.main([f"run_dir={run}", *sizes, "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: windowed gives ") and "nothing is timed" in error
    assert "receptive field (16) is at most context - stride (4)" in error
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["DIR"], "DIR: give run_dir=DIR or checkpoint=PATH"),
        (["run_dir=DIR", "--protocols", "uncutt"], "--protocols uncutt: choose from windowed,uncut"),
        (["run_dir=DIR", "--share", "0"], "--share must be above 0 and at most 1, --rounds at least 1"),
    ],
)
def test_bad_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_run_that_is_not_there(tmp_path, capsys):
    assert evaluation.main([f"run_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"error: run_dir={tmp_path} is no run folder: it holds no config.yaml\n"
