"""What a run says at its end, and a finished one when it is started again: commands that work as they stand."""

import json
import shlex

import pytest

from reports.summary import closing, finished

RESULT = {
    "split": "test", "bpc": 2.5, "num_characters": 5000, "share": 0.25, "train_seconds": 20.0,
    "tokens_per_second": 900.0, "peak_memory_bytes": 2**30,
    "baselines": {"markov_2": 3.4, "gzip": 2.9, "train_bytes_used": 90_000},
}  # fmt: skip


def commands(text):
    """The commands in a text, as a shell reads them."""
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("  python")]


@pytest.mark.parametrize(
    ("overrides", "change", "seeds"),
    [
        ("", ["model.attention.window=64", "seed=1"], ["-m", "seed=0,1,2"]),
        (
            "experiment=text8_small\nsize=debug\nseed=7\nrun_dir=x\nmodel.attention.window=[2,4]\n",
            [
                "experiment=text8_small",
                "size=debug",
                "model.attention.window=[2,4]",
                "optim.weight_decay=0.1",
                "seed=1",
            ],
            ["-m", "experiment=text8_small", "size=debug", "model.attention.window=[2,4]", "seed=0,1,2"],
        ),
    ],
    ids=["the default", "an experiment"],
)
def test_next_commands_follow_the_run(tmp_path, monkeypatch, overrides, change, seeds):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "a b"
    folder.mkdir(parents=True)
    (folder / "overrides.txt").write_text(overrides)
    text = closing(RESULT, "bpc", "a sample", folder, folder / "report.html")
    assert "test bpc 2.5000 on 5,000 characters (25% of the split); beside it gzip 2.90, markov_2 3.40" in text
    assert commands(text) == [
        ["python", "predict.py", "run_dir=runs/a b", "prompt=Once upon a time"],
        ["python", "eval.py", "run_dir=runs/a b"],
        ["python", "train.py", "--help"],
        ["python", "train.py", *change],
        ["python", "train.py", *seeds],
    ]
    assert text.endswith(f"python -m reports.compare sweeps/{'text8_small' if overrides else 'default'}")


def test_a_finished_run_says_its_score_and_what_to_do_with_it(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    text = finished(tmp_path)
    assert text.startswith(f"finished already: {tmp_path} (test bpc 2.5000; {tmp_path / 'report.html'}). Start anew")
    assert [words[1] for words in commands(text)] == ["predict.py", "eval.py"]


def test_a_finished_run_whose_score_is_not_finite_says_so(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({**RESULT, "bpc": "nan"}))
    assert finished(tmp_path).startswith(f"finished already: {tmp_path} (test bpc nan; ")


def test_a_finished_run_without_a_readable_result_says_so_without_a_score(tmp_path):
    assert finished(tmp_path).startswith(f"finished already: {tmp_path}")
