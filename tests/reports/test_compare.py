"""Runs side by side: seeds grouped, unfinished runs apart, errors in one line."""

import csv
import io
import json
import statistics

import pytest

from reports.compare import csv_text, main, markdown, value_text
from reports.compare_runs import compare_runs
from reports.console import run_command
from reports.errors import ReportError
from training.run_dir import RunDir


@pytest.fixture(name="sweep")
def sweep_fixture(tmp_path, write_run):
    """Two windows, three seeds each, one run not finished; a link, and a tracker's own config.yaml inside."""
    scores = {4: [2.5, 2.7, 2.6], 8: [2.4, 2.2, None]}
    for window, values in scores.items():
        for seed, bpc in enumerate(values):
            status = "finished" if bpc else "preempted"
            write_run(tmp_path / "sweep" / f"{window}-{seed}", seed=seed, bpc=bpc, window=window, status=status)
    (tmp_path / "sweep" / "latest").symlink_to("4-0")
    (tmp_path / "sweep" / "4-0" / "wandb").mkdir()
    (tmp_path / "sweep" / "4-0" / "wandb" / "config.yaml").write_text("other: 1\n")
    return tmp_path / "sweep"


def test_runs_that_differ_in_seed_and_local_keys_are_one_row(sweep):
    comparison = compare_runs([sweep])
    assert comparison.metric == "bpc" and comparison.keys == ["model.attention.window"]
    first, second, unfinished = comparison.rows
    assert first.settings == {"model.attention.window": 8} and first.seeds == [0, 1]
    assert second.values == [2.5, 2.7, 2.6] and second.num_runs == 3
    assert second.mean == pytest.approx(2.6) and second.std == pytest.approx(statistics.stdev([2.5, 2.7, 2.6]))
    assert (second.low, second.high, second.spread) == (2.5, 2.7, pytest.approx(0.2))
    assert second.tokens_per_second == pytest.approx(1001.0)
    assert unfinished.status == "preempted at step 17" and unfinished.mean is None and unfinished.num_runs == 0


def test_a_result_of_a_run_that_goes_on_is_not_averaged(tmp_path, write_run):
    write_run(tmp_path / "a", seed=1, bpc=2.0)
    write_run(tmp_path / "b", seed=2, bpc=9.0, status="running")
    with RunDir(tmp_path / "b").lock():
        row, unfinished = compare_runs([tmp_path]).rows
    assert row.values == [2.0] and row.std is None
    assert unfinished.status == "running at step 30"


def test_a_score_that_is_not_finite_is_shown_and_changes_nothing_else(tmp_path, write_run, capsys):
    """A finished run and a failed one, in a group with a sound run; the first found has no finite score."""
    for seed, (bpc, status) in enumerate([("nan", "finished"), (2.0, "finished"), ("inf", "failed"), (3.0, "failed")]):
        write_run(tmp_path / f"run-{seed}", seed=seed, bpc=bpc, status=status)
    write_run(tmp_path / "run-4", seed=4, bpc="nan", status="preempted")  # the score is a former one
    comparison = compare_runs([tmp_path])
    assert comparison.metric == "bpc" and comparison.rows[0].values == [2.0]
    lines = [line.split(" | ") for line in markdown(comparison).splitlines()[2:7]]
    assert [(line[0].removeprefix("| "), line[-1].removesuffix(" |")) for line in lines] == [
        ("2.0000", "finished"),
        ("nan", "finished at step 30"),
        ("inf", "failed at step 30"),
        ("-", "failed at step 30"),
        ("-", "preempted at step 30"),
    ]
    main([str(tmp_path), "--json", "--output", str(tmp_path / "t.md")])
    data = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [row["mean"] for row in data["rows"]] == [2.0, "nan", "inf", None, None]
    assert compare_runs([tmp_path / "run-0"]).metric == compare_runs([tmp_path / "run-0"], "bpc").metric == "bpc"


@pytest.mark.fault(17)
def test_states_of_unfinished_runs_are_listed(tmp_path, write_run, capsys):
    """One stopped by a signal, one whose process is gone, one that failed before it said a step, one with no status."""
    write_run(tmp_path / "a", seed=1, bpc=None, status="preempted")
    write_run(tmp_path / "b", seed=2, bpc=None, status="running")
    write_run(tmp_path / "c", seed=3, bpc=None)
    (tmp_path / "c" / "status.json").write_text('{"status": "failed"}')
    write_run(tmp_path / "d", seed=4, bpc=None)
    (tmp_path / "d" / "status.json").write_text('{"status": "runn')
    main([str(tmp_path)])
    out = capsys.readouterr().out
    assert [row.status for row in compare_runs([tmp_path]).rows] == [
        "preempted at step 17", "interrupted at step 17", "failed", "unknown"
    ]  # fmt: skip
    assert "interrupted at step 17" in out and f"{tmp_path / 'd'}: status.json is not valid JSON" in " ".join(
        out.split()
    )


def test_a_run_named_twice_counts_once(sweep):
    comparison = compare_runs([sweep, sweep / "latest", sweep / "4-1"])
    assert sum(row.num_runs for row in comparison.rows) == 5


def test_higher_is_better_sorts_the_other_way(sweep):
    rows = compare_runs([sweep], "tokens_per_second").rows
    assert [row.settings["model.attention.window"] for row in rows[:2]] == [4, 8]


def test_nested_numbers_are_metrics_too(sweep):
    assert compare_runs([sweep], "baselines.gzip").rows[0].mean == pytest.approx(2.9)


def test_by_averages_over_everything_else_and_says_so(sweep):
    comparison = compare_runs([sweep], by=["model.dim"])
    assert comparison.rows[0].num_runs == 5 and comparison.averaged == ["model.attention.window"]
    assert "Averaged over runs that differ in model.attention.window." in markdown(comparison)


def test_keys_that_change_together_share_a_column(tmp_path, write_run):
    for index, (name, window) in enumerate([("a", [4] * 12), ("b", [8] * 12)]):
        write_run(tmp_path / name, seed=index, window=window, experiment_name=name)
    comparison = compare_runs([tmp_path])
    assert comparison.keys == ["experiment_name"]
    assert comparison.together == {"experiment_name": ["model.attention.window"]}
    assert "experiment_name stands also for model.attention.window" in markdown(comparison)


def test_markdown_and_csv_hold_the_numbers(sweep):
    comparison = compare_runs([sweep])
    header, _, best, *_ = markdown(comparison).splitlines()
    assert header.startswith("| window | bpc mean | std | min – max | runs |")
    assert best == "| 8 | 2.3000 | 0.1414 | 2.2000 – 2.4000 | 2 | 0, 1 | 1,000 | finished |"
    rows = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    assert float(rows[1]["mean"]) == pytest.approx(2.6) and rows[2]["mean"] == ""


def test_long_lists_are_shortened():
    assert value_text([32, 32, 64, [1, 2], [1, 2]]) == "32×2, 64, [1, 2]×2"
    assert value_text([[1, 1], [1, 1]]) == "[1×2]×2"


@pytest.mark.parametrize("suffix", ["md", "csv"])
def test_output_is_written_with_the_picture_beside_it(sweep, tmp_path, capsys, suffix):
    target = tmp_path / "out" / f"table.{suffix}"
    main([str(sweep), "--output", str(target)])
    assert "bpc mean" in target.read_text() or "mean,std" in target.read_text()
    assert target.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert f"written: {target}" in capsys.readouterr().out


def test_json_is_all_that_is_printed(sweep, capsys):
    main([str(sweep), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["rows"][0]["values"] == [2.4, 2.2] and data["metric"] == "bpc"


def test_without_any_result_every_run_is_listed(tmp_path, write_run, capsys):
    write_run(tmp_path / "a", bpc=None, status="running")
    main([str(tmp_path), "--output", str(tmp_path / "t.md")])
    assert "interrupted at step 17" in capsys.readouterr().out
    assert not (tmp_path / "t.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{missing}"], "{missing} is no folder; give run folders of train.py or a folder that holds some"),
        (["{empty}"], "{empty} neither is a run folder nor holds one (no config.yaml in it)"),
        (["{sweep}", "--metric", "bcp"], "metric 'bcp': no run has it; present are: baselines.gzip, "),
        (
            ["{sweep}", "--by", "model.dmi"],
            "--by model.dmi: no run's config has this key; nearest: model.dim",
        ),
        (["{sweep}", "--output", "x.pdf"], "--output x.pdf: the table is a .md or a .csv file"),
        ([], "the following arguments are required: RUN"),
        (["{sweep}", "--metrc", "bpc"], "unrecognized arguments: --metrc bpc"),
    ],
)
def test_errors_are_one_line_and_code_2(sweep, tmp_path, capsys, arguments, message):
    places = {"sweep": sweep, "missing": tmp_path / "missing", "empty": tmp_path / "empty"}
    places["empty"].mkdir()
    code = run_command(main, [argument.format(**places) for argument in arguments])
    error = capsys.readouterr().err
    assert code == 2 and len(error.splitlines()) == 1
    assert error.startswith(f"error: {message.format(**places)}")


def test_our_own_bugs_keep_their_traceback():
    def broken(_):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_command(broken, [])


def test_errors_carry_their_exit_code():
    assert ReportError.exit_code == 2
