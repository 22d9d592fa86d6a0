"""Bad input on the command line: exit code 2 and a line or two that name key, value, limit and nearest valid name.

The commands run in this process; `test_exit_codes` holds that a process of its own says the same.
"""

import pytest

from tests.command import TINY, run_train

PHASE = "seq_len:64,batch_size:2,steps:3,lr:1e-3"


UNKNOWN = [
    ("sede=1", "sede, did you mean seed?"),
    ("+sede=1", "sede, did you mean seed?"),
    ("++sede=1", "sede, did you mean seed?"),
    ("~sede", "sede, did you mean seed?"),
    ("modle.dim=3", "modle.dim, did you mean model.dim?"),
    ("modle=char_lm", "modle, did you mean model?"),
    ("window=3", "window, did you mean model.attention.window?"),
    ("batch_size=3", "batch_size, did you mean schedule.phases.0.batch_size?"),
    ("model.windw=3", "model.windw, did you mean model.attention.window?"),
    ("model.attention.windw=3", "model.attention.windw, did you mean model.attention.window?"),
    ("+model.attention.windw=3", "model.attention.windw, did you mean model.attention.window?"),
    ("+model.attention.extra={_target_:os.system}", "model.attention.extra (model.attention has: window, dilation"),
    ("task.sample_char=3", "task.sample_char, did you mean task.sample_chars?"),
    ("+task.extra={_target_:builtins.exec}", "task.extra (task has: dataset, sample_chars)"),
    ("optim.weight_deacy=0.1", "optim.weight_deacy, did you mean optim.weight_decay?"),
    ("+optim.lr=3", "optim.lr, did you mean schedule.phases.0.lr?"),
    ("+data.extra={_target_:os.system}", "data.extra (data has: path, cache_dir, workers)"),
    ("+train.foo.bar=3", "train.foo (train has: log_every, eval_every, checkpoint_every, keep_checkpoints, "),
    ("schedule.cap.windw=3", "schedule.cap.windw, did you mean schedule.cap.window?"),
    ("tracker.wandb.mod=offline", "tracker.wandb.mod, did you mean tracker.wandb.mode?"),
    ("schedule.phases.0.seq_le=64", "schedule.phases.0.seq_le, did you mean schedule.phases.0.seq_len?"),
    ("schedule.phases.x.lr=1", "schedule.phases.x.lr, did you mean schedule.phases.0.lr?"),
    (f"schedule.phases=[{{{PHASE},stpes:3}}]", "stpes in schedule.phases, did you mean steps?"),
]


@pytest.mark.parametrize(("override", "message"), UNKNOWN, ids=[override for override, _ in UNKNOWN])
def test_unknown_key_names_the_nearest(refused, override, message):
    assert refused(override).startswith(f"there is no configuration key {message}")


def test_unknown_key_without_a_near_one_lists_those_beside_it(refused):
    message = refused("+foo=1")
    assert message.startswith("there is no configuration key foo (there are: model, task, data, optim, schedule,")


OPTIONS = [
    ("experiment=enwik8_smal", "there is no experiment=enwik8_smal, did you mean enwik8_small? (there are: "),
    ("experiment=", "experiment is empty: leave it out, or choose one (there are: "),
    ("experiment=null", "experiment is null: leave it out, or choose one (there are: "),
    ("size=debg", "there is no size=debg, did you mean debug? (there are: debug)"),
    ("model=char_lmm", "there is no model=char_lmm, did you mean char_lm? (there are: big_bird, char_lm, "),
    ("model=3", "there is no model=3 (there are: big_bird, char_lm, "),
    ("model/attention=sliding_windo", "there is no model/attention=sliding_windo, did you mean sliding_window?"),
    ("task=text9", "there is no task=text9, did you mean text8? (there are: enwik8, masked_lm, python_source, text8)"),
    ("optim=adam", "there is no optim=adam, did you mean adamw? (there are: adamw, muon, roberta)"),
    ("schedule=paper_smal", "there is no schedule=paper_smal, did you mean paper_small? (there are: "),
    ("tracker=wandb", "there is no tracker=wandb (there are: default)"),
    ("modle/attention=dense", "there is no group modle/attention, did you mean model/attention?"),
    ("+size=debug", "+size=debug chooses an option of a group: write it without the sign in front, size=debug"),
]


@pytest.mark.parametrize(("override", "message"), OPTIONS, ids=[override for override, _ in OPTIONS])
def test_unknown_option_lists_those_of_its_group(refused, override, message):
    assert refused(override).startswith(message)


def test_plus_before_an_experiment_is_dropped_in_the_advice(refused):
    message = refused("+experiment=enwik8_small")
    assert message.endswith("write it without the sign in front, experiment=enwik8_small")


TYPES = [
    ("seed=abc", "seed is 'abc', it must be a whole number"),
    ("seed=1.5", "seed is 1.5, it must be a whole number"),
    ("seed=", "seed is '', it must be a whole number"),
    ("seed=null", "seed is null, it must have a value"),
    ("compile=maybe", "compile is maybe, it must be true or false"),
    ("data=3", "data is 3, it must be a group of keys such as {name: value}"),
    ("experiment_name=[1]", "experiment_name is [1], it must be a string"),
    ("data.cache_dir=", "data.cache_dir has an empty value: give one, or leave the key out"),
    ("run_dir=", "run_dir has an empty value: give one, or leave the key out"),
    ("optim.betas=0.9", "optim.betas is 0.9, it must be a list such as [1,2]"),
    ("optim.betas=[0.9,abc]", "optim.betas.1 is 'abc', it must be a number"),
    ("model.dim=abc", "model.dim is 'abc', it must be a whole number"),
    ("model.dim=", "model.dim has an empty value: give one, or leave the key out"),
    ("model.dim=3.5", "model.dim is 3.5, it must be a whole number"),
    ("model.dropout=high", "model.dropout is 'high', it must be a number"),
    ("model.dropout={_target_:os.system}", "model.dropout._target_ is not allowed: of such keys there are only "),
    ("model.checkpoint_activations=3", "model.checkpoint_activations is 3, it must be true or false"),
    ("model.attention=null", "model.attention is null, it must be a group with a _target_"),
    ("~model.attention", "model.attention has no value: give one with model.attention=…"),
    ("model.attention.window=abc", "model.attention.window is 'abc', it must be a whole number or a list"),
    ("model.attention.window=1.5", "model.attention.window is 1.5, it must be a whole number or a list"),
    ("model.attention.window=null", "model.attention.window is null, it must be a whole number or a list"),
    ("task.dataset=null", "task.dataset is null, it must be "),
    ("task.sample_chars=many", "task.sample_chars is 'many', it must be a whole number"),
    ("schedule=null", "schedule is null: leave it out, or choose one"),
    ("~schedule", "schedule.phases has no value"),
    ("schedule.phases=null", "schedule.phases is null, it must have a value"),
    ("schedule.phases=3", "schedule.phases is 3, it must be a list"),
    (f"schedule.phases=[{{{PHASE.replace('1e-3', 'abc')}}}]", "schedule.phases: lr is 'abc', it must be a number"),
    (
        f"schedule.phases=[{{{PHASE},attention:[3]}}]",
        f"schedule.phases is [{{{PHASE},attention:[3]}}], which has a list where a group of keys belongs",
    ),
    ("schedule.phases=[{seq_len:64,batch_size:2,steps:3}]", "schedule.phases.0.lr has no value"),
    ("schedule.phases.0.attention=3", "schedule.phases.0.attention is 3, it must be a group of keys"),
    ("schedule.phases.5.lr=1", "there is no schedule.phases.5.lr: schedule.phases has 1 entries, numbered from 0"),
    ("data.path=${oc.env:NO_SUCH}", "data.path: KeyError raised while resolving interpolation"),
    ("model.dim=${width}", "model.dim: Interpolation key 'width' not found"),
]


@pytest.mark.parametrize(("override", "message"), TYPES, ids=[override for override, _ in TYPES])
def test_wrong_type_names_the_value_and_what_it_must_be(refused, override, message):
    assert refused(*TINY, override).startswith(message)


SYNTAX = [
    ("model.attention.window=[1,2", "model.attention.window is [1,2, which cannot be read: close every bracket"),
    ("model.attention={window:1", "model.attention is {window:1, which cannot be read: close every bracket"),
    ("model.dim=(3", "model.dim is (3, which cannot be read: close every bracket"),
    ("dim", "'dim' is no override: they are key=value, and `--help` lists the keys"),
    ("=3", "'=3' names no key: overrides are key=value"),
    ("seed=1,2", "seed has several values, 1,2: add -m to run each, or write a list as seed=[1,2]"),
    ("seed=range(3)", "seed has several values, range(3): add -m to run each"),
    ("--seed=1", "there is no option --seed: settings are written without dashes, as in seed=1"),
    ("--multi-run", "there is no option --multi-run, did you mean --multirun?"),
]


@pytest.mark.parametrize(("override", "message"), SYNTAX, ids=[override for override, _ in SYNTAX])
def test_what_cannot_be_read_comes_with_the_way_to_write_it(refused, override, message):
    assert refused(override).startswith(message)


def test_the_fault_is_found_among_sound_overrides(refused):
    arguments = ("experiment=enwik8_small", "size=debug", "seed=3", "optim.weight_deacy=1", "data.workers=0")
    message = refused(*arguments)
    assert message == "there is no configuration key optim.weight_deacy, did you mean optim.weight_decay?"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (("seed=1,abc",), "seed is 'abc', it must be a whole number"),
        (("seed=1,2", "sede=3"), "there is no configuration key sede, did you mean seed?"),
        (("experiment=enwik8_small,enwik8_smal",), "there is no experiment=enwik8_smal, did you mean enwik8_small?"),
    ],
)
def test_sweep_with_an_impossible_job_starts_none(tmp_path, sweep, message):
    ended = run_train("-m", *sweep, cwd=tmp_path, job=lambda cfg: pytest.fail("a job ran"))
    assert ended.code == 2 and ended.err.startswith(f"error: {message}") and "Traceback" not in ended.err
