"""Thirty ways to mistype an override: each is answered with the nearest valid name, before torch is imported."""

import json

import pytest

from tests.helpers import run_python

# what is typed -> what the answer must hold
TYPOS = {
    "model.windw=3": "did you mean model.attention.window?",
    "+model.windw=3": "did you mean model.attention.window?",
    "model.attention.windw=3": "did you mean model.attention.window?",
    "+model.attention.windw=3": "did you mean model.attention.window?",
    "++model.atention.window=3": "there is no configuration key model.atention, did you mean model.attention?",
    "model.num_layer=3": "did you mean model.num_layers?",
    "model.heads=3": "there is no configuration key model.heads",
    "modle.dim=3": "did you mean model.dim?",
    "trian.log_every=3": "did you mean train.log_every?",
    "+trainer.foo=1": "there is no configuration key trainer, did you mean train?",
    "train.max_step=3": "there is no configuration key train.max_step",
    "+train.chekpoint_every=3": "did you mean train.checkpoint_every?",
    "optim.weight_deacy=0.1": "did you mean optim.weight_decay?",
    "optim.lr=3": "did you mean schedule.phases.0.lr?",
    "schedule.phases.0.seq_le=64": "did you mean schedule.phases.0.seq_len?",
    "schedule.phases.3.lr=1": "schedule.phases has 1 entries, numbered from 0",
    "+task.datset=text8": "did you mean task.dataset?",
    "resume.alow_changes=[seed]": "did you mean resume.allow_changes?",
    "sede=1": "did you mean seed?",
    "+sede=1": "did you mean seed?",
    "~sede": "did you mean seed?",
    "run-dir=runs/x": "did you mean run_dir?",
    "experiment=enwik8_smal": "did you mean enwik8_small?",
    "+experiment=enwik8_small": "write it without the sign in front, experiment=enwik8_small",
    "model=char_lmm": "did you mean char_lm?",
    "model/attention=sliding_windo": "did you mean sliding_window?",
    "modle=char_lm": "did you mean model?",
    "size=debg": "did you mean debug?",
    "optim.name=adamm": "did you mean adamw?",
    "train.nonfinite=skipp": "did you mean skip?",
    "--multi-run": "did you mean --multirun?",
    "--seed=1": "settings are written without dashes, as in seed=1",
    "model.attention.window=[1,2": "close every bracket and quote",
    "seed=1,2": "add -m to run each, or write a list as seed=[1,2]",
}

SCRIPT = """
import contextlib, io, json, sys
import train
from configs.cli import entry
from hydra.core.global_hydra import GlobalHydra
answers = {}
for typed in json.loads(sys.argv[1]):
    sys.argv, said = ["train.py", typed], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            entry("train", train.main)
        except SystemExit as ended:
            answers[typed] = ended.code, said.getvalue(), [name for name in ("torch", "models") if name in sys.modules]
    GlobalHydra.instance().clear()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers():
    """Typed override -> (exit code, what is said, which heavy modules were imported by then), from one process."""
    done = run_python("-c", SCRIPT, json.dumps(list(TYPOS)))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.fault(27)
@pytest.mark.parametrize("typed", TYPOS)
def test_typo_is_answered_with_the_nearest_name_before_torch_is_imported(answers, typed):
    code, said, imported = answers[typed]
    assert code == 2 and TYPOS[typed] in said
    assert said.startswith("error: ") and len(said.splitlines()) == 1 and "Traceback" not in said
    assert imported == []
