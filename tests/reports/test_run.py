"""report.html of a synthetic run folder: everything inside, nothing fetched, nothing interpreted."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from omegaconf import OmegaConf

from configs.compose import compose_config
from kernels.window_attention.pattern import WindowPattern
from reports.console import run_command
from reports.errors import ReportError
from reports.run import main, write_report
from reports.run_figures import phase_spans, series, smooth
from reports.run_folder import read_run
from training.run_dir import RunDir

PATTERNS = [
    [WindowPattern((4, 4), (1, 1), True), WindowPattern((8, 8), (1, 2), True)],
    [WindowPattern((8, 8), (1, 1), True), WindowPattern((16, 16), (1, 2), True)],
]
HOSTILE = "<script>alert(1)</script><img src='http://example.org/x.png' onerror=alert(2)> $\\bad{ & \"'\x00"


class Page(HTMLParser):
    """Tags, and every address the page refers to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.handlers = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def report(folder, patterns=PATTERNS):
    return write_report(folder, patterns).read_text(encoding="utf-8")


def assert_self_contained(text):
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert page.handlers == []
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|http-equiv=.refresh", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("bpc", ["nan", "inf"])
def test_a_score_that_is_not_finite_is_shown_without_a_picture(tmp_path, write_run, bpc):
    folder = write_run(tmp_path / "run", bpc=bpc)
    text = report(folder)
    assert "test bits per character" in text and "tokens per second in training" in text
    assert re.search(rf">{bpc}<[^<]*<[^>]*>test bits per character", text)
    assert not (folder / "plots" / "baselines.png").exists()


def test_report_has_every_part_and_stands_alone(tmp_path, write_run):
    folder = write_run(tmp_path / "run")
    text = report(folder)
    assert_self_contained(text)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Result", "Training", "Window and dilation by layer", "Attention pattern", "Receptive field",
        "Generated text", "Commands", "Settings", "Environment",
    ]  # fmt: skip
    for shown in (
        "2.5000",
        "41.1 M",
        "1,000",
        "1.00 GiB",
        "3 min 20 s",
        "text8",
        "abc123",
        "0.25 of the split",
    ):
        assert shown in text
    assert text.count("<img ") == 6
    names = {file.name for file in (folder / "plots").iterdir()}
    drawn = ("baselines", "loss", "phases", "windows", "pattern", "receptive_field")
    assert names == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}


def test_commands_repeat_the_run_and_quote_the_shell(tmp_path, write_run):
    folder = write_run(tmp_path / "a run")
    (folder / "overrides.txt").write_text(f"model.attention.window=[2,4]\nseed=3\nrun_dir={folder}\n")
    text = html.unescape(report(folder, None))
    assert "python train.py 'model.attention.window=[2,4]' seed=3\n" in text
    assert f"python eval.py 'run_dir={folder}' split=test\n" in text
    assert f"python predict.py 'run_dir={folder}' 'prompt=Once upon a time'\n" in text
    on = f"python train.py 'model.attention.window=[2,4]' seed=3 'run_dir={folder}'\n"
    assert on not in text and "on with this one" not in text  # it has finished
    (folder / "status.json").write_text('{"status": "preempted", "step": 17}')
    text = html.unescape(report(folder, None))
    assert on in text and "on with this one" in text


def test_baselines_are_numbers_too(tmp_path, write_run):
    text = report(write_run(tmp_path / "run"), None)
    assert "<tr><th>gzip</th><td>2.9000</td></tr>" in text and "<tr><th>order-1 Markov</th><td>3.4000</td></tr>" in text


@pytest.mark.fault(17)
def test_a_run_whose_process_is_gone_is_interrupted(tmp_path, write_run):
    folder = write_run(tmp_path / "run", bpc=None, status="running")
    assert '<span class="state">interrupted</span>' in report(folder, None)
    assert json.loads((folder / "status.json").read_text())["status"] == "running"
    with RunDir(folder).lock():
        assert '<span class="state">running</span>' in report(folder, None)


@pytest.mark.fault(38)
def test_a_report_that_cannot_be_written_is_an_error_of_one_line(tmp_path, write_run, capsys):
    """A folder lies where the file should; the super-user too is refused that."""
    OmegaConf.save(compose_config(["model.dim=32", "model.attention.window=4"]), tmp_path / "config.yaml", resolve=True)
    (tmp_path / "report.html").mkdir()
    assert run_command(main, [f"run_dir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the report of {tmp_path} cannot be written: ")


def test_hostile_text_is_shown_and_never_interpreted(tmp_path, write_run):
    folder = write_run(tmp_path / "run", experiment_name=HOSTILE)
    for name in ("samples/step-200.txt", "overrides.txt"):
        (folder / name).write_text(HOSTILE)
    (folder / "env.json").write_text(json.dumps({HOSTILE: HOSTILE, "git": {"branch": HOSTILE}}))
    (folder / "status.json").write_text(json.dumps({"status": HOSTILE, "reason": HOSTILE}))
    result = json.loads((folder / "result.json").read_text())
    result |= {"dataset": HOSTILE, HOSTILE: HOSTILE, "data": {HOSTILE: HOSTILE}, "split": HOSTILE}
    result["baselines"][HOSTILE] = 3.0
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "eval").mkdir()
    (folder / "eval" / "<b>-step-1.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    text = report(folder)
    assert_self_contained(text)
    assert "<script" not in text and "onerror=alert(2)&gt;" in text and "\x00" not in text
    assert Page(text).tags.count("img") == 6


def test_newest_sample_is_shown_first_by_step_not_by_name(tmp_path, write_run):
    text = report(write_run(tmp_path / "run"))
    assert text.index("the newest text") < text.index("<details><summary>step-20</summary>")


def test_missing_files_leave_their_part_out_with_a_sentence(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    text = report(tmp_path, None)
    for sentence in (
        "No result yet: result.json is written by the final test",
        "metrics.jsonl holds no logged step yet.",
        "No attention patterns were given",
        "No samples yet",
        "No overrides.",
        "env.json is missing.",
    ):
        assert sentence in text
    assert_self_contained(text)
    assert "<img" not in text and "Could not be read" not in text


def test_broken_files_are_named_and_the_rest_is_shown(tmp_path, write_run):
    folder = write_run(tmp_path / "run")
    (folder / "result.json").write_text('{"bpc": 2.')
    (folder / "env.json").write_text("[1]")
    (folder / "config.yaml").write_text("model: [1, 2")
    with open(folder / "metrics.jsonl", "a") as metrics:
        metrics.write('not json\n[3]\n{"step": 31, "train/b')
    text = html.unescape(report(folder))
    for problem in (
        "result.json is not valid JSON",
        "env.json holds no JSON object",
        "config.yaml could not be read",
        "3 line(s) of metrics.jsonl could not be read and are left out",
    ):
        assert problem in text
    assert "model: [1, 2" in text and (folder / "plots" / "loss.png").exists()


def test_cap_of_the_schedule_holds_for_the_training_length(tmp_path, write_run):
    phases = [{"seq_len": 4096, "steps": 30, "lr": 1e-3}]
    folder = write_run(tmp_path / "run", schedule={"phases": phases, "cap": {"seq_len": 96}})
    text = report(folder, PATTERNS[:1])
    pairs = sum(int(pattern.mask(96).sum()) for pattern in PATTERNS[0])
    assert f"At 96 positions: {pairs:,} query-key pairs" in text


def test_after_a_resume_the_last_line_of_a_step_holds(tmp_path, write_run):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 5, "phase": 0, "train/bpc": 1.25}\n{"step": 6, "train/bpc": "nan"}\n')
    run = read_run(folder)
    steps, values = series(run.train, "train/bpc")
    assert steps.tolist() == [step for step in range(1, 31) if step != 6]
    assert values[4] == 1.25


def test_phases_span_from_the_end_of_the_one_before():
    records = [{"step": step, "phase": int(step > 20)} for step in range(10, 40, 10)]
    assert phase_spans(records) == {0: (0.0, 20.0), 1: (20.0, 30.0)}


def test_smoothing_keeps_lines_and_ends():
    line = np.arange(400.0)
    np.testing.assert_allclose(smooth(line), line)
    assert smooth(np.array([])).size == 0
    noisy = np.random.default_rng(0).normal(size=4000)
    assert smooth(noisy).std() < 0.15


def test_command_rebuilds_the_patterns_from_the_config(tmp_path, capsys):
    overrides = ["model.dim=32", "model.num_layers=2", "model.attention.window=[2,5]"]
    OmegaConf.save(compose_config(overrides), tmp_path / "config.yaml", resolve=True)
    main([f"run_dir={tmp_path}"])
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"
    text = (tmp_path / "report.html").read_text()
    assert_self_contained(text)
    assert "<h2>Attention pattern</h2>" in text and "can reach it: 7 after all layers" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run_dir= is missing; usage: python -m reports.run run_dir=DIR"),
        (["run_dir=x", "phase=1"], "phase=1 is unknown; usage: python -m reports.run run_dir=DIR"),
        (
            ["run_dir=nowhere"],
            "nowhere is no folder; give a folder that train.py made, as runs/default/latest",
        ),
    ],
)
def test_command_names_what_is_wrong(arguments, message):
    with pytest.raises(ReportError) as error:
        main(arguments)
    assert str(error.value) == message
