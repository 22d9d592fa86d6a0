"""What a person sees: one plain line per report, or one live line on a terminal."""

import io
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from tests.helpers import ROOT
from training import progress
from training.progress import ProgressReporter, describe, format_duration, peak_memory_bytes, reset_peak_memory

LINE = {
    "step": 1500,
    "phase": 1,
    "train/loss": 1.2,
    "train/bpc": 1.7312,
    "optim/lr": 3e-4,
    "perf/tokens_per_s": 12345.6,
    "mem/peak_gib": 1.5,
}


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=terminal, width=120, highlight=False, soft_wrap=not terminal), output


def test_the_line_names_everything():
    assert describe(LINE, 4000, 5, 125.0) == (
        "phase 2/5  step 1,500/4,000  bpc 1.731  lr 3.00e-04  12,346 tokens/s  2m05s left  1.50 GiB"
    )


def test_the_line_leaves_out_what_is_absent():
    assert describe({"step": 3, "train/loss": 2.0}, 4, 1, None) == "step 3/4  loss 2.000"
    assert describe({"step": 3, "train/bpc": None}, 4, 1, None) == "step 3/4"


def test_plain_output_is_one_line_per_report():
    screen, output = console(terminal=False)
    reporter = ProgressReporter(4000, 5, console=screen)
    reporter.update({**LINE, "progress/eta_s": 60})
    reporter.message("[bold] stays as it is, however long the line is " + "x" * 200)
    reporter.update({**LINE, "step": 1600, "progress/eta_s": 30})
    reporter.close()
    lines = output.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("1m00s left  1.50 GiB")
    assert lines[1].startswith("[bold] stays")
    assert "\x1b" not in output.getvalue()


def test_a_terminal_gets_a_live_line_with_messages_above():
    screen, output = console(terminal=True)
    reporter = ProgressReporter(2000, 5, console=screen)
    reporter.update(LINE)
    reporter.message("evaluation: 1.70 bpc")
    reporter.close()
    reporter.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert " 75% phase 2/5  step 1,500/2,000  bpc 1.731" in text
    assert "evaluation: 1.70 bpc\n" in text


def test_other_processes_stay_silent(capsys):
    reporter = ProgressReporter(10, 1, enabled=False)
    reporter.update(LINE)
    reporter.message("hello")
    reporter.close()
    assert capsys.readouterr() == ("", "")


def test_time_left_follows_the_recent_pace(monkeypatch):
    now = iter([0.0, 10.0, 12.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    clock = progress._Clock(110)
    assert clock.remaining(0) is None
    assert clock.remaining(10) == pytest.approx(100.0)
    assert clock.remaining(12) == pytest.approx(98.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (7620, "2h07m"), (273600, "3d04h")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_peak_memory_counts_from_the_reset():
    held = torch.ones(256 * 2**20, dtype=torch.uint8)
    with_it = peak_memory_bytes("cpu")
    assert with_it > 256 * 2**20
    del held
    reset_peak_memory("cpu")
    without = peak_memory_bytes("cpu")
    assert without < with_it - 200 * 2**20
    held = torch.ones(128 * 2**20, dtype=torch.uint8)
    assert peak_memory_bytes("cpu") > without + 100 * 2**20
    del held


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path):
    """As `python train.py | head` does."""
    script = (
        "import pathlib, sys\n"
        "from training.progress import ProgressReporter\n"
        "reporter = ProgressReporter(3, 1)\n"
        "for step in range(9): reporter.message('x' * 100_000)\n"
        "pathlib.Path(sys.argv[1]).write_text('went on')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "end")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (0, b"")
    assert (tmp_path / "end").read_text() == "went on"
