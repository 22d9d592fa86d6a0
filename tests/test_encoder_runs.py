"""Encoders from the command line: trained, resumed, scored, asked, handed on to transformers and back."""

import json
import math
import shutil

import pytest
import torch

import predict
from configs.compose import compose_config
from models.pretrained import load_pretrained
from models.tokenizer import load_tokenizer
from tests.command import Finished, metrics_of, phases, run_eval, run_train
from tests.command import _run as run
from tests.corpus import write_corpus, write_tokenizer
from tests.helpers import run_python

QUIET = ("tracker.wandb.mode=disabled", "tracker.tensorboard=false", "device=cpu", "precision=fp32")
SMALL = ("model.config.hidden_size=16", "model.config.intermediate_size=24", "model.config.vocab_size=330")
STEPS = {"seq_len": 32, "batch_size": 4, "steps": 6, "lr": 3e-3}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Overrides that name a corpus and its cache, and the folder of its tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = write_tokenizer(folder)
    data = [f"data.path={write_corpus(folder)}", f"data.cache_dir={folder / 'cache'}", "task.holdout=0.1"]
    return data, tokenizer


def small(given, *more, steps=STEPS) -> list[str]:
    data, tokenizer = given
    shape = (*SMALL, *phases(steps), "eval.context=32", "train.log_every=1")
    return ["experiment=mlm_cpu", *data, f"task.tokenizer={tokenizer}", *shape, *QUIET, *more]


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    """The folder of a run that has ended, and how it did."""
    folder = tmp_path_factory.mktemp("runs")
    return folder / "run", run_train(*small(given, f"run_dir={folder / 'run'}"), cwd=folder)


def run_predict(*arguments, cwd) -> Finished:
    return run("predict", predict.main, arguments, cwd)


def test_a_run_ends_with_its_score_and_a_folder(finished):
    path, ended = finished
    assert ended.code == 0, ended.err
    result = json.loads((path / "result.json").read_text())
    assert result["task"] == "masked_lm" and result["num_tokens"] > 0
    assert result["bits_per_token"] > 0 and set(result["baselines"]) == {"unigram"}
    assert f"the model as transformers loads it: {path / 'pretrained'}" in ended.out
    assert "masked tokens" in ended.out and "<mask>" in ended.out
    page = (path / "report.html").read_text()
    assert "bits per masked token" in page and "masked tokens scored" in page
    lines = [line for line in metrics_of(path) if "train/loss" in line]
    assert len(lines) == 6 and {"train/bits_per_token", "train/accuracy"} <= set(lines[0])
    again = run_train(*compose_again(path), cwd=path.parent)
    assert again.code == 0 and again.out.startswith("finished already")


def compose_again(path):
    return [line for line in (path / "overrides.txt").read_text().splitlines() if line]


def test_transformers_loads_the_folder_with_the_same_outputs(finished, given):
    transformers = pytest.importorskip("transformers")
    path, _ = finished
    theirs = transformers.RobertaForMaskedLM.from_pretrained(path / "pretrained").eval()
    ids = torch.randint(5, 300, (2, 19))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.allclose(load_pretrained(path / "pretrained")(ids), expected, atol=1e-5)
    assert (path / "pretrained" / "vocab.json").exists()
    text = "Rome <mask> in Italy, 1 day from Wien."
    found = transformers.AutoTokenizer.from_pretrained(path / "pretrained")(text)["input_ids"]
    ours = load_tokenizer(given[1])
    assert found == [ours.cls_id, *ours.encode_prompt(text), ours.sep_id]


def test_score_of_the_folder_is_that_of_the_run(finished, given):
    path, _ = finished
    data, _ = given
    ended = run_eval(
        f"checkpoint={path / 'pretrained'}",
        "task=masked_lm",
        *data,
        "context=32",
        "device=cpu",
        "precision=fp32",
        cwd=path,
    )
    assert ended.code == 0, ended.err
    assert not (path / "pretrained" / "eval").exists()
    scores = last_score(path)
    result = json.loads((path / "result.json").read_text())
    assert scores["bits_per_token"] == pytest.approx(result["bits_per_token"], rel=1e-6)
    without = run_eval(f"checkpoint={path / 'pretrained'}", *data[:2], cwd=path)
    assert without.code == 2 and "say what it is scored in, as task=masked_lm" in without.err
    both = run_eval(f"run_dir={path}", "task=masked_lm", "task.tokenizer=x", cwd=path)
    assert both.code == 2 and "task is the run's own" in both.err
    other = run_eval(f"run_dir={path}", "precision=bf16", cwd=path)
    assert other.code == 2 and "precision is the run's own" in other.err
    short = run_eval(f"run_dir={path}", "context=2", "device=cpu", cwd=path)
    assert short.code == 2 and "error: context is 2, it must be at least 3" in short.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task=text8", "the task char_lm has no use for a published model"),
        ("task=masked_lm task.tokenizer={large}", "config.json is 330, the data needs at least"),
        ("task=masked_lm task.order=true", "task.order is true, which needs two token types, this model has 1"),
        ("task=masked_lm context=2", "context is 2, it must be at least 3"),
        ("task=masked_lm context=129", "context is 129, the position table of this model has 128 rows"),
        ("task=masked_lm precision=fp64", "precision is 'fp64', it must be one of auto, fp32, bf16"),
    ],
)
def test_what_a_folder_cannot_be_scored_in_is_said(finished, given, tmp_path, change, message):
    path, _ = finished
    large = write_tokenizer(tmp_path, vocab_size=400)
    words = change.format(large=large).split()
    ended = run_eval(f"checkpoint={path / 'pretrained'}", *words, *given[0][:2], "device=cpu", cwd=tmp_path)
    assert (ended.code, message in ended.err) == (2, True), ended.err


def test_a_folder_is_scored_in_the_longest_rows_of_model_and_data(finished, given, tmp_path):
    path, _ = finished
    data, _ = given
    command = [f"checkpoint={path / 'pretrained'}", "task=masked_lm", f"data.cache_dir={tmp_path}", "device=cpu"]
    (tmp_path / "short.jsonl").write_text("".join(f'{{"text": "Rome lies in Italy. {n}"}}\n' for n in range(9)))
    ended = run_eval(
        *command, f"data.path={tmp_path / 'short.jsonl'}", "task.holdout=0.1", "precision=bf16", cwd=tmp_path
    )
    assert ended.code == 0, ended.err
    result = last_score(tmp_path)
    assert result["context"] < 128 and result["num_rows"] == 1 and result["precision"] == "bf16"
    ended = run_eval(*command, *data[:1], "task.holdout=0.1", "precision=fp32", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert last_score(tmp_path)["context"] == 128
    longer = run_eval(
        *command, f"data.path={tmp_path / 'short.jsonl'}", "task.holdout=0.1", "context=120", cwd=tmp_path
    )
    assert longer.code == 2 and "error: context is 120, the smallest split of the data has" in longer.err


def last_score(cwd):
    """What eval.py, run in the folder `cwd`, has written of the only published folder scored there."""
    (file,) = (cwd / "runs" / "eval").glob("pretrained-*/test-step-0.json")
    return json.loads(file.read_text())


def test_the_score_of_a_folder_goes_where_it_can_be_written(finished, given, tmp_path):
    path, _ = finished
    before = sorted((path / "pretrained").iterdir())
    shutil.copytree(path / "pretrained", tmp_path / "pretrained")
    data = [*given[0], "task=masked_lm", "device=cpu", "share=0.1"]
    for folder in (path / "pretrained", tmp_path / "pretrained"):
        ended = run_eval(f"checkpoint={folder}", *data, cwd=tmp_path)
        assert ended.code == 0, ended.err
    # of one name, yet not one result
    assert len(list((tmp_path / "runs" / "eval").glob("pretrained-*/test-step-0.json"))) == 2
    for folder in (path / "pretrained", tmp_path / "pretrained"):
        ended = run_eval(f"checkpoint={folder}", *data, f"output={tmp_path / 'scores'}", cwd=tmp_path)
        assert ended.code == 0 and f"-> {tmp_path / 'scores' / 'test-step-0.json'}" in ended.out, ended.err
    assert "is kept as test-step-0,model=pretrained-" in ended.out
    assert len(list((tmp_path / "scores").iterdir())) == 2
    assert sorted((path / "pretrained").iterdir()) == before
    (tmp_path / "file").touch()
    refused = run_eval(f"checkpoint={path / 'pretrained'}", *data, "output=file", cwd=tmp_path)
    assert refused.code == 2 and "the score cannot be written to file: File exists" in refused.err
    own = run_eval(f"run_dir={path}", "output=scores", cwd=tmp_path)
    assert own.code == 2 and "output is the run's own" in own.err


@pytest.mark.parametrize("source", ["run_dir={path}", "checkpoint={path}/pretrained"])
def test_masks_are_filled_from_a_run_and_from_a_folder(finished, tmp_path, source):
    path, _ = finished
    where = source.format(path=path)
    shown = run_predict(where, "prompt=Paris is the <mask> of <mask>.", "device=cpu", cwd=tmp_path)
    assert shown.code == 0, shown.err
    assert "mask 1: " in shown.out and "mask 2: " in shown.out
    (tmp_path / "texts.jsonl").write_text('{"text": "Rome <mask>."}\n{"text": "<mask> lies in Italy."}\n')
    rows = run_predict(where, f"input={tmp_path / 'texts.jsonl'}", "output=out.jsonl", "device=cpu", cwd=tmp_path)
    assert rows.code == 0, rows.err
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in written] == ["Rome <mask>.", "<mask> lies in Italy."]
    assert all({"filled", "masks", "input"} <= set(row) for row in written)
    empty = run_predict(where, "prompt=Paris.", "device=cpu", cwd=tmp_path)
    assert empty.code == 3 and "there is nothing to fill" in empty.err


GOOD = '{"text": "Rome <mask>."}'


@pytest.mark.parametrize("source", ["run_dir={path}", "checkpoint={path}/pretrained"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "Rome."}', "texts.jsonl:2: there is nothing to fill: the text has no <mask>"),
        (json.dumps({"text": "<mask> " * 130}), "texts.jsonl:2: the text has"),
        ('{"text": 5}', "texts.jsonl:2: the line must be an object with a string in the field text"),
        ('["Rome <mask>."]', "texts.jsonl:2: the line must be an object with a string in the field text"),
        ('{"text": "Rome', "texts.jsonl:2: the line is no JSON"),
    ],
)
def test_a_text_that_cannot_be_answered_stops_the_command_before_it_writes(finished, tmp_path, source, line, message):
    path, _ = finished
    command = [source.format(path=path), f"input={tmp_path / 'texts.jsonl'}", "output=out.jsonl", "device=cpu"]
    (tmp_path / "texts.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    refused = run_predict(*command, cwd=tmp_path)
    assert (refused.code, message in refused.err) == (3, True), refused.err
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "texts.jsonl").write_text(f"{GOOD}\n{GOOD}\n")
    again = run_predict(*command, cwd=tmp_path)
    assert again.code == 0, again.err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_lines_end_where_json_ends_them_and_blank_texts_are_left_out(finished, tmp_path):
    path, _ = finished
    text = "Rome\u2028lies in <mask>."
    rows = [json.dumps({"text": text}, ensure_ascii=False), "", '{"text": " \\n"}', GOOD]
    (tmp_path / "texts.jsonl").write_text("\r\n".join(rows), encoding="utf-8")
    command = [f"run_dir={path}", f"input={tmp_path / 'texts.jsonl'}", "output=out.jsonl", "device=cpu"]
    ended = run_predict(*command, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert f"left out, as there is only white space in them: {tmp_path / 'texts.jsonl'}:3" in ended.err
    written = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["text"] for line in written if line] == [text, "Rome <mask>."]
    blank = run_predict(f"run_dir={path}", "prompt='  '", "device=cpu", cwd=tmp_path)
    assert blank.code == 3 and "error: prompt: there is no text, only white space" in blank.err


def stopping(cfg):
    """train.py, interrupted after four steps."""
    import train
    from training.session import Session

    saved = Session.compute_gradients

    def compute(self, *arguments):
        if self.state["step"] == 4:
            raise KeyboardInterrupt
        return saved(self, *arguments)

    Session.compute_gradients = compute
    try:
        train.main(cfg)
    finally:
        Session.compute_gradients = saved


def test_a_stopped_run_goes_on_to_the_same_numbers(given, tmp_path):
    extra = ("train.checkpoint_every=2", "model.config.hidden_dropout_prob=0.1")
    whole = run_train(*small(given, *extra, f"run_dir={tmp_path / 'whole'}"), cwd=tmp_path)
    assert whole.code == 0, whole.err
    cut = run_train(*small(given, *extra, f"run_dir={tmp_path / 'cut'}"), cwd=tmp_path, job=stopping)
    assert cut.code == 130
    resumed = run_train(*small(given, *extra, f"run_dir={tmp_path / 'cut'}"), cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")


def test_on_from_a_converted_folder(finished, given, tmp_path):
    from models.convert import convert

    path, _ = finished
    data, _ = given
    convert(path / "pretrained", tmp_path / "long", to="longformer", max_positions=512, window=16)
    shape = (*phases({**STEPS, "seq_len": 128}), "eval.context=128", "eval.valid_share=1", "train.eval_every=3")
    more = ("experiment=longformer_mlm", f"model.source={tmp_path / 'long'}", *data, *shape, *QUIET)
    ended = run_train(*more, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert ended.code == 0, ended.err
    config = json.loads((tmp_path / "run" / "pretrained" / "config.json").read_text())
    assert config["model_type"] == "longformer" and config["attention_window"] == [32] * 4
    saved = compose_config(list(more)).model.config
    assert saved.model_type == "longformer" and saved.vocab_size == 330
    # only new rows of the table learn
    only = run_train(*more, "model.train=positions", "model.first_position=128", "schedule.phases.0.seq_len=256",
                     f"run_dir={tmp_path / 'only'}", cwd=tmp_path)  # fmt: skip
    assert only.code == 0, only.err
    before, after = (
        load_pretrained(tmp_path / "long").state_dict(),
        load_pretrained(tmp_path / "only/pretrained").state_dict(),
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"encoder.position.weight"}
    rows = (before["encoder.position.weight"] != after["encoder.position.weight"]).any(dim=1).nonzero().flatten()
    assert rows.min() == 130 and rows.max() <= 257
    nothing = run_train(*more, "model.train=positions", "model.first_position=128", cwd=tmp_path)
    assert nothing.code == 2 and "no phase has rows longer than 128 tokens: nothing would be trained" in nothing.err


def test_a_run_needs_its_source_at_the_start_alone(finished, given, tmp_path):
    path, _ = finished
    shutil.copytree(path / "pretrained", tmp_path / "source")
    shape = (*phases(STEPS), "eval.context=32", "train.log_every=1", "train.checkpoint_every=2")
    more = ("experiment=mlm_cpu_long", f"model.source={tmp_path / 'source'}", *given[0], *shape, *QUIET)
    whole = run_train(*more, f"run_dir={tmp_path / 'whole'}", cwd=tmp_path)
    assert whole.code == 0, whole.err
    cut = run_train(*more, f"run_dir={tmp_path / 'cut'}", cwd=tmp_path, job=stopping)
    assert cut.code == 130
    shutil.rmtree(tmp_path / "source")
    resumed = run_train(*more, f"run_dir={tmp_path / 'cut'}", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        written = [tmp_path / run / "pretrained" / name for run in ("cut", "whole")]
        assert written[0].read_bytes() == written[1].read_bytes()
    scored = run_eval(f"run_dir={tmp_path / 'cut'}", "split=valid", "device=cpu", cwd=tmp_path)
    assert scored.code == 0, scored.err
    shown = run_predict(f"run_dir={tmp_path / 'cut'}", "prompt=Rome <mask>.", "device=cpu", cwd=tmp_path)
    assert shown.code == 0 and "mask 1: " in shown.out, shown.err
    # what was never started has nothing to go on with
    new = run_train(*more, f"run_dir={tmp_path / 'new'}", cwd=tmp_path)
    assert new.code == 4 and f"{tmp_path / 'source'} is no folder" in new.err


def test_a_run_with_the_order_of_segments_ends_with_its_scores_and_a_sample(given, tmp_path):
    data, tokenizer = given
    shape = (*SMALL, "model.config.num_attention_heads=2", "model.config.num_hidden_layers=2")
    shape = (*shape, "model.config.segment_means_seq_len=64", "model.config.num_landmarks=8")
    more = (*phases({**STEPS, "seq_len": 64}), "eval.context=64", "train.log_every=1")
    ended = run_train("experiment=nystromformer_mlm", *data, f"task.tokenizer={tokenizer}", *shape, *more, *QUIET,
                      f"run_dir={tmp_path / 'run'}", cwd=tmp_path)  # fmt: skip
    assert ended.code == 0, ended.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    words = result["bits_per_token"] * math.log(2)
    assert result["order_loss"] > 0 and result["loss"] == pytest.approx(words + result["order_loss"])
    (sample,) = (tmp_path / "run" / "samples").iterdir()
    assert "<mask>" in sample.read_text() and "\n-> " in sample.read_text()
    for source in (f"run_dir={tmp_path / 'run'}", f"checkpoint={tmp_path / 'run' / 'pretrained'}"):
        shown = run_predict(source, "prompt=Rome <mask>.", "device=cpu", cwd=tmp_path)
        assert shown.code == 0 and "mask 1: " in shown.out, shown.err
    # of a type whose own tokenizer is of another kind
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "pretrained")
    assert theirs("Rome", add_special_tokens=False)["input_ids"] == load_tokenizer(tokenizer).encode(["Rome"])[0]


@pytest.mark.fault(40)
@pytest.mark.fault(42)
@pytest.mark.fault(43)
@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("eval.context=200", 2, "eval.context is 200, the position table of this model has 128 rows"),
        (
            "schedule.phases.0.seq_len=129",
            2,
            "schedule.phases.0.seq_len is 129, the position table of this model has 128",
        ),
        ("model.config.vocab_size=300", 2, "model.config.vocab_size is 300, the data needs at least 320"),
        ("model.config.hidden_sizes=3", 4, "config.json has no entry hidden_sizes, did you mean hidden_size?"),
        ("data.path=/nowhere.jsonl", 3, "/nowhere.jsonl"),
        ("data.path=null", 3, "data.path is missing"),
        ("task.tokenizer=/nowhere", 4, "/nowhere is no folder with tokenizer files"),
        ("model.head=pretraining", 2, "task.order is false and model.head is 'pretraining', which do not go together: "
         "give model.head=masked_lm, or task.order=true"),
        ("task.order=true", 2, "task.order is true and model.head is 'masked_lm', which do not go together: "
         "give model.head=pretraining, or task.order=false"),
        ("task.order=true model.head=pretraining", 2, "task.order is true, which needs two token types, this model "
         "has 1"),
        ("eval.context=2", 2, "eval.context is 2, it must be at least 3"),
        ("schedule.cap.seq_len=2", 2, "schedule.cap.seq_len is 2, it must be at least 3"),
        ("schedule.phases.0.seq_len=2", 2, "schedule.phases.0.seq_len is 2, it must be at least 3"),
        ("task.order=true model.head=pretraining model.config.type_vocab_size=2 eval.context=4", 2,
         "eval.context is 4, it must be at least 5"),
        ("model.train=positions", 2, "optim.name is muon, it needs hidden weight matrices to train: give optim="),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_starts(given, tmp_path, change, code, message):
    ended = run_train(*small(given, *change.split(), f"run_dir={tmp_path / 'run'}"), cwd=tmp_path)
    assert (ended.code, message in ended.err) == (code, True), ended.err
    assert not (tmp_path / "run").exists() and "Traceback" not in ended.err


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_losses_of_one(given, tmp_path):
    alone = run_train(*small(given, f"run_dir={tmp_path / 'alone'}"), cwd=tmp_path)
    assert alone.code == 0, alone.err
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py")
    ended = run_python(*command, *small(given, f"run_dir={tmp_path / 'both'}"), OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr
    one, two = (
        [line["train/loss"] for line in metrics_of(tmp_path / name) if "train/loss" in line]
        for name in ("alone", "both")
    )
    assert two == pytest.approx(one, rel=1e-5)
