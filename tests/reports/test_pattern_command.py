"""`python -m reports.pattern`: the settings of train.py in, picture and numbers out."""

import json

import pytest

from kernels.window_attention.pattern import WindowPattern
from reports.errors import ReportError
from reports.pattern import main, print_numbers
from reports.pattern_numbers import pattern_numbers
from tests.helpers import run_python

TINY = ["model.dim=32", "model.num_layers=3", "model.num_heads=4", "model.attention.window=8"]
PHASES = (
    "schedule.phases=[{seq_len:64,batch_size:2,steps:4,lr:0.001,attention:{window:[2,4,4]}},"
    "{seq_len:96,batch_size:2,steps:4,lr:0.001,attention:{window:[4,8,8],dilation:[1,1,[1,1,2,2]]}}]"
)


def numbers_of(capsys, *arguments):
    main([*TINY, *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_last_phase_and_its_length_are_the_default(capsys):
    numbers = numbers_of(capsys, PHASES)
    assert (numbers["phase"], numbers["num_phases"], numbers["seq_len"]) == (1, 2, 96)
    assert [layer["window"][0] for layer in numbers["layers"]] == [4, 8, 8]
    assert numbers["receptive_field"] == 4 + 8 + 16
    patterns = [WindowPattern((window,) * 4, (1,) * 4, True) for window in (4, 8)]
    patterns.append(WindowPattern((8,) * 4, (1, 1, 2, 2), True))
    assert numbers["pairs"] == sum(int(pattern.mask(96).sum()) for pattern in patterns)


def test_phase_and_length_are_chosen(capsys):
    numbers = numbers_of(capsys, PHASES, "phase=0", "seq_len=16")
    assert (numbers["seq_len"], numbers["receptive_field"]) == (16, 10)


def test_cap_of_the_schedule_holds(capsys):
    numbers = numbers_of(capsys, PHASES, "schedule.cap.window=3", "schedule.cap.seq_len=32")
    assert (numbers["seq_len"], numbers["receptive_field"]) == (32, 3 + 3 + 6)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_is_written_and_named(tmp_path, capsys, suffix):
    target = tmp_path / "new folder" / f"pattern.{suffix}"
    main([*TINY, PHASES, f"output={target}"])
    assert f"picture: {target}" in capsys.readouterr().out
    assert target.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_table_shows_layers_that_differ(capsys):
    patterns = [WindowPattern((4, 4), (1, 1), True)] * 2 + [WindowPattern((4, 4), (1, 3), True)]
    print_numbers(pattern_numbers(patterns, 64), patterns)
    out = capsys.readouterr().out
    assert "0–1" in out and "1 (head 0), 3 (head 1)" in out
    assert "receptive field 20 positions to the left" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["phase=2"], "phase=2: expected a whole number from 0 to 1"),
        (["phase=first"], "phase=first: expected a whole number from 0 to 1"),
        (["seq_len=0"], "seq_len=0: expected a whole number from 1 to 1,048,576"),
        (["output=pattern.gif"], "output=pattern.gif: the picture is a .png or an .svg file"),
    ],
)
def test_bad_options_name_value_and_limit(arguments, message):
    with pytest.raises(ReportError) as error:
        main([*TINY, PHASES, *arguments])
    assert str(error.value) == message


def test_settings_beside_a_run_folder_are_refused(tmp_path):
    with pytest.raises(ReportError, match=r"^model.dim=8: with run_dir= the settings of the run are shown"):
        main(["model.dim=8", f"run_dir={tmp_path}"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["model.attention.windw=3"], "windw"), (["run_dir=nowhere"], "nowhere"), (["phase=9"], "phase=9")],
)
def test_command_ends_in_one_line_and_code_2(arguments, named, tmp_path):
    done = run_python("-m", "reports.pattern", *arguments, f"output={tmp_path}/pattern.png")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and named in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2
