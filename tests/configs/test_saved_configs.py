"""Nothing runs because of what a saved configuration says: each payload would leave a marker, and none does."""

import importlib.util
import pickle
import time
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from configs.compose import compose_config
from configs.run import check_same_run, load_run, run_files
from configs.saved import MAX_BYTES, MAX_DEPTH
from configs.schema import ConfigError, build
from reports.pattern import main as pattern_main
from reports.run_folder import read_run
from tests.command import TINY, run_eval, run_train

pytestmark = pytest.mark.fault(10)

MARKER = "marker"


class Touch:
    """A pickle of it touches the marker when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@pytest.fixture(scope="module")
def sound():
    """The configuration of a tiny run."""
    return compose_config([*TINY])


@pytest.fixture
def folder(tmp_path, sound):
    """Its run folder, beside files that do harm when they are loaded."""
    run = tmp_path / "run"
    run.mkdir()
    for name, text in run_files(sound).items():
        (run / name).write_text(text)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Touch(tmp_path / MARKER)))
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "hubconf.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / MARKER)!r}).touch()\ndef evil(): pass\n"
    )
    (hub / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "hubconf.X"}}')
    return run


# what Hydra's own blocklist lets pass (the first ten) or stops
BYPASSES: dict[str, dict[str, Any]] = {
    "torch.load": {"_target_": "torch.load", "f": "{dir}/evil.pkl", "weights_only": False},
    "pandas.read_pickle": {"_target_": "pandas.read_pickle", "filepath_or_buffer": "{dir}/evil.pkl"},
    "joblib.load": {"_target_": "joblib.load", "filename": "{dir}/evil.pkl"},
    "numpy.load": {"_target_": "numpy.load", "file": "{dir}/evil.pkl", "allow_pickle": True},
    "sympy.sympify": {"_target_": "sympy.sympify", "a": "__import__('os').system('touch {dir}/marker')"},
    "torch.hub.load": {"_target_": "torch.hub.load", "repo_or_dir": "{dir}/hub", "source": "local", "model": "evil"},
    "setuptools": {"_target_": "setuptools._distutils.spawn.spawn", "cmd": ["touch", "{dir}/marker"]},
    "remote code": {
        "_target_": "transformers.AutoConfig.from_pretrained",
        "pretrained_model_name_or_path": "{dir}/hub",
        "trust_remote_code": True,
    },
    "pathlib": {
        "_target_": "pathlib.Path.write_text",
        "_args_": [{"_target_": "pathlib.Path", "_args_": ["{dir}/marker"]}, "x"],
    },
    "shutil.copyfile": {"_target_": "shutil.copyfile", "src": "{dir}/evil.pkl", "dst": "{dir}/marker"},
    "os.system": {"_target_": "os.system", "command": "touch {dir}/marker"},
    "torch.os.system": {"_target_": "torch.os.system", "command": "touch {dir}/marker"},
    "builtins.exec": {"_target_": "builtins.exec", "_args_": ["open('{dir}/marker', 'w')"]},
    "subprocess": {"_target_": "subprocess.run", "args": ["touch", "{dir}/marker"]},
}
PAYLOAD: dict[str, Any] = {"_target_": "tasks.char_lm.np.load", "file": "{dir}/evil.pkl", "allow_pickle": True}
ALIASES = {
    "models.char_lm.torch.os.system": {"command": "touch {dir}/marker"},
    "models.char_lm.torch.load": {"f": "{dir}/evil.pkl", "weights_only": False},
    "models.char_lm.torch": {},
    "models.layers.init_weights": {},
    "models.char_lm.Block": {},
    "models.char_lm.CharLM.__init__.__globals__": {},
    "models.char_lm.__loader__.load_module": {},
    "models.char_lm._position_maker": {},
    "models.char_lm.CharLM.forward": {},
    "models.char_lm..CharLM": {},
    "models.": {},
    "models": {},
    "models./tmp/evil.Evil": {},
    "models.attention.sliding_window.torch.hub.load": {"repo_or_dir": "{dir}/hub", "source": "local", "model": "evil"},
    "models.attention.sliding_window.window_attention": {},
    "tasks.char_lm.np.load": {"file": "{dir}/evil.pkl", "allow_pickle": True},
    "tasks.char_lm.load_chars": {"name": "text8"},
    "tasks.char_lm.__builtins__.exec": {"_args_": ["open('{dir}/marker', 'w')"]},
    "tasks.__path__": {},
}
PLACES = (
    *("task", "model", "model.attention", "model.dim", "model.extra", "model.attention.extra", "task.dataset"),
    *("optim", "optim.betas.0", "schedule.phases.0", "schedule.phases.0.attention", "data", "extra"),
    *("schedule.phases.0.attention.window", "tracker.wandb.tags", "resume.allow_changes", "hydra.callbacks.evil"),
)


def filled(value: Any, directory) -> Any:
    """The payload with the folder of its files put in."""
    if isinstance(value, dict):
        return {key: filled(entry, directory) for key, entry in value.items()}
    if isinstance(value, list):
        return [filled(entry, directory) for entry in value]
    return value.replace("{dir}", str(directory)) if isinstance(value, str) else value


def rewritten(folder, key, value):
    """Put a value at a dotted key of config.yaml, new or there already."""
    cfg = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))


def refusal(folder, sound):
    """The message with which both readers refuse the configuration of a folder."""
    with pytest.raises(ConfigError) as error:
        load_run(folder)
    with pytest.raises(ConfigError) as compared:
        check_same_run(folder, sound)
    assert str(compared.value) == str(error.value)
    message = str(error.value)
    assert message.startswith(f"{folder / 'config.yaml'}")
    assert not (folder.parent / MARKER).exists()
    return message.removeprefix(f"{folder / 'config.yaml'}: ")


@pytest.mark.parametrize("node", ["task", "model", "model.attention"])
@pytest.mark.parametrize("payload", BYPASSES)
def test_known_bypasses_are_refused(folder, sound, payload, node):
    rewritten(folder, node, filled(BYPASSES[payload], folder.parent))
    assert refusal(folder, sound).startswith(
        (f"{node}._target_ is {BYPASSES[payload]['_target_']}, it must name", node)
    )


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_code_is_refused_wherever_it_stands(folder, sound, place, depth):
    value = filled(PAYLOAD, folder.parent)
    for level in range(depth):
        value = [8, value] if level % 2 == 0 else {"deeper": value}
    rewritten(folder, place, value)
    message = refusal(folder, sound)
    assert place.partition(".")[0] in message and "_target_" in message or message.startswith("hydra is a section")


@pytest.mark.parametrize("node", ["task", "model", "model.attention"])
@pytest.mark.parametrize("target", ALIASES)
def test_names_in_our_modules_that_are_no_classes_of_ours_are_refused(folder, sound, target, node):
    rewritten(folder, f"{node}._target_", target)
    for key, value in filled(ALIASES[target], folder.parent).items():
        rewritten(folder, f"{node}.{key}", value)
    assert refusal(folder, sound).startswith(f"{node}._")


SPECIAL = [
    ("model._partial_", True),
    ("task._partial_", True),
    ("model._args_", [1]),
    ("model.attention._args_", ["x"]),
    ("model._convert_", "all"),
    ("model.attention._recursive_", False),
    ("model._mode_", "call"),
    ("optim._target_", "optim.AdamW"),
    ("_target_", "train.main"),
    ("schedule.phases.0.attention._partial_", True),
    ("data._target_", "models.char_lm.CharLM"),
]


@pytest.mark.parametrize(("key", "value"), SPECIAL, ids=[key for key, _ in SPECIAL])
def test_special_keys_stand_at_the_open_nodes_alone(folder, sound, key, value):
    rewritten(folder, key, value)
    allowed = "task._target_, model._target_, model.attention._target_, model.attention._partial_"
    assert refusal(folder, sound) == f"{key} is not allowed: of such keys there are only {allowed}"


LOOKUPS = [
    ("experiment_name", "${oc.env:HOME}"),
    ("data.path", "file-${oc.env:SECRET,none}.txt"),
    ("model.dim", "${oc.decode:${oc.env:WIDTH}}"),
    ("optim", "${oc.create:{name:adamw}}"),
    ("optim.betas", ["${seed}", 0.9]),
    ("task._target_", "${model._target_}"),
    ("tracker.wandb.tags", ["${evil:touch}"]),
    ("model.attention", "${hydra:runtime}"),
    ("schedule.phases.0.attention.window", "${now:%Y}"),
]


@pytest.mark.parametrize(("key", "value"), LOOKUPS, ids=[key for key, _ in LOOKUPS])
def test_nothing_is_looked_up_when_a_configuration_is_read(folder, sound, monkeypatch, key, value):
    def resolver(*arguments):
        (folder.parent / MARKER).touch()

    monkeypatch.setenv("SECRET", "hunter2")
    OmegaConf.register_new_resolver("evil", resolver)
    try:
        rewritten(folder, key, value)
        message = refusal(folder, sound)
    finally:
        OmegaConf.clear_resolver("evil")
    assert message.startswith(key) and "a saved configuration holds plain values alone" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("section", ["callbacks", "launcher", "job_logging", "searchpath"])
def test_section_of_the_launcher_is_refused(folder, sound, section):
    rewritten(folder, f"hydra.{section}", {"x": {"()": "os.system"}})
    assert refusal(folder, sound).startswith("hydra is a section of the launcher")


YAML = {
    "call": (
        "seed: !!python/object/apply:os.system ['touch {dir}/marker']",
        "the tag tag:yaml.org,2002:python/object/",
    ),
    "name": ("seed: !!python/name:os.system ''", "the tag tag:yaml.org,2002:python/name:os.system in line 1"),
    "module": ("seed: !!python/module:os ''", "the tag tag:yaml.org,2002:python/module:os in line 1"),
    "path": ("run_dir: !!python/object/apply:pathlib.Path ['/']", "the tag tag:yaml.org,2002:python/object/apply"),
    "new": ("x: 1\nseed: !!python/object/new:os.system ['x']", "python/object/new:os.system in line 2: only plain"),
    "own tag": ("seed: !evil 1", "the tag !evil in line 1"),
    "set": ("seed: !!set {a, b}", "the tag tag:yaml.org,2002:set in line 1"),
    "alias": ("a: &a [1]\nb: *a", "an anchor or alias (& or *) in line 1"),
    "documents": ("a: 1\n---\nb: 1", "a second document begins in line 2"),
    "depth": ("a: " + "[" * 3000 + "]" * 3000, f"more than {MAX_DEPTH} levels in line 1"),
    "unclosed": ("a: [1", "while parsing a flow sequence"),
    "twice": ("seed: 1\nseed: 2", "found duplicate key seed"),
    "number key": ("1: 2", "the key 1 is no name"),
    "null key": ("~: 2", "Incompatible key type 'NoneType'"),
    "long number": ("seed: " + "1" * 5000, "is no configuration that can be read: "),
    "nul": ("seed: \0", "is no configuration that can be read: "),
    "list": ("- 1", "holds a list, a configuration is keys with values"),
    "empty": ("", ": model has no value: give one with model=…"),
    "word": ("seed", "there is no value"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_beyond_plain_values_is_refused(folder, case):
    text, expected = YAML[case]
    (folder / "config.yaml").write_text(text.replace("{dir}", str(folder.parent)))
    if case == "word":
        expected = "config.yaml"
    with pytest.raises(ConfigError) as error:
        load_run(folder)
    assert expected in str(error.value) and str(folder / "config.yaml") in str(error.value)
    assert not (folder.parent / MARKER).exists()


@pytest.mark.parametrize("levels", [9, 40])
def test_yaml_that_multiplies_itself_ends_at_once(folder, sound, levels):
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 9)}]" for level in range(1, levels)]
    (folder / "config.yaml").write_text("\n".join(lines))
    started = time.perf_counter()
    assert "an anchor or alias (& or *) in line 1: write the value at each place" in refusal(folder, sound)
    assert read_run(folder).config == {}
    assert time.perf_counter() - started < 5


def test_file_too_large_names_the_limit(folder, sound):
    (folder / "config.yaml").write_text("x: " + "y" * MAX_BYTES)
    assert f"config.yaml has {MAX_BYTES + 3:,} bytes, a configuration has at most {MAX_BYTES:,}" in refusal(
        folder, sound
    )


def test_bytes_that_are_no_text_name_the_place(folder, sound):
    (folder / "config.yaml").write_bytes(b"seed: \xff")
    assert "config.yaml is no text: byte 6 is not UTF-8" in refusal(folder, sound)


def test_what_an_editor_puts_before_the_text_does_no_harm(folder, sound):
    file = folder / "config.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_run(folder) == sound


COMMANDS = {
    "eval": lambda folder: run_eval(f"run_dir={folder}", cwd=folder.parent),
    "train": lambda folder: run_train(*TINY, f"run_dir={folder}", f"data.path={folder}/config.yaml", cwd=folder.parent),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("key", "value"),
    [("task", PAYLOAD), ("hydra.callbacks.evil", PAYLOAD), ("experiment_name", "${oc.env:HOME}")],
    ids=["task", "hydra", "environment"],
)
def test_commands_refuse_with_one_line_and_leave_the_folder_alone(folder, command, key, value):
    rewritten(folder, key, filled(value, folder.parent))
    before = sorted(folder.iterdir()), (folder / "config.yaml").read_text()
    ended = COMMANDS[command](folder)
    assert ended.code == 2 and "Traceback" not in ended.err and len(ended.err.splitlines()) == 1
    assert ended.err.startswith(f"error: {folder / 'config.yaml'}: {key.partition('.')[0]}")
    assert before == (sorted(folder.iterdir()), (folder / "config.yaml").read_text())
    assert not (folder.parent / MARKER).exists()


def test_reports_refuse_to_build_and_show_the_text_as_it_stands(folder, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    rewritten(folder, "experiment_name", "${oc.env:SECRET}")
    assert read_run(folder).config["experiment_name"] == "${oc.env:SECRET}"
    with pytest.raises(ConfigError, match="a saved configuration holds plain values alone"):
        pattern_main([f"run_dir={folder}"])
    (folder / "config.yaml").write_text("seed: !!python/object/apply:os.system ['x']")
    run = read_run(folder)
    assert run.config == {} and "config.yaml could not be read" in run.problems[0] and "the tag" in run.problems[0]


def test_build_refuses_a_node_that_nobody_checked(folder):
    for where in ("model.attention.extra", "optim", "model.blocks"):
        with pytest.raises(ConfigError, match=f"^{where}._target_ is not allowed: only task, model, model.attention"):
            build({"_target_": "models.char_lm.CharLM"}, where)


@pytest.mark.parametrize(
    "payload", ["torch.load", "numpy.load", "torch.hub.load", "setuptools", "pathlib", "sympy.sympify"]
)
def test_payloads_do_harm_where_nothing_stops_them(folder, payload):
    """The tests above could not fail otherwise."""
    node = filled(BYPASSES[payload], folder.parent)
    package = node["_target_"].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package} here")
    try:
        instantiate(node)
    except Exception as error:
        assert (folder.parent / MARKER).exists(), error
    assert (folder.parent / MARKER).exists()
