"""predict.py: the model's own continuation, of every kind of input, and what it refuses before anything is loaded."""

import io
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import predict
from eval import open_run
from tests.checkpoints import Payload
from tests.command import Finished, _run, run_train, small_run
from tests.helpers import ROOT
from tests.test_eval import copy, cut_short, flip_a_bit  # noqa: F401
from training.checkpoint import load_checkpoint


def run_predict(*arguments: object, cwd: Path, stdin: bytes = b"") -> Finished:
    """`python predict.py ARGUMENTS` in the folder `cwd`."""
    with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))):
        return _run("predict", predict.main, arguments, cwd)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of six steps."""
    folder = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")
        arguments = (*small_run(folder), "schedule.cap.steps=6", "eval.share=0.01", "train.checkpoint_every=4")
        assert run_train(*arguments, f"run_dir={folder / 'run'}", cwd=folder).code == 0
    return folder / "run"


def expected(run, prompt: bytes, step=6, **how) -> bytes:
    """The continuation by the task itself."""
    opened = open_run(None, str(run / "checkpoints" / f"step-{step}"), device=torch.device("cpu"))
    return opened.task.continue_text(opened.model, prompt, **{"length": 400, **how})


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_prompt_runs_on_in_the_terminal(run, tmp_path):
    ended = run_predict(f"run_dir={run}", "prompt=eta oin", "length=30", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "eta oin" + expected(run, b"eta oin", length=30).decode("utf-8", "replace") + "\n"
    assert list(tmp_path.iterdir()) == []


def test_settings_and_checkpoint_reach_the_model(run, tmp_path):
    how = {"length": 20, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "seed": 7}
    settings = [f"{name}={value}" for name, value in how.items()]
    output = tmp_path / "out.jsonl"
    checkpoint = run / "checkpoints" / "step-4"
    ended = run_predict(f"checkpoint={checkpoint}", "prompt=eta", *settings, f"output={output}", cwd=tmp_path)
    assert ended.code == 0, ended.err
    continuation = expected(run, b"eta", step=4, **how).decode("utf-8", "replace")
    row = {"input": "prompt", "prompt": "eta", "continuation": continuation, "complete": True, **how, "step": 4}
    assert rows_of(output) == [row]
    assert ended.out == f"eta{continuation}\n"


TEXTS = [
    "Hello, world",
    "It's \"quoted\" 'twice'",
    "'all of it'x",
    "a=b, c=[1,2] {d: e}",
    "back\\slash \\' and end \\",
    "two\nlines\ttab",
    "123",
    "1e5",
    "true",
    " spaces ",
    "Käse ☃",
    "-x",
    "~y",
    "# $HOME %s",
    "a" * 300,
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_taken_as_it_was_typed(run, tmp_path, text):
    ended = run_predict(f"run_dir={run}", f"prompt={text}", "length=1", f"output={tmp_path}/o.jsonl", cwd=tmp_path)
    assert ended.code == 0, ended.err
    shown = text.encode()[-64:].decode("utf-8", "replace")
    assert rows_of(tmp_path / "o.jsonl")[0]["prompt"] == shown and ended.out.startswith(shown)


def test_a_file_and_stdin_give_the_same(run, tmp_path):
    file = tmp_path / "0_seed=0,a text.txt"
    file.write_bytes(b"sentenced to hard \xff labour\n" * 5)
    from_file = run_predict(f"run_dir={run}", f"input={file.name}", "length=15", cwd=tmp_path)
    from_stdin = run_predict(f"run_dir={run}", "input=-", "length=15", cwd=tmp_path, stdin=file.read_bytes())
    assert from_file.code == from_stdin.code == 0, from_file.err
    assert from_file.out == from_stdin.out
    assert from_file.out.startswith((b"sentenced to hard \xff labour\n" * 5)[-64:].decode("utf-8", "replace"))


@pytest.fixture
def texts(tmp_path):
    """A folder of three files, one of them empty, and one that is hidden."""
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    for name, text in {"b.txt": "sinister", "a.txt": "hurled", "empty.txt": "", ".hidden": "x"}.items():
        (folder / name).write_text(text)
    return folder


def test_a_folder_gives_a_row_a_file(run, tmp_path, texts):
    ended = run_predict(f"run_dir={run}", f"input={texts}", "length=9", "output=out.jsonl", cwd=tmp_path)
    assert ended.code == 0 and ended.out == ""
    left_out = f"left out, as there is nothing in them to continue: {texts}/empty.txt"
    assert ended.err.splitlines() == [left_out, f"1/2 {texts}/a.txt", f"2/2 {texts}/b.txt"]
    rows = rows_of(tmp_path / "out.jsonl")
    assert [(row["input"], row["prompt"]) for row in rows] == [
        (f"{texts}/a.txt", "hurled"),
        (f"{texts}/b.txt", "sinister"),
    ]
    for row in rows:
        assert row["continuation"] == expected(run, row["prompt"].encode(), length=9).decode("utf-8", "replace")
    to_stdout = run_predict(f"run_dir={run}", f"input={texts}", "length=9", cwd=tmp_path)
    assert [json.loads(line) for line in to_stdout.out.splitlines()] == rows


BAD = [
    (["prompt=a"], 2, "run_dir has no value: give the folder of a run with run_dir=DIR, or checkpoint=PATH"),
    (["{run}", "checkpoint=x", "prompt=a"], 2, "run_dir and checkpoint are both given"),
    (["run_dir=no/such", "prompt=a"], 2, "run_dir=no/such is no run folder: it holds no config.yaml"),
    (["checkpoint=no/such", "prompt=a"], 4, "no checkpoint at no/such"),
    (["{run}"], 2, "there is nothing to read: give input=FILE, input=- for stdin"),
    (["{run}", "prompt=a", "input=-"], 2, "input and prompt are both given: give input=FILE"),
    (["{run}", "prompt="], 2, "prompt has an empty value: give one, or leave the key out"),
    (["{run}", "input=none.txt"], 2, "input=none.txt does not exist: name a file, a folder, or - for stdin"),
    (["{run}", "input=empty.txt"], 3, "input=empty.txt is empty (0 bytes): there is nothing to continue"),
    (["{run}", "input=empty"], 3, "input=empty holds no files (0): there is nothing to continue"),
    (["{run}", "input=-"], 3, "input=- is empty (0 bytes): there is nothing to continue"),
    (["{run}", "prompt=a", "output=no/such.jsonl"], 2, "output=no/such.jsonl: there is no folder no, make it first"),
    (["{run}", "prompt=a", "output=empty.txt"], 2, "output=empty.txt exists already: remove it, or name another file"),
    (["{run}", "prompt=a", "length=-3"], 2, "length is -3, it must be at least 1"),
    (["{run}", "prompt=a", "length=many"], 2, "length is 'many', it must be a whole number"),
    (["{run}", "prompt=a", "temperature=-1"], 2, "temperature is -1.0, it must be at least 0"),
    (["{run}", "prompt=a", "temperature=nan"], 2, "temperature is nan, it must be a finite number"),
    (["{run}", "prompt=a", "top_k=0"], 2, "top_k is 0, it must be at least 1"),
    (["{run}", "prompt=a", "top_p=1.5"], 2, "top_p is 1.5, it must be above 0 and at most 1"),
    (["{run}", "prompt=a", "seed=-1"], 2, "seed is -1, it must be at least 0"),
    (["{run}", "prompt=a", "lenght=3"], 2, "there is no configuration key lenght, did you mean length?"),
    (["{run}", "prompt=a", "device=gpu"], 2, "device is 'gpu', it must be one of auto, cpu, cuda"),
    (["{run}", "prompt=a", "-m"], 2, "predict.py takes one run at a time: leave out -m"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD, ids=[" ".join(words) for words, *_ in BAD])
def test_bad_input(run, tmp_path, arguments, code, message, monkeypatch):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("training.checkpoint.load_checkpoint", never)
    ended = run_predict(*(word.format(run=f"run_dir={run}") for word in arguments), cwd=tmp_path)
    assert ended.code == code and "Traceback" not in ended.err
    assert ended.err.startswith(f"error: {message}") and len(ended.err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "empty.txt"]


def never(path, **options):
    """Loads nothing, unless the path is what is wrong."""
    assert not path.exists(), "the model was loaded although the input is bad"
    return load_checkpoint(path, **options)


def test_a_prompt_that_text8_does_not_have(copy, tmp_path):  # noqa: F811
    file = copy / "config.yaml"
    file.write_text(file.read_text().replace("dataset: python_source", "dataset: text8"))
    changed = run_predict(f"run_dir={copy}", "prompt=The Cat", "length=3", cwd=tmp_path)
    assert changed.code == 0 and changed.out.startswith("the cat")
    assert changed.err.startswith("prompt: capitals and white space were changed to what text8 has")
    refused = run_predict(f"run_dir={copy}", "prompt=In 1999", "length=3", cwd=tmp_path)
    assert refused.code == 3
    assert refused.err.startswith("error: prompt: this model knows a-z and space alone, the text has '1'")


def test_the_data_of_the_run_is_not_needed(copy, tmp_path):  # noqa: F811
    file = copy / "config.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.strip().startswith("path:")]
    file.write_text("\n".join(lines).replace("data:\n", "data:\n  path: /no/such/text\n", 1))
    ended = run_predict(f"run_dir={copy}", "prompt=the ", "length=3", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize(
    "damage",
    [pytest.param(cut_short, marks=pytest.mark.fault(5)), pytest.param(flip_a_bit, marks=pytest.mark.fault(6))],
)
def test_damaged_checkpoint(copy, tmp_path, damage, caplog):  # noqa: F811
    message = damage(copy / "checkpoints" / "step-6")
    ended = run_predict(f"checkpoint={copy}/checkpoints/step-6", "prompt=a", cwd=tmp_path)
    assert ended.code == 4 and ended.err.startswith(f"error: {message}") and "Traceback" not in ended.err
    assert run_predict(f"run_dir={copy}", "prompt=a", "length=2", cwd=tmp_path).code == 0
    assert f"{message}" in caplog.text and "step-4 is used instead" in caplog.text


@pytest.mark.fault(7)
def test_a_checkpoint_of_another_model(copy, tmp_path, caplog):  # noqa: F811
    file = copy / "config.yaml"
    file.write_text(file.read_text().replace("vocab_size: 256", "vocab_size: 300"))
    ended = run_predict(f"run_dir={copy}", "prompt=a", cwd=tmp_path)
    assert ended.code == 4 and "embed.weight: found float32 [256, 32], expected float32 [300, 32]" in ended.err


@pytest.mark.fault(8)
def test_a_pickle_is_refused_before_it_is_opened(copy, tmp_path):  # noqa: F811
    marker, file = tmp_path / "marker", copy / "checkpoints" / "evil.pt"
    file.write_bytes(pickle.dumps(Payload(marker)))
    ended = run_predict(f"checkpoint={file}", "prompt=a", cwd=tmp_path)
    assert ended.code == 4 and "Traceback" not in ended.err and not marker.exists()
    assert ended.err.startswith(f"error: {file} is a single file, and reading it could run code from it")


def test_ctrl_c_keeps_what_was_written(run, tmp_path):
    command = [sys.executable, ROOT / "predict.py", f"run_dir={run}", "prompt=the cat", "length=1000000"]
    process = subprocess.Popen(
        [*map(str, command), "output=o.jsonl"], cwd=tmp_path, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        shown = b""
        while len(shown) < 40:  # as it comes: the rest would take hours
            shown += process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and error == b"error: stopped by SIGINT\n"
    (row,) = rows_of(tmp_path / "o.jsonl")
    assert (row["prompt"], row["complete"]) == ("the cat", False)
    # a character that was cut in half shows in the row alone
    assert ("the cat" + row["continuation"]).startswith((shown + rest).decode().removesuffix("\n"))


def test_help(tmp_path):
    ended = run_predict("--help", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("  python predict.py ") >= 6 and "Exit codes: 0 done" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 120 and "ydra" not in ended.out
