"""Every experiment composes, is sound, and gives a model whose every phase can be set, whole and at debug size."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from configs.compose import CONFIG_DIR, compose_config
from configs.phases import build_model, effective_phases, phase_patterns
from configs.schema import ConfigError
from tests.command import TINY

EXPERIMENTS = sorted(file.stem for file in (CONFIG_DIR / "experiment").glob("*.yaml"))
ENCODERS = [name for name in EXPERIMENTS if "mlm" in name]
CHARACTERS = [name for name in EXPERIMENTS if name not in ENCODERS]
FROM_SOURCE = ("longformer_mlm", "longformer_mlm_positions", "big_bird_mlm", "mlm_cpu_long")
DEFAULT = "default"


def overrides_of(experiment, *others):
    return [*([] if experiment == DEFAULT else [f"experiment={experiment}"]), *others]


@pytest.fixture
def source(tmp_path):
    """Overrides that name the folder of a model, of which config.json is enough here."""
    node = compose_config(["experiment=mlm_cpu", "task.tokenizer=folder"]).model.config
    config = OmegaConf.to_container(node) | {"max_position_embeddings": 4098}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return [f"model.source={tmp_path}"]


@pytest.mark.parametrize("size", [None, "debug"])
@pytest.mark.parametrize("experiment", ENCODERS)
def test_every_encoder_experiment_can_be_built(experiment, size, source):
    given = source if experiment in FROM_SOURCE else ["task.tokenizer=folder"]
    cfg = compose_config([f"experiment={experiment}", *given, *([f"size={size}"] if size else [])])
    phases = effective_phases(cfg)
    with torch.device("meta"):
        model = build_model(cfg)
    assert max(cfg.eval.context, *(phase.seq_len for phase in phases)) <= model.max_positions
    assert cfg.task.tokenizer == (cfg.model.source or "folder")
    assert cfg.task.order == (cfg.model.head == "pretraining")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if experiment.endswith("positions"):
        assert trained == {"model.encoder.position.weight"}
    else:
        assert trained >= {"model.encoder.word.weight", "model.encoder.layers.0.attention.qkv.weight"}
    if size == "debug" and cfg.model.source is None:
        table = model.encoder.word.weight
        assert table.shape[1] <= 36 and sum(p.numel() for p in model.parameters()) - table.numel() < 1_000_000
        assert len(model.encoder.layers) == cfg.model.config.num_hidden_layers


@pytest.mark.parametrize("size", [None, "debug"])
@pytest.mark.parametrize("experiment", [DEFAULT, *CHARACTERS])
def test_every_phase_of_every_experiment_can_be_built(experiment, size):
    cfg = compose_config(overrides_of(experiment, *([f"size={size}"] if size else [])))
    assert cfg.experiment_name == experiment
    phases = effective_phases(cfg)
    patterns = phase_patterns(cfg, phases)
    assert len(patterns) == len(phases) == len(cfg.schedule.phases)
    assert all(len(layers) == cfg.model.num_layers for layers in patterns)
    for phase, layers in zip(phases, patterns, strict=True):
        assert 0 <= phase.warmup_steps <= phase.steps
        for layer, pattern in enumerate(layers):
            assert pattern.causal and pattern.num_heads == cfg.model.num_heads
            asked = phase.attention.get("window", cfg.model.attention.window)
            asked = asked[layer] if isinstance(asked, list) or OmegaConf.is_list(asked) else asked
            asked = list(asked) if not isinstance(asked, int) else [asked] * pattern.num_heads
            cap = cfg.schedule.cap.window
            assert list(pattern.window) == [window if cap is None else min(window, cap) for window in asked]


@pytest.mark.parametrize("experiment", [DEFAULT, *CHARACTERS])
def test_debug_size_is_a_matter_of_seconds(experiment):
    whole, debug = compose_config(overrides_of(experiment)), compose_config(overrides_of(experiment, "size=debug"))
    phases = effective_phases(debug)
    tokens = sum(phase.steps * phase.batch_size * phase.seq_len for phase in phases)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_model(debug).parameters())
    assert tokens <= 10_000 and parameters < 1_000_000 and debug.eval.share <= 0.05
    # shrunk, not replaced: the depth, the phases and the mechanism are the experiment's
    assert len(phases) == len(whole.schedule.phases)
    for key in ("num_layers", "num_heads", "positions", "attention"):
        assert debug.model[key] == whole.model[key]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_file_says_what_it_is_and_how_to_run_it(experiment):
    lines = Path(CONFIG_DIR, "experiment", f"{experiment}.yaml").read_text().splitlines()
    head = " ".join(line for line in lines[:6] if line.startswith("#"))
    assert lines[0] == "# @package _global_"
    assert f"experiment={experiment}" in head or "-m experiment=" in head


@pytest.mark.parametrize("experiment", ["enwik8_small", "enwik8_large", "text8_small"])
def test_paper_schedule_doubles_windows_and_halves_rates(experiment):
    phases = effective_phases(compose_config([f"experiment={experiment}"]))
    assert [phase.seq_len for phase in phases] == [2048, 4096, 8192, 16384, 23040]
    for before, after in zip(phases, phases[1:], strict=False):
        assert after.lr == before.lr / 2
        assert after.attention["window"] == [2 * window for window in before.attention["window"]]
        assert not after.reset_optimizer
    assert phases[0].lr == 2.5e-4
    assert phases[-1].attention["window"][-1] == 8192


def test_every_option_of_a_constructor_stands_in_the_group_file():
    """An override needs no sign in front of it, and --help shows it."""
    composed = compose_config([])
    assert set(composed.model.attention) >= {"_target_", "_partial_", "window", "dilation", "impl"}
    known = yaml.safe_load(Path(CONFIG_DIR, "model", "char_lm.yaml").read_text())
    # the message lists what the constructor takes
    with pytest.raises(ConfigError) as refused:
        compose_config(["+model.no_such_option=1"])
    listed = str(refused.value).partition("model has: ")[2].rstrip(")").split(", ")
    assert set(listed) <= {*known, "attention"}


def test_attention_of_a_phase_needs_no_sign_in_front():
    cfg = compose_config([*TINY, "schedule.phases.0.attention.window=[4,6]", "schedule.phases.0.attention.dilation=2"])
    (layers,) = phase_patterns(cfg, effective_phases(cfg))
    assert [pattern.window for pattern in layers] == [(4,) * 4, (6,) * 4]
    assert [pattern.dilation for pattern in layers] == [(2,) * 4] * 2


def test_caps_shorten_warm_up_in_proportion():
    phase = "{seq_len:64,batch_size:4,steps:100,warmup_steps:20,lr:0.1}"
    cap = "schedule.cap={steps:10,seq_len:32,batch_size:2,window:5}"
    (capped,) = effective_phases(compose_config([f"schedule.phases=[{phase}]", cap]))
    assert (capped.steps, capped.warmup_steps, capped.seq_len, capped.batch_size) == (10, 2, 32, 2)
    cfg = compose_config([*TINY, f"schedule.phases=[{phase}]", cap, "model.attention.window=[8,[3,9,3,3]]"])
    (layers,) = phase_patterns(cfg, effective_phases(cfg))
    assert [pattern.window for pattern in layers] == [(5, 5, 5, 5), (3, 5, 3, 3)]


def test_each_phase_holds_what_any_of_them_names(tmp_path):
    """So a model that went on to a later phase can be set back to an earlier one."""
    shared = "seq_len:32,batch_size:2,steps:2,lr:0.01"
    named = f"schedule.phases=[{{{shared},attention:{{window:4}}}},{{{shared},attention:{{dilation:2}}}}]"
    cfg = compose_config([named, "model.num_layers=2", "model.attention.window=[8,16]"])
    assert [phase.attention for phase in effective_phases(cfg)] == [
        {"window": 4, "dilation": 1},
        {"window": 4, "dilation": 2},
    ]


def test_phases_that_name_nothing_leave_the_model_alone():
    assert all(phase.attention == {} for phase in effective_phases(compose_config([])))
