"""Heads of published models: which class of transformers has which, their arguments and their tensors' names.

Two heads are ours alone, `candidates` and `retrieval`: their folders are those of the bare encoder with tensors more.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from models.architectures import ROBERTA_LIKE, Entry, activation_of, model_type
from models.encoder import Encoder
from models.errors import PretrainedError
from models.heads import (
    Candidates,
    MaskedLM,
    MultipleChoice,
    Pretraining,
    Retrieval,
    SequenceClassifier,
    SpanQA,
    TokenClassifier,
)

CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "longformer": "Longformer",
           "big_bird": "BigBird", "nystromformer": "Nystromformer"}  # fmt: skip
# how the name of a class with that head ends
ENDINGS = {"none": "Model", "masked_lm": "ForMaskedLM", "pretraining": "ForPreTraining",
           "span_qa": "ForQuestionAnswering", "sequence": "ForSequenceClassification",
           "token": "ForTokenClassification", "multiple_choice": "ForMultipleChoice"}  # fmt: skip
HEADS = (*ENDINGS, "candidates", "retrieval")
HEAD_ENTRY = "longspan_head"  # of config.json, where no class of transformers has the head
TOKEN_PREDICTION = ("masked_lm", "pretraining")
# theirs that repeat a tensor of ours, in models that predict tokens
REPEATED = {"lm_head.decoder.weight": "encoder.word.weight", "lm_head.decoder.bias": "bias",
            "cls.predictions.decoder.weight": "encoder.word.weight",
            "cls.predictions.decoder.bias": "bias"}  # fmt: skip
# heads whose class holds a pooler, used or not
ROBERTA_POOLED = ("none", "multiple_choice")
POOLED = {"bert": (*ROBERTA_POOLED, "sequence"), "nystromformer": (), **dict.fromkeys(ROBERTA_LIKE, ROBERTA_POOLED),
          "big_bird": (*ROBERTA_POOLED, "masked_lm", "sequence", "token")}  # fmt: skip


def head_of(config: dict[str, Any]) -> str:
    """The head that a config.json names, "none" where it names no class; PretrainedError for a class not known here."""
    found, names = _named_head(config), config.get("architectures")
    if found is None and names:
        known = ", ".join(HEADS)
        raise PretrainedError(f"architectures names {names[0]}, known heads are {known}: choose one with head=")
    return found or "none"


def may_hold(config: dict[str, Any], head: str) -> bool:
    """Whether tensors of a folder may be a head's, going by its config.json: two heads can have names in common."""
    found = _named_head(config)
    return found in (None, head) or {found, head} <= set(TOKEN_PREDICTION)


def _named_head(config):
    if HEAD_ENTRY in config:
        return config[HEAD_ENTRY]
    name = (config.get("architectures") or [""])[0]
    if name.endswith("LMHeadModel"):
        return None
    return next((head for head, ending in ENDINGS.items() if name.endswith(ending)), None)


def stock_head(kind: str, head: str) -> str:
    """The head whose class of transformers a folder is written for: for ours the nearest that there is."""
    if head in ("candidates", "retrieval"):
        return "none"
    return "masked_lm" if head == "pretraining" and kind not in ("bert", "big_bird") else head


def class_entries(kind: str, head: str) -> dict[str, Any]:
    """Entries of config.json that say which class and which head a folder holds."""
    stock = stock_head(kind, head)
    return {"architectures": [CLASSES[kind] + ENDINGS[stock]]} | ({} if stock == head else {HEAD_ENTRY: head})


def has_pooler(kind: str, head: str, *, in_files: bool) -> bool:
    """Whether the encoder under a head has a pooler; a bare one, or one under a head of ours, where its files do."""
    if head == "pretraining":
        return True
    stock = stock_head(kind, head)
    return stock in POOLED[kind] and (stock != "none" or in_files)


def with_labels(config: dict[str, Any], head: str) -> dict[str, Any]:
    """The config.json with names for as many labels as it says, and no other account of them."""
    names = config.get("id2label")
    number = config.get("num_labels", len(names) if names else 2)
    number = 2 if head == "span_qa" else number
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise PretrainedError(f"num_labels is {number!r}, it must be a whole number of at least 1")
    if not names or len(names) != number:
        names = {str(label): f"LABEL_{label}" for label in range(number)}
    names = {str(label): name for label, name in names.items()}
    rest = {name: value for name, value in config.items() if name != "num_labels"}
    return rest | {"id2label": names, "label2id": {name: int(label) for label, name in names.items()}}


def build_head(encoder: Encoder, head: str, config: dict[str, Any], compat: str | None) -> nn.Module:
    """The model of a config.json around its encoder; for "none" the encoder itself."""
    kind, dropout = model_type(config), config["hidden_dropout_prob"]
    own_dropout = config.get("classifier_dropout") if kind not in ("longformer", "nystromformer") else None
    label_dropout = dropout if own_dropout is None else own_dropout
    num_labels = len(config["id2label"])
    dense: dict[str, Any] = {"activation": activation_of(config), "norm_eps": config["layer_norm_eps"]}
    match head:
        case "none":
            return encoder
        case "masked_lm":
            return MaskedLM(encoder, **dense)
        case "pretraining":
            return Pretraining(encoder, **dense)
        case "token":
            return TokenClassifier(encoder, num_labels, dropout=label_dropout)
        case "span_qa" if kind == "big_bird":
            question_end = config["sep_token_id"] if compat == "hf" else None
            layer = {"hidden": config["intermediate_size"], "dropout": dropout, **dense}
            return SpanQA(encoder, question_end=question_end, **layer)
        case "span_qa":
            return SpanQA(encoder)
        case "sequence":
            activation = {"bert": None, **dict.fromkeys(ROBERTA_LIKE, "tanh")}.get(kind, dense["activation"])
            return SequenceClassifier(encoder, num_labels, activation=activation, dropout=label_dropout)
        case "multiple_choice" if kind == "nystromformer":
            return MultipleChoice(encoder, activation="relu")
        case "multiple_choice":
            return MultipleChoice(encoder, dropout=label_dropout if kind == "bert" else dropout)
        case "candidates":
            return Candidates(encoder)
        case "retrieval":
            return Retrieval(encoder, num_labels, hidden=config["intermediate_size"])
        case _:
            raise PretrainedError(f"head is {head!r}, it must be one of {', '.join(map(repr, HEADS))}")


def head_entries(config: dict[str, Any], head: str) -> Iterator[Entry]:
    """The tensors of a head beside its encoder's."""
    modules = _modules(model_type(config), head)
    for ours, theirs in modules.items():
        if ours == "bias":
            yield Entry(ours, (theirs,))
            continue
        yield Entry(f"{ours}.weight", (f"{theirs}.weight",))
        if head != "candidates":
            yield Entry(f"{ours}.bias", (f"{theirs}.bias",))


def _modules(kind, head) -> dict[str, str]:
    """Modules of ours, and the bias over the vocabulary, with their names in published files."""
    if head in TOKEN_PREDICTION:
        transform = "cls.predictions.transform"
        names = {"dense": f"{transform}.dense", "norm": f"{transform}.LayerNorm", "bias": "cls.predictions.bias"}
        if kind in ROBERTA_LIKE:
            names = {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "bias": "lm_head.bias"}
        return names if head == "masked_lm" else names | {"relationship": "cls.seq_relationship"}
    if head == "span_qa" and kind == "big_bird":
        layer = {"mlp.up": "intermediate.dense", "mlp.down": "output.dense", "norm": "output.LayerNorm"}
        return {ours: f"qa_classifier.{theirs}" for ours, theirs in {**layer, "out": "qa_outputs"}.items()}
    if head == "sequence" and kind != "bert":
        return {"dense": "classifier.dense", "out": "classifier.out_proj"}
    if head == "multiple_choice" and kind == "nystromformer":
        return {"dense": "pre_classifier", "out": "classifier"}
    if head == "retrieval":
        return {"up": "retrieval.dense", "out": "retrieval.out_proj"}
    return {"none": {}, "span_qa": {"out": "qa_outputs"}, "candidates": {"out": "candidates"}}.get(
        head, {"out": "classifier"}
    )
