"""eval.py: repeats the number of the run, takes settings of its own, and says what it cannot score."""

import json
import shutil

import pytest

from tests.command import phases, run_eval, run_train, small_run

SCHEDULE = phases(
    {"seq_len": 32, "batch_size": 4, "steps": 3, "lr": 1e-2, "attention": {"window": [4, 12]}},
    {"seq_len": 48, "batch_size": 2, "steps": 3, "lr": 5e-3, "attention": {"dilation": 2}},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: windows from its first phase, dilation from its last, neither as in the model's configuration."""
    folder = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")
        arguments = (*small_run(folder), *SCHEDULE, "eval.share=0.2", "train.checkpoint_every=4")
        assert run_train(*arguments, f"run_dir={folder / 'run'}", cwd=folder).code == 0
    return folder / "run"


def result_of(run):
    return json.loads((run / "result.json").read_text())


def evaluated(run, name="test-step-6"):
    return json.loads((run / "eval" / f"{name}.json").read_text())


def test_number_of_the_run_is_repeated_exactly(run, tmp_path):
    result = result_of(run)
    (run / "eval" / "test-step-6.json").unlink()
    ended = run_eval(f"run_dir={run}", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    found = evaluated(run)
    for key in ("task", "split", "step", "bpc", "loss", "num_characters", "share", "context", "stride"):
        assert found[key] == result[key], key
    assert found["receptive_field"] == result["receptive_field"] == 2 * (4 + 12)
    assert f"test bpc {result['bpc']!r} at step 6 -> {run}/eval/test-step-6.json" in ended.out


def test_relative_folder_and_the_link_to_the_newest_work_too(run, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(run)
    ended = run_eval("run_dir=latest", cwd=tmp_path)
    assert ended.code == 0 and f"{result_of(run)['bpc']!r}" in ended.out


def test_folder_of_a_job_of_a_sweep_works_as_it_is_printed(run, tmp_path):
    """Its name holds what Hydra would read as more overrides."""
    link = tmp_path / "0_seed=0,model.positions=rotary"
    link.symlink_to(run)
    ended = run_eval(f"run_dir={link}", "share=0.01", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize("split", ["valid", "train"])
def test_other_splits(run, tmp_path, split):
    ended = run_eval(f"run_dir={run}", f"split={split}", "share=0.01", cwd=tmp_path)
    assert ended.code == 0, ended.err
    found = evaluated(run, f"{split}-step-6")
    assert (found["split"], found["share"]) == (split, 0.01) and found["bpc"] != result_of(run)["bpc"]


def test_context_cut_to_the_receptive_field_gives_the_same_number(run, tmp_path):
    scores = []
    # a window shorter than reach and stride is the paper's own, a long one is cut
    for settings in (("context=64", "stride=32"), ("context=4096", "stride=32"), ("context=4096", "stride=512")):
        ended = run_eval(f"run_dir={run}", *settings, "batch_tokens=1000", cwd=tmp_path)
        assert ended.code == 0, ended.err
        found = evaluated(run)
        assert [f"context={found['context']}", f"stride={found['stride']}"] == list(settings)
        scores.append(found["bpc"])
    assert scores[1:] == pytest.approx([scores[0]] * 2, rel=1e-6)


CONFIGURATION = [
    ([], "run_dir has no value: give the folder of a run with run_dir=DIR"),
    (["run_dir="], "run_dir has an empty value"),
    (["{run}", "split=tset"], "split is 'tset', it must be one of train, valid, test"),
    (["{run}", "splt=test"], "there is no configuration key splt, did you mean split?"),
    (["{run}", "+model.dim=3"], "there is no configuration key model"),
    (["{run}", "share=2"], "share is 2.0, it must be above 0 and at most 1"),
    (["{run}", "stride=0"], "stride is 0, it must be at least 1"),
    (["{run}", "context=1"], "context is 1, it must be at least 2"),
    (["{run}", "context=abc"], "context is 'abc', it must be a whole number"),
    (["{run}", "stride=600", "context=512"], "stride is 600, it must be at most context (512)"),
    (["{run}", "stride=300"], "stride is 300, it must be at most context (256)"),
    (["{run}", "num_threads=0"], "num_threads is 0, it must be at least 1"),
    (["{run}", "device=gpu"], "device is 'gpu', it must be one of auto, cpu, cuda"),
    (["run_dir=no/such"], "run_dir=no/such is no run folder: it holds no config.yaml"),
]


@pytest.mark.parametrize(("arguments", "message"), CONFIGURATION, ids=[" ".join(words) for words, _ in CONFIGURATION])
def test_bad_input(run, tmp_path, arguments, message):
    ended = run_eval(*(word.format(run=f"run_dir={run}") for word in arguments), cwd=tmp_path)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert ended.err.startswith(f"error: {message}") and len(ended.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_run_without_a_checkpoint(run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("checkpoints"))
    ended = run_eval(f"run_dir={bare}", cwd=tmp_path)
    assert (ended.code, ended.err) == (4, f"error: {bare} holds no complete checkpoint yet\n")


def test_damaged_checkpoint(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    file = copy / "checkpoints" / "step-6" / "state.json"
    file.write_text(file.read_text().replace('"phase": 1', '"phase": 0'))
    ended = run_eval(f"run_dir={copy}", cwd=tmp_path)
    assert ended.code == 4 and f"{file} is damaged: sha256 " in ended.err and "Traceback" not in ended.err


def test_missing_data(run, tmp_path):
    ended = run_eval(f"run_dir={run}", f"data.path={tmp_path / 'moved.txt'}", cwd=tmp_path)
    assert ended.code == 3 and f"data.path={tmp_path / 'moved.txt'} does not exist" in ended.err


def test_config_that_names_foreign_code_is_not_run(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    file = copy / "config.yaml"
    file.write_text(file.read_text().replace("_target_: tasks.char_lm.CharLMTask", "_target_: os.system"))
    ended = run_eval(f"run_dir={copy}", cwd=tmp_path)
    assert ended.code == 2 and ended.err == "error: task._target_ is os.system, it must name a class under tasks.\n"
