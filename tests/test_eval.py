"""eval.py: repeats the number of the run, takes settings of its own, and says what it cannot score."""

import json
import pickle
import shutil

import pytest

from tests.checkpoints import Payload, flip
from tests.command import phases, run_eval, run_train, small_run
from tests.helpers import ROOT, run_python

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
    assert found["protocol"] == "streaming"
    how = f"share 0.2, num_characters {result['num_characters']}, protocol streaming"
    assert f"test bpc {result['bpc']!r} at step 6 ({how}) -> {run}/eval/test-step-6.json" in ended.out


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
        ended = run_eval(f"run_dir={run}", *settings, "protocol=windowed", "batch_tokens=1000", cwd=tmp_path)
        assert ended.code == 0, ended.err
        found = evaluated(run)
        assert [f"context={found['context']}", f"stride={found['stride']}"] == list(settings)
        scores.append(found["bpc"])
    assert scores[1:] == pytest.approx([scores[0]] * 2, rel=1e-6)


@pytest.mark.parametrize("protocol", ["auto", "streaming", "windowed", "uncut"])
def test_every_protocol_gives_the_same_number_for_a_model_that_sees_no_further(run, tmp_path, protocol):
    ended = run_eval(f"run_dir={run}", f"protocol={protocol}", cwd=tmp_path)
    assert ended.code == 0, ended.err
    used = "streaming" if protocol == "auto" else protocol
    assert evaluated(run)["protocol"] == used and f"protocol {used})" in ended.out
    assert evaluated(run)["bpc"] == pytest.approx(result_of(run)["bpc"], rel=1e-6)
    assert ("window_cut_to" in evaluated(run)) == (protocol == "windowed")


def test_a_look_with_other_settings_leaves_the_full_score_there(copy, tmp_path):
    """The newest result has the plain name, one of other settings a name that says them."""
    shutil.rmtree(copy / "eval")
    quick = ("share=0.01", "protocol=uncut")
    assert "kept" not in run_eval(f"run_dir={copy}", cwd=tmp_path).out
    full = evaluated(copy)
    assert "kept" not in run_eval(f"run_dir={copy}", cwd=tmp_path).out  # the same settings once more
    ended = run_eval(f"run_dir={copy}", *quick, cwd=tmp_path)
    name = "test-step-6,share=0.2,protocol=streaming,context=96,stride=64,precision=fp32,device=cpu"
    said = f"{copy}/eval/test-step-6.json; what was there has other settings and is kept as {name}.json\n"
    assert ended.code == 0 and ended.out.endswith(said)
    assert evaluated(copy, name) == full and evaluated(copy)["share"] == 0.01
    again = run_eval(f"run_dir={copy}", cwd=tmp_path)
    assert "kept as test-step-6,share=0.01,protocol=uncut," in again.out and evaluated(copy) == full
    assert len(list((copy / "eval").iterdir())) == 3


def test_a_checkpoint_of_ones_choice(run, tmp_path):
    for step in (4, 6):
        ended = run_eval(f"checkpoint={run}/checkpoints/step-{step}", cwd=tmp_path)
        assert (ended.code, ended.err) == (0, "")
        assert f" at step {step} " in ended.out and f"-> {run}/eval/test-step-{step}.json" in ended.out
    assert evaluated(run)["bpc"] == result_of(run)["bpc"] != evaluated(run, "test-step-4")["bpc"]
    link = tmp_path / "0_seed=0,model.positions=rotary"
    link.symlink_to(run)
    assert run_eval(f"checkpoint={link}/checkpoints/latest", "share=0.01", cwd=tmp_path).code == 0


CONFIGURATION = [
    ([], "run_dir has no value: give the folder of a run with run_dir=DIR, or checkpoint=PATH"),
    (["{run}", "checkpoint={run}"], "run_dir and checkpoint are both given: run_dir=DIR takes the newest checkpoint"),
    (["{run}", "protocol=stream"], "protocol is 'stream', it must be one of auto, streaming, windowed, uncut"),
    (["run_dir="], "run_dir has an empty value"),
    (["{run}", "split=tset"], "split is 'tset', it must be one of train, valid, test"),
    (["{run}", "splt=test"], "there is no configuration key splt, did you mean split?"),
    (["{run}", "+model.dim=3"], "there is no configuration key model"),
    (["{run}", "share=2"], "share is 2.0, it must be above 0 and at most 1"),
    (["{run}", "stride=0"], "stride is 0, it must be at least 1"),
    (["{run}", "context=1"], "context is 1, it must be at least 2"),
    (["{run}", "context=abc"], "context is 'abc', it must be a whole number"),
    (["{run}", "stride=600", "context=512"], "stride is 600, it must be at most context (512)"),
    (["{run}", "stride=300"], "stride is 300, it must be at most context (96)"),
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


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return f"{file} has "


def flip_a_bit(folder):
    file = folder / "model.safetensors"
    flip(file, -5)
    return f"{file} is damaged: sha256 "


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to break."""
    shutil.copytree(run, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "damage",
    [pytest.param(cut_short, marks=pytest.mark.fault(5)), pytest.param(flip_a_bit, marks=pytest.mark.fault(6))],
)
def test_damaged_checkpoint(copy, tmp_path, damage):
    """The newest is told and the one before is scored; asked for by name it is refused; with no other there is none."""
    message = damage(copy / "checkpoints" / "step-6")
    told = run_python(ROOT / "eval.py", f"run_dir={copy}", "share=0.01")
    assert told.returncode == 0 and " at step 4 " in told.stdout
    assert told.stderr.startswith(message) and "step-4 is used instead" in told.stderr
    named = run_eval(f"checkpoint={copy}/checkpoints/step-6", cwd=tmp_path)
    assert named.code == 4 and "Traceback" not in named.err
    assert named.err.startswith(f"error: {message}") and f"Complete ones there: {copy}/checkpoints/step-4" in named.err
    shutil.rmtree(copy / "checkpoints" / "step-4")
    alone = run_eval(f"run_dir={copy}", cwd=tmp_path)
    assert alone.code == 4 and f"none of the 1 checkpoints in {copy}/checkpoints is sound: {message}" in alone.err


def evil_pickle(copy, marker):
    file = copy / "checkpoints" / "evil.pt"
    file.write_bytes(pickle.dumps(Payload(marker)))
    return file, f"{file} is a single file, and reading it could run code from it"


def evil_pickle_elsewhere(copy, marker):
    file = copy.parent / "pytorch_model.bin"
    file.write_bytes(pickle.dumps(Payload(marker)))
    return file, f"{file} is a single file, and reading it could run code from it"


def evil_metadata(copy, marker):
    folder = copy / "checkpoints" / "step-6"
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    return folder, f"{folder} holds .metadata, the pickle of a torch.distributed.checkpoint"


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(evil_pickle, marks=pytest.mark.fault(8)),
        pytest.param(evil_pickle_elsewhere, marks=pytest.mark.fault(8)),
        pytest.param(evil_metadata, marks=pytest.mark.fault(9)),
    ],
)
def test_a_pickle_is_refused_before_it_is_opened(copy, tmp_path, plant):
    marker = tmp_path / "marker"
    path, message = plant(copy, marker)
    ended = run_eval(f"checkpoint={path}", cwd=tmp_path)
    assert ended.code == 4 and ended.err.startswith(f"error: {message}") and "Traceback" not in ended.err
    assert not marker.exists()


@pytest.mark.fault(7)
def test_a_checkpoint_of_another_model(copy, tmp_path):
    file = copy / "config.yaml"
    file.write_text(file.read_text().replace("vocab_size: 256", "vocab_size: 300"))
    ended = run_eval(f"run_dir={copy}", cwd=tmp_path)
    assert ended.code == 4 and "Traceback" not in ended.err
    assert "embed.weight: found float32 [256, 32], expected float32 [300, 32]" in ended.err
    loose = run_python(ROOT / "eval.py", f"run_dir={copy}", "strict=false", "share=0.01")
    assert loose.returncode == 0 and "was loaded in part, left out:" in loose.stderr
    assert "embed.weight: found float32 [256, 32], expected float32 [300, 32]" in loose.stderr


def test_checkpoint_outside_a_run(copy, tmp_path):
    lone = tmp_path / "elsewhere" / "step-6"
    shutil.copytree(copy / "checkpoints" / "step-6", lone)
    ended = run_eval(f"checkpoint={lone}", cwd=tmp_path)
    assert ended.code == 2 and f"checkpoint={lone} lies in no run folder: {tmp_path} holds no config.yaml" in ended.err
    missing = run_eval(f"checkpoint={tmp_path}/none", cwd=tmp_path)
    assert (missing.code, missing.err.partition(";")[0]) == (4, f"error: no checkpoint at {tmp_path}/none")


def test_missing_data(run, tmp_path):
    ended = run_eval(f"run_dir={run}", f"data.path={tmp_path / 'moved.txt'}", cwd=tmp_path)
    assert ended.code == 3 and f"data.path={tmp_path / 'moved.txt'} does not exist" in ended.err


def test_config_that_names_foreign_code_is_not_run(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    file = copy / "config.yaml"
    file.write_text(file.read_text().replace("_target_: tasks.char_lm.CharLMTask", "_target_: os.system"))
    ended = run_eval(f"run_dir={copy}", cwd=tmp_path)
    assert (
        ended.code == 2
        and ended.err == f"error: {file}: task._target_ is os.system, it must name a class under tasks.\n"
    )
