"""What a machine lacks or has switched on: no GPU, no triton, Triton's interpreter."""

import json

import pytest

from tests.command import metrics_of, run_eval, run_train, small_run
from tests.helpers import run_python

NO_GPU = "error: device=cuda, but this machine has no usable CUDA GPU; use device=cpu or device=auto\n"


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Runs of this process end without pictures, which cost more than such a run."""
    monkeypatch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")


@pytest.mark.fault(36)
def test_gpu_that_is_not_there_is_exit_code_6_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = small_run(tmp_path)
    folder = tmp_path / "run"
    ended = run_train(*arguments, f"run_dir={folder}", "device=cuda", cwd=tmp_path)
    assert (ended.code, ended.err) == (6, NO_GPU) and not folder.exists()
    # what is not asked for by name falls back
    assert run_train(*arguments, f"run_dir={folder}", "device=auto", cwd=tmp_path).code == 0
    ended = run_eval(f"run_dir={folder}", "device=cuda", cwd=tmp_path)
    assert (ended.code, ended.err) == (6, NO_GPU)


RUN = (
    "import sys; sys.argv[0] = 'train.py'; {}; from configs.cli import entry; import train; entry('train', train.main)"
)


@pytest.mark.slow
@pytest.mark.fault(36)
def test_run_needs_no_triton(tmp_path):
    blocked = RUN.format("sys.modules['triton'] = None")
    ended = run_python("-c", blocked, *small_run(tmp_path), f"run_dir={tmp_path / 'run'}")
    assert ended.returncode == 0 and ended.stderr == "", ended
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.fault(35)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-3)])
def test_kernels_train_to_the_losses_of_the_blocked_path(tmp_path, precision, tolerance):
    """Also in bf16, though the interpreter's own bf16 products are wrong: tiles are widened before they meet."""
    arguments = [*small_run(tmp_path), f"precision={precision}", "model.num_layers=1", "eval.share=0.001"]
    lines = {}
    for impl in ("triton", "blocked"):
        folder = tmp_path / impl
        ended = run_train(*arguments, f"model.attention.impl={impl}", f"run_dir={folder}", cwd=tmp_path)
        assert ended.code == 0, ended.err
        lines[impl] = metrics_of(folder)
    assert [line["step"] for line in lines["triton"]] == [line["step"] for line in lines["blocked"]]
    for ours, theirs in zip(lines["triton"], lines["blocked"], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ((), "the kernels run on CUDA, the tensors are on the CPU: "),
        (("model.positions=relative",), "the kernels have no position_query and position_key; use impl='auto'"),
    ],
)
def test_kernels_that_cannot_run_are_refused_before_there_is_a_run(tmp_path, monkeypatch, extra, reason):
    monkeypatch.setattr("kernels.dispatch.INTERPRETED", False)
    arguments = (*small_run(tmp_path), "model.attention.impl=triton", *extra)
    ended = run_train(*arguments, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert ended.code == 2 and ended.err.startswith(f"error: model.attention.impl='triton': {reason}"), ended.err
    assert not (tmp_path / "run").exists()
