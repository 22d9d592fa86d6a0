"""What a machine lacks or has switched on: no GPU, no triton, Triton's interpreter."""

import json

import pytest

from tests.command import metrics_of, run_eval, run_train, small_run
from tests.helpers import ROOT, run_python

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
@pytest.mark.fault(35)
def test_bf16_is_the_same_under_tritons_interpreter(tmp_path):
    """The interpreter's bf16 products are wrong; nothing of a run on CPU goes through it."""
    arguments = [*small_run(tmp_path), "precision=bf16", "num_threads=1"]
    folders = tmp_path / "plain", tmp_path / "interpreted"
    for folder, switch in zip(folders, ("0", "1"), strict=True):
        ended = run_python(ROOT / "train.py", *arguments, f"run_dir={folder}", TRITON_INTERPRET=switch)
        assert ended.returncode == 0, ended.stderr
    assert metrics_of(folders[0]) == metrics_of(folders[1])
    results = [json.loads((folder / "result.json").read_text())["bpc"] for folder in folders]
    assert results[0] == results[1]


@pytest.mark.fault(35)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_kernels_that_are_asked_for_are_not_replaced(tmp_path, precision):
    arguments = (*small_run(tmp_path), f"precision={precision}", "model.attention.impl=triton")
    ended = run_train(*arguments, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert ended.code == 2 and ended.err.startswith("error: model.attention.impl is 'triton', it must be one of auto,")
    assert not (tmp_path / "run").exists()
