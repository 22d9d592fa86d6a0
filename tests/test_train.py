"""train.py end to end on a small text: the run folder, phases, accumulation, several processes."""

import json
import re
import subprocess
import sys

import pytest

from configs.compose import CONFIG_DIR, compose_config
from models.char_lm import CharLM
from tasks.char_lm import CharLMTask
from tests.command import metrics_of, phases, run_train, small_run
from tests.helpers import ROOT, run_python

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml") if "mlm" not in path.stem)


@pytest.fixture
def no_report(monkeypatch):
    """Runs end without pictures, which cost more than such a run."""
    monkeypatch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(run folder, printed text) of a run with every tracker and the report, as a user starts it."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = [word for word in small_run(folder) if not word.startswith("tracker")]
    ended = run_python("train.py", *arguments, f"run_dir={folder / 'run'}", "train.eval_every=2", "seed=5")
    assert ended.returncode == 0 and ended.stderr == "", ended
    return folder / "run", ended.stdout


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.slow
class TestRunFolder:
    def test_every_file_is_there(self, whole):
        folder, _ = whole
        for name in (
            *("config.yaml", "overrides.txt", "env.json", "status.json", "metrics.jsonl", "result.json"),
            *("eval/test-step-3.json", "samples/step-3.txt", "report.html", "wandb", "tensorboard"),
            *(f"checkpoints/step-3/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")),
        ):
            assert (folder / name).exists(), name
        assert list((folder / "plots").glob("*.png"))
        assert (folder / "checkpoints" / "latest").resolve().name == "step-3"

    def test_result_names_the_score_and_what_it_was_reached_with(self, whole):
        folder, _ = whole
        result = read(folder, "result.json")
        assert {
            *("task", "split", "step", "bpc", "num_parameters", "tokens_per_second", "peak_memory_bytes"),
            *("num_characters", "share", "context", "stride", "receptive_field", "train_seconds", "seed", "data"),
        } <= set(result)
        assert (result["task"], result["split"], result["step"], result["seed"]) == ("char_lm", "test", 3, 5)
        assert (result["context"], result["stride"], result["share"]) == (96, 64, 0.01)
        assert result["receptive_field"] == 16  # two layers of 8
        assert 0 < result["bpc"] < 9 and result["num_characters"] == 19 and result["peak_memory_bytes"] > 2**20
        assert {"gzip", "bzip2", "xz", *(f"markov_{order}" for order in range(4))} <= set(result["baselines"])
        assert {"dataset", "source", "bytes", "sha256"} <= set(result["data"])
        assert read(folder, "eval/test-step-3.json") == result

    def test_metrics_have_one_line_a_step_and_one_an_evaluation(self, whole):
        folder, _ = whole
        lines = metrics_of(folder, timed=True)
        training = [line for line in lines if "train/loss" in line]
        assert [line["step"] for line in training] == [1, 2, 3]
        for line in training:
            clock = {key for key in line if key.startswith("time/")}
            assert clock and set(line) - clock == {
                *("step", "phase", "train/loss", "train/bpc", "optim/lr", "optim/grad_norm"),
                *("progress/tokens", "perf/tokens_per_s", "perf/step_ms", "mem/peak_gib"),
            }
            assert line["phase"] == 0 and line["progress/tokens"] == line["step"] * 2 * 96
            assert line["train/bpc"] == pytest.approx(line["train/loss"] / 0.6931471805599453)
        (valid,) = (line for line in lines if "valid/bpc" in line)
        assert set(valid) == {"step", "phase", "valid/bpc", "valid/loss", "time/eval_s"} and valid["step"] == 2

    def test_folder_says_how_it_was_made_and_how_it_ended(self, whole):
        folder, _ = whole
        assert read(folder, "status.json")["status"] == "finished"
        assert "seed=5\n" in (folder / "overrides.txt").read_text()
        environment = read(folder, "env.json")
        assert environment["packages"]["torch"] and environment["command"][0] == "train.py"

    def test_summary_says_what_came_out_and_what_to_try(self, whole):
        folder, out = whole
        result = read(folder, "result.json")
        assert f"test bpc {result['bpc']:.4f}" in out and "markov_1 " in out and "sample: " in out
        assert f"python eval.py run_dir={folder}" in out and f"report {folder / 'report.html'}" in out
        assert "next:" in out and "offline" not in out and "wandb:" not in out

    def test_evaluation_in_a_process_of_its_own_repeats_the_number(self, whole):
        folder, _ = whole
        ended = run_python("eval.py", f"run_dir={folder}")
        assert ended.returncode == 0 and ended.stderr == ""
        assert f"test bpc {read(folder, 'result.json')['bpc']!r} at step 3" in ended.stdout


def test_run_without_a_folder_makes_one_under_runs(tmp_path, no_report):
    ended = run_train(*small_run(tmp_path), cwd=tmp_path)
    assert ended.code == 0
    (folder,) = (path for path in (tmp_path / "runs" / "default").iterdir() if not path.is_symlink())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d{6}_[0-9a-f]{6}", folder.name)
    assert (tmp_path / "runs" / "default" / "latest").resolve() == folder
    assert f"run folder {folder}" in ended.out


def test_phases_change_length_batch_rate_and_windows(tmp_path, no_report, monkeypatch):
    seen = []
    forward = CharLM.forward

    def spy(self, input_ids, **others):
        if self.training:
            seen.append((tuple(input_ids.shape), [pattern.window[0] for pattern in self.attention_patterns()]))
        return forward(self, input_ids, **others)

    monkeypatch.setattr(CharLM, "forward", spy)
    plan = [
        {"seq_len": 16 * 2**n, "batch_size": 8 // 2**n, "steps": 2, "lr": 1e-3 / 2**n, "attention": {"window": window}}
        for n, window in enumerate([2, [2, 4], [4, 8], 16])
    ]
    schedule = phases(*plan, {**plan[-1], "seq_len": 100, "attention": {"dilation": [1, [1, 1, 2, 2]]}})
    extra = ("train.checkpoint_every=2", "train.keep_checkpoints=5", f"run_dir={tmp_path / 'run'}")
    ended = run_train(*small_run(tmp_path), *schedule, *extra, cwd=tmp_path)
    assert ended.code == 0, ended.err
    lengths, batches = [16, 32, 64, 128, 100], [8, 4, 2, 1, 1]
    windows = [[2, 2], [2, 4], [4, 8], [16, 16], [16, 16]]
    assert seen == [((batches[phase], lengths[phase]), windows[phase]) for phase in (step // 2 for step in range(10))]
    lines = [line for line in metrics_of(tmp_path / "run") if "train/loss" in line]
    assert [line["phase"] for line in lines] == [step // 2 for step in range(10)]
    assert [line["optim/lr"] for line in lines[::2]] == [1e-3, 5e-4, 2.5e-4, 1.25e-4, 1.25e-4]
    for phase in range(5):
        state = read(tmp_path / "run", f"checkpoints/step-{2 * phase + 2}/state.json")["state"]
        assert state["phase"] == phase and state["tokens"] == lines[2 * phase + 1]["progress/tokens"]
    # dilation of the last phase: its own, over the windows of the one before
    assert read(tmp_path / "run", "result.json")["receptive_field"] == 16 + 2 * 16
    again = run_train(*small_run(tmp_path), *schedule, *extra, cwd=tmp_path)
    assert again.code == 0 and again.out.startswith("finished already: ")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_all_its_phases_on_real_text(tmp_path, no_report, data_file, monkeypatch, experiment):
    monkeypatch.setattr("tasks.char_lm.baselines", lambda train, test: {"gzip": 2.5})
    cfg = compose_config([f"experiment={experiment}"])
    dataset = cfg.task.dataset
    arguments = (f"experiment={experiment}", "size=debug", f"data.path={data_file(f'{dataset}/{dataset}_head.xz')}")
    arguments = (*arguments, "eval.share=0.001", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}")
    quiet = ("tracker.wandb.mode=disabled", "tracker.tensorboard=false", "device=cpu", "num_threads=1")
    ended = run_train(*arguments, *quiet, cwd=tmp_path)
    assert ended.code == 0, ended.err
    trained = [line["phase"] for line in metrics_of(tmp_path / "run") if "train/loss" in line]
    assert trained == [index for index in range(len(cfg.schedule.phases)) for _ in range(3)]
    assert read(tmp_path / "run", "result.json")["data"]["dataset"] == dataset


def test_accumulated_batch_gives_the_losses_of_the_whole(tmp_path, no_report):
    schedule = phases({"seq_len": 48, "batch_size": 4, "steps": 6, "lr": 1e-3})
    curves = []
    # all rows at once; three and one; one by one
    for tokens in ("null", 3 * 48, 50):
        folder = tmp_path / f"run-{tokens}"
        arguments = (*schedule, f"schedule.micro_batch_tokens={tokens}", "optim=adamw", f"run_dir={folder}")
        assert run_train(*small_run(tmp_path), *arguments, cwd=tmp_path).code == 0
        lines = [line for line in metrics_of(folder) if "train/loss" in line]
        curves.append([line["train/loss"] for line in lines] + [lines[0]["optim/grad_norm"]])
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=1e-6)


def test_standard_library_is_named_in_the_result(tmp_path, no_report, monkeypatch):
    monkeypatch.setattr("tasks.char_lm.baselines", lambda train, test: {"gzip": 2.5})
    arguments = [word for word in small_run(tmp_path) if not word.startswith("data.path")]
    ended = run_train(*arguments, "eval.share=0.0001", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert ended.code == 0, ended.err
    data = read(tmp_path / "run", "result.json")["data"]
    assert data["dataset"] == "python_source" and data["source"] == "python standard library"
    assert data["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert data["num_files"] > 100 and re.fullmatch("[0-9a-f]{64}", data["list_sha256"])


def test_seed_changes_weights_and_data(tmp_path, no_report, monkeypatch):
    rows = []
    loss = CharLMTask.loss

    def spy(self, model, batch):
        rows.append(batch)
        return loss(self, model, batch)

    monkeypatch.setattr(CharLMTask, "loss", spy)
    losses = []
    for number, seed in enumerate((1, 1, 2)):
        folder = tmp_path / f"run-{number}"
        assert run_train(*small_run(tmp_path), f"seed={seed}", f"run_dir={folder}", cwd=tmp_path).code == 0
        losses.append(metrics_of(folder)[0]["train/loss"])
    assert losses[0] == losses[1] != losses[2]
    assert rows[0].equal(rows[3]) and not rows[0].equal(rows[6])


def test_loss_that_is_not_finite_stops_the_run(tmp_path, no_report):
    schedule = phases({"seq_len": 32, "batch_size": 2, "steps": 20, "lr": 1e30})
    ended = run_train(*small_run(tmp_path), *schedule, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert ended.code == 5 and ended.err.startswith("error: loss nan, gradient norm nan at step ")
    assert "lower learning rate" in ended.err and "Traceback" not in ended.err
    assert read(tmp_path / "run", "status.json")["status"] == "failed"


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path, no_report):
    schedule = phases(
        {"seq_len": 32, "batch_size": 4, "steps": 10, "lr": 1e-2},
        {"seq_len": 64, "batch_size": 4, "steps": 10, "lr": 5e-3, "attention": {"window": [4, 12]}},
    )
    arguments = [*small_run(tmp_path), *schedule, "train.eval_every=5", "schedule.micro_batch_tokens=64"]
    run_by_two(tmp_path, "train.py", *arguments)
    (two,) = (path for path in (tmp_path / "runs" / "default").iterdir() if not path.is_symlink())
    one = tmp_path / "one"
    assert run_train(*arguments, f"run_dir={one}", cwd=tmp_path).code == 0
    assert len(metrics_of(one)) == len(metrics_of(two)) == 20 + 3 + 1
    for single, double in zip(metrics_of(one), metrics_of(two), strict=True):
        assert double == pytest.approx(single, rel=1e-5)
    scores = [read(folder, "result.json") for folder in (one, two)]
    assert scores[1]["bpc"] == pytest.approx(scores[0]["bpc"], rel=1e-5)
    assert scores[1]["num_characters"] == scores[0]["num_characters"]
    run_by_two(tmp_path, "eval.py", f"run_dir={two}")
    score = read(two, "eval/test-step-20.json")["bpc"]
    assert score == pytest.approx(scores[0]["bpc"], rel=1e-5)
    (two / "status.json").unlink()  # as if it had stopped before its last test
    again = run_train(*arguments, f"run_dir={two}", cwd=tmp_path)
    assert again.code == 0 and "step-20 is of 2 process(es), now there are 1" in again.out


def run_by_two(cwd, program, *arguments):
    """Run one of the entry points in two processes of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / program), *arguments]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
