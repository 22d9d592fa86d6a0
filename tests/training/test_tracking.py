"""Trackers: silent, inside the run folder, resumable, and unable to stop a run."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

import training
from training import tracking
from training.run_dir import RunDir
from training.tracking import Tracker, flatten_config

OPTIONS = {"mode": "offline", "project": "p", "entity": None, "group": "g", "tags": ["a", "b"], "init_timeout": 2}

SESSION = """
import json
import sys
import threading
from pathlib import Path
from training.tracking import Tracker
run_dir, OPTIONS = Path(sys.argv[1]), json.loads(sys.argv[2])
for step in range(2):
    tracker = Tracker(run_dir, wandb=OPTIONS, tensorboard=False, config={"seed": 1}, name="n")
    tracker.log({"train/loss": 1.0, "train/bad": float("nan")}, step)
    tracker.image("pattern", run_dir / "picture.png", step)
    tracker.text("sample", "some text", step)
    tracker.finish()
"""


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def picture(folder: Path) -> Path:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(folder / "picture.png")
    return folder / "picture.png"


def test_offline_is_silent_stays_inside_and_keeps_its_id(tmp_path):
    home, run_dir = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    run_dir.mkdir()
    picture(run_dir)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "XDG"))}
    result = subprocess.run(
        [sys.executable, "-c", SESSION, str(run_dir), json.dumps(OPTIONS)],
        cwd=Path(training.__file__).parent.parent,
        env={**kept, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert [path for path in home.rglob("*") if path.is_file()] == []
    run_id = (run_dir / "wandb_id.txt").read_text().strip()
    files = list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    assert list((run_dir / "wandb").rglob("media/images/*.png"))
    assert [line["step"] for line in metrics(run_dir)] == [0, 1]


def test_metrics_go_to_the_file_alone_when_nothing_else_is_asked(tmp_path):
    tracker = Tracker(tmp_path, wandb=None, tensorboard=False, config={}, name="n")
    tracker.log({"train/loss": 0.5}, 3)
    tracker.text("sample", "x", 3)
    tracker.finish()
    tracker.finish()
    assert metrics(tmp_path) == [{"step": 3, "train/loss": 0.5}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_disabled_wandb_leaves_no_trace(tmp_path):
    Tracker(tmp_path, wandb={**OPTIONS, "mode": "disabled"}, tensorboard=False, config={}, name="n").finish()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_numbers_pictures_and_texts(tmp_path):
    tracker = Tracker(tmp_path, wandb=None, tensorboard=True, config={}, name="n")
    tracker.log({"train/loss": 0.5, "flag": True, "name": "x"}, 1)
    tracker.image("pattern", picture(tmp_path), 1)
    tracker.text("sample", "a * b", 1)
    tracker.finish()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert tags["scalars"] == ["train/loss"]
    assert tags["images"] == ["pattern"]
    assert tags["tensors"] == ["sample/text_summary"]
    assert events.Scalars("train/loss")[0].value == 0.5


class Failing(tracking._Sink):
    """A sink that breaks at every call."""

    calls = 0

    def fail(self, *_):
        self.calls += 1
        raise RuntimeError("it broke\nbadly")

    log = text = image = rewind = finish = fail


@pytest.mark.fault(4)
@pytest.mark.parametrize("call", ["log", "text", "image", "rewind", "finish"])
def test_a_sink_that_fails_is_dropped_with_one_warning(tmp_path, caplog, call):
    tracker = Tracker(tmp_path, wandb=None, tensorboard=False, config={}, name="n")
    failing = Failing()
    tracker.log({"a": 1}, 0)
    tracker._sinks["Some service"] = failing
    arguments = {"log": ({"a": 1}, 0), "text": ("a", "b", 0), "image": ("a", tmp_path, 0), "rewind": (0,)}
    for _ in range(2):
        getattr(tracker, call)(*arguments.get(call, ()))
    tracker.log({"a": 1}, 1)
    tracker.finish()
    assert metrics(tmp_path)[-1] == {"step": 0 if call == "finish" else 1, "a": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "Some service is off for this run: RuntimeError: it broke badly"
    ]
    assert failing.calls == 2  # the call, and letting go


@pytest.mark.fault(4)
def test_a_full_disk_stops_the_file_with_one_warning(tmp_path, caplog, monkeypatch):
    tracker = Tracker(tmp_path, wandb=None, tensorboard=False, config={}, name="n")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDir, "log_metrics", fail)
    tracker.log({"a": 1}, 0)
    tracker.log({"a": 1}, 1)
    tracker.finish()
    assert [record.getMessage() for record in caplog.records] == [
        "metrics.jsonl is off for this run: OSError: [Errno 28] No space left on device"
    ]


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """What the TensorBoard page shows of a number."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("way", ["resume", "rewind"])
def test_steps_after_the_checkpoint_are_hidden_when_they_come_again(tmp_path, way):
    hook = threading.excepthook
    tracker = Tracker(tmp_path, wandb=None, tensorboard=True, config={}, name="n")
    for step in range(1, 6):
        tracker.log({"train/loss": 1.0}, step)
    if way == "rewind":
        tracker.rewind(3)
    else:
        tracker.finish()
        RunDir(tmp_path).truncate_metrics(3)
        tracker = Tracker(tmp_path, wandb=None, tensorboard=True, config={}, name="n", resume_step=3)
    tracker.log({"train/loss": 2.0}, 4)
    tracker.finish()
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    assert scalars(tmp_path, "train/loss") == expected
    assert [(line["step"], line["train/loss"]) for line in metrics(tmp_path)] == expected
    assert threading.excepthook is hook


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("module", "title"), [("wandb", "Weights & Biases"), ("torch.utils.tensorboard", "TensorBoard")]
)
def test_a_missing_package_is_one_warning(tmp_path, caplog, monkeypatch, module, title):
    import_module = tracking.importlib.import_module

    def fail(name):
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name)

    monkeypatch.setattr(tracking.importlib, "import_module", fail)
    before = dict(os.environ)
    options = OPTIONS if module == "wandb" else None
    tracker = Tracker(tmp_path, wandb=options, tensorboard=module != "wandb", config={}, name="n")
    tracker.log({"a": 1}, 0)
    tracker.finish()
    assert len(caplog.records) == 1
    assert f"{title} is off for this run: ModuleNotFoundError" in caplog.text
    assert dict(os.environ) == before


class FakeWandb:
    """Stands for the module: going online fails, offline works."""

    def __init__(self):
        self.modes, self.torn_down = [], 0
        self.errors = type("errors", (), {"Error": ConnectionError})
        self.Settings = dict

    def init(self, **options):
        self.modes.append(options["mode"])
        self.options = options
        if options["mode"] == "online":
            raise ConnectionError("no route\nto host")
        return self

    def teardown(self):
        self.torn_down += 1

    def define_metric(self, *_, **__): ...
    def log(self, *_): ...
    def finish(self): ...


@pytest.mark.fault(18)
def test_an_unreachable_server_means_offline(tmp_path, caplog, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setattr(tracking.importlib, "import_module", lambda _: fake)
    before = dict(os.environ)
    options = {**OPTIONS, "mode": "online", "init_timeout": 3}
    tracker = Tracker(tmp_path, wandb=options, tensorboard=False, config={"a": {"b": 1}}, name="n")
    tracker.log({"a": 1}, 0)
    tracker.finish()
    assert fake.modes == ["online", "offline"]
    settings = fake.options["settings"]
    assert settings["init_timeout"] == 3.0
    assert settings["finish_timeout"] == tracking.FINISH_TIMEOUT and settings["finish_timeout_raises"]
    assert fake.options["config"] == {"a.b": 1}
    assert fake.torn_down == 2
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases goes on offline: ConnectionError: no route to host"
    ]
    assert dict(os.environ) == before


def test_the_id_of_a_former_start_is_used_again(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setattr(tracking.importlib, "import_module", lambda _: fake)
    ids = []
    for _ in range(2):
        Tracker(tmp_path, wandb=OPTIONS, tensorboard=False, config={}, name="n").finish()
        ids.append(fake.options["id"])
    assert ids == [(tmp_path / "wandb_id.txt").read_text().strip()] * 2


def test_secrets_do_not_travel():
    config = {
        "tracker": {"wandb": {"api_key": "abc", "project": "p"}},
        "db_password": "x",
        "token": "y",
        "hf_token": "z",
        "password": None,
        "data": {"path": "https://me:pw@host/file", "urls": ["http://a:b@c/d"]},
        "micro_batch_tokens": 5,
        "num_global_tokens": 7,
        "mask_token": "<mask>",
        "dim": {"head": (1, 2)},
    }
    assert flatten_config(config) == {
        "tracker.wandb.api_key": "[redacted]",
        "tracker.wandb.project": "p",
        "db_password": "[redacted]",
        "token": "[redacted]",
        "hf_token": "[redacted]",
        "password": None,
        "data.path": "https://[redacted]@host/file",
        "data.urls": ["http://[redacted]@c/d"],
        "micro_batch_tokens": 5,
        "num_global_tokens": 7,
        "mask_token": "<mask>",
        "dim.head": [1, 2],
    }
