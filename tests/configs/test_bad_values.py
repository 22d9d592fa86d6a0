"""Values that no run can have: out of range, against each other, or naming code that is not ours."""

import pytest

from configs.compose import compose_config
from configs.phases import effective_phases, phase_patterns
from tests.command import TINY, run_train

PHASE = "seq_len:64,batch_size:2,steps:3,lr:1e-3"

RANGES = [
    ("model.dim=0", "model.dim is 0, it must be at least 1"),
    ("model.dim=-4", "model.dim is -4, it must be at least 1"),
    ("model.num_layers=0", "model.num_layers is 0, it must be at least 1"),
    ("model.num_heads=0", "model.num_heads is 0, it must be at least 1"),
    ("model.num_heads=5", "model.num_heads 5 does not divide model.dim 32"),
    ("model.dim=33", "model.num_heads 4 does not divide model.dim 33"),
    ("model.mlp_ratio=0", "model.mlp_ratio is 0, it must be at least 1"),
    ("model.vocab_size=0", "model.vocab_size is 0, it must be at least 1"),
    ("model.dropout=1.5", "model.dropout is 1.5, it must be at least 0 and below 1"),
    ("model.dropout=nan", "model.dropout is nan, it must be a finite number"),
    ("task.sample_chars=-1", "task.sample_chars is -1, it must be at least 0"),
    ("seed=-1", "seed is -1, it must be at least 0"),
    ("num_threads=0", "num_threads is 0, it must be at least 1"),
    ("data.workers=-1", "data.workers is -1, it must be at least 0"),
    ("optim.weight_decay=-1", "optim.weight_decay is -1.0, it must be at least 0"),
    ("optim.clip_norm=-1", "optim.clip_norm is -1.0, it must be at least 0"),
    ("optim.eps=0", "optim.eps is 0.0, it must be above 0"),
    ("optim.betas=[0.9]", "optim.betas is [0.9], it must be two numbers from 0 to below 1"),
    ("optim.betas=[[0.9],0.9]", "optim.betas is [[0.9], 0.9], it must be two numbers from 0 to below 1"),
    ("optim.betas=[0.9,1]", "optim.betas is [0.9, 1.0], it must be two numbers from 0 to below 1"),
    ("train.log_every=0", "train.log_every is 0, it must be at least 1"),
    ("train.checkpoint_every=0", "train.checkpoint_every is 0, it must be at least 1"),
    ("train.keep_checkpoints=1", "train.keep_checkpoints is 1, it must be at least 2"),
    ("eval.share=0", "eval.share is 0.0, it must be above 0 and at most 1"),
    ("eval.valid_share=1.5", "eval.valid_share is 1.5, it must be above 0 and at most 1"),
    ("eval.context=1", "eval.context is 1, it must be at least 2"),
    ("eval.stride=100000", "eval.stride is 100000, it must be at most eval.context ("),
    ("eval.batch_tokens=0", "eval.batch_tokens is 0, it must be at least 1"),
    ("schedule.micro_batch_tokens=0", "schedule.micro_batch_tokens is 0, it must be at least 1"),
    ("schedule.cap.steps=0", "schedule.cap.steps is 0, it must be at least 1"),
    ("schedule.cap.window=-1", "schedule.cap.window is -1, it must be at least 0"),
    ("schedule.phases=[]", "schedule.phases is empty, a run needs at least one phase"),
    ("schedule.phases.0.seq_len=0", "schedule.phases.0.seq_len is 0, it must be at least 1"),
    ("schedule.phases.0.batch_size=0", "schedule.phases.0.batch_size is 0, it must be at least 1"),
    ("schedule.phases.0.steps=0", "schedule.phases.0.steps is 0, it must be at least 1"),
    ("schedule.phases.0.lr=-1", "schedule.phases.0.lr is -1.0, it must be at least 0"),
    ("schedule.phases.0.lr=inf", "schedule.phases.0.lr is inf, it must be a finite number"),
    ("schedule.phases.0.final_lr_ratio=2", "schedule.phases.0.final_lr_ratio is 2.0, it must be at most 1"),
]
WORDS = [
    ("device=gpu", "device is 'gpu', it must be one of auto, cpu, cuda"),
    ("precision=fp32x", "precision is 'fp32x', it must be one of auto, fp32, bf16, did you mean fp32?"),
    ("optim.name=adamm", "optim.name is 'adamm', it must be one of adamw, muon, did you mean adamw?"),
    ("tracker.wandb.mode=offlin", "tracker.wandb.mode is 'offlin', it must be one of offline, online, disabled,"),
    ("schedule.phases.0.decay=cosin", "schedule.phases.0.decay is 'cosin', it must be one of constant, linear, "),
    ("model.positions=rotery", "model.positions is 'rotery', it must be "),
    ("model.attention.impl=fast", "model.attention.impl is 'fast', it must be one of "),
    ("task.dataset=text9", "task.dataset is 'text9', it must be one of "),
]


@pytest.mark.parametrize(("override", "message"), RANGES + WORDS, ids=[override for override, _ in RANGES + WORDS])
def test_value_out_of_range_names_the_limit(refused, override, message):
    assert refused(*TINY, override).startswith(message)


def test_warm_up_longer_than_its_phase(refused):
    message = refused("schedule.phases.0.steps=50", "schedule.phases.0.warmup_steps=51")
    assert message == "schedule.phases.0.warmup_steps is 51, it must be at most schedule.phases.0.steps (50)"


ATTENTION = [
    ("window=-1", "layer 0: {key}.window of head 0 is -1, it must be at least 0"),
    ("window=[8,-1]", "layer 1: {key}.window of head 0 is -1, it must be at least 0"),
    ("window=[1,2,3]", "{key}.window has 3 entries, the model has 2 layers"),
    ("window=[[1,2],3]", "layer 0: {key}.window has 2 entries for 4 heads: [1, 2]"),
    ("window=[x,3]", "{key}.window of layer 0 is 'x', it must be a whole number"),
    ("dilation=0", "layer 0: {key}.dilation of head 0 is 0, it must be at least 1"),
    ("dilation=[1,[1,1,0,1]]", "layer 1: {key}.dilation of head 2 is 0, it must be at least 1"),
    ("dilation=[1,[1,1,1,1,2]]", "layer 1: {key}.dilation has 5 entries for 4 heads: [1, 1, 1, 1, 2]"),
    ("dilation=[1]", "{key}.dilation has 1 entries, the model has 2 layers"),
]


@pytest.mark.fault(28)
@pytest.mark.parametrize("key", ["model.attention", "schedule.phases.0.attention"])
@pytest.mark.parametrize(("option", "message"), ATTENTION, ids=[option for option, _ in ATTENTION])
def test_attention_no_layer_can_have(refused, key, option, message):
    assert refused(*TINY, f"{key}.{option}") == message.format(key=key)


@pytest.mark.fault(28)
@pytest.mark.parametrize("window", ["0", "7", "1000000", "[0,7]", "[1000000,[1,2,3,0]]"])
def test_windows_of_any_width_from_0_on_are_sound(window):
    cfg = compose_config([*TINY, f"model.attention.window={window}", f"schedule.phases.0.attention.window={window}"])
    assert len(phase_patterns(cfg, effective_phases(cfg))) == 1


@pytest.mark.fault(28)
@pytest.mark.parametrize("key", ["model.attention", "schedule.phases.0.attention"])
@pytest.mark.parametrize("entry", ["x", "null", "{a:1}"])
def test_window_that_is_no_number_is_refused_under_a_cap_too(refused, key, entry):
    message = refused(*TINY, "size=debug", f"{key}.window=[8,{entry}]")
    assert message.startswith(f"{key}.window of layer 1 is ") and message.endswith("it must be a whole number")


@pytest.mark.fault(28)
def test_second_phase_is_named_as_such(refused):
    phases = f"schedule.phases=[{{{PHASE}}},{{{PHASE},attention:{{window:[1,2,3]}}}}]"
    message = refused(*TINY, phases)
    assert message == "schedule.phases.1.attention.window has 3 entries, the model has 2 layers"


@pytest.mark.parametrize("value", ["os.system", "{_target_:os.system}"])
def test_attention_of_a_phase_builds_nothing(refused, value):
    message = refused(*TINY, f"schedule.phases.0.attention._target_={value}")
    assert message.startswith("schedule.phases.0.attention._target_ is not allowed: of such keys there are only task.")
    message = refused(*TINY, "schedule.phases.0.attention.window=[8,{_target_:os.system}]")
    assert message.startswith("schedule.phases.0.attention.window.1._target_ is not allowed: of such keys ")


def test_unknown_option_inside_a_phase_names_the_nearest(refused):
    expected = "unknown attention option schedule.phases.0.attention.windw, did you mean window?"
    for override in (
        "schedule.phases.0.attention.windw=3",
        "schedule.phases.0.attention={windw:3}",
        f"schedule.phases=[{{{PHASE},attention:{{windw:3}}}}]",
    ):
        assert refused(*TINY, override).startswith(expected)


TARGETS = [
    ("model._target_=os.system", "model._target_ is os.system, it must name a class under models."),
    ("model._target_=CharLM", "model._target_ is CharLM, it must name a class under models."),
    ("model._target_=null", "model._target_ is null, it must name a class under models."),
    ("~model._target_", "model._target_ is null, it must name a class under models."),
    ("model._target_=tasks.char_lm.CharLMTask", "model._target_ is tasks.char_lm.CharLMTask, it must name a class"),
    ("model._target_=models.char_lm.torch.load", "model._target_ is models.char_lm.torch.load, which is no class"),
    ("model._target_=models.char_lm.F.linear", "model._target_ is models.char_lm.F.linear, which is no class"),
    ("model._target_=models.char_lm.Callable", "model._target_ is models.char_lm.Callable, which is no class"),
    ("model._target_=models.char_lm.CharLMM", "model._target_ is models.char_lm.CharLMM, which is no class"),
    ("model._target_=models.char_lmm.CharLM", "model._target_ is models.char_lmm.CharLM, which is no class"),
    ("model.attention._target_=builtins.eval", "model.attention._target_ is builtins.eval, it must name a class"),
    ("model.attention._target_=models.char_lm.nn.Linear", "model.attention._target_ is models.char_lm.nn.Linear, "),
    ("model.attention._partial_=3", "model.attention._partial_ is 3, it must be true or false"),
    ("task._target_=subprocess.Popen", "task._target_ is subprocess.Popen, it must name a class under tasks."),
    ("task._target_=tasks.char_lm.np.load", "task._target_ is tasks.char_lm.np.load, which is no class defined"),
    ("task._target_=tasks.char_lm.load_chars", "task._target_ is tasks.char_lm.load_chars, which is no class"),
    ("model._target_=models.layers.init_weights", "model._target_ is models.layers.init_weights, which is no class"),
    ("model._target_=models.char_lm.Block", "model._target_ is models.char_lm.Block, which is no class defined"),
    ("+model._partial_=true", "there is no configuration key model._partial_"),
    ("+model._args_=[1]", "there is no configuration key model._args_"),
    ("+model.attention.causal=false", "there is no configuration key model.attention.causal"),
]


@pytest.mark.parametrize(("override", "message"), TARGETS, ids=[override for override, _ in TARGETS])
def test_only_classes_of_ours_are_built(refused, override, message):
    assert refused(*TINY, override).startswith(message)


def test_misspelt_class_names_the_nearest(refused):
    message = refused("task._target_=tasks.char_lm.CharLMTaks")
    assert message.endswith("no class defined under tasks., did you mean tasks.char_lm.CharLMTask?")


def test_phase_longer_than_the_data(tmp_path):
    text, folder = tmp_path / "short.txt", tmp_path / "run"
    text.write_text("to be or not to be " * 20)
    arguments = (*TINY, f"data.path={text}", f"run_dir={folder}", "schedule.phases.0.seq_len=400")
    ended = run_train(*arguments, cwd=tmp_path)
    assert ended.code == 2 and "Traceback" not in ended.err
    limit = int(0.9 * text.stat().st_size) - 1
    assert f"schedule.phases.0.seq_len is 400, the training split allows at most {limit}" in ended.err
    assert not folder.exists()
