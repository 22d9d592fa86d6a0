"""Published architectures: their configuration as arguments of ours, their tensors' names as ours.

Facts: models/{bert,roberta,longformer,big_bird,nystromformer} of huggingface/transformers.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from models.attention.block_sparse import BlockSparseAttention
from models.attention.dense import DenseAttention
from models.attention.nystrom import NystromAttention
from models.attention.sliding_window import SlidingWindowAttention
from models.errors import PretrainedError

ACTIVATION_NAMES = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
                    "silu": "silu", "swish": "silu"}  # fmt: skip
# name of the encoder in a model with a head
PREFIXES = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "longformer": "longformer",
            "big_bird": "bert", "nystromformer": "nystromformer"}  # fmt: skip
ROBERTA_LIKE = ("roberta", "xlm-roberta", "longformer")
# those of theirs that hold what follows from the configuration
DERIVED = ("embeddings.position_ids", "embeddings.token_type_ids")
# entries of config.json that are read here, beside those that a file has
ENTRIES = (
    "attention_dilation", "attention_mode", "attention_probs_dropout_prob", "attention_type", "attention_window",
    "block_size", "bos_token_id", "classifier_dropout", "conv_kernel_size", "eos_token_id", "hidden_act",
    "hidden_dropout_prob", "hidden_size", "id2label", "intermediate_size", "label2id", "layer_norm_eps",
    "max_global_tokens", "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers",
    "num_labels", "num_landmarks", "num_random_blocks", "pad_token_id", "rescale_embeddings", "segment_means_seq_len",
    "sep_token_id", "type_vocab_size", "use_bias", "vocab_size",
)  # fmt: skip
# of those, the ones that are counts, with their least, and the ones that are any numbers
WHOLE_ENTRIES = {
    "block_size": 1, "conv_kernel_size": 1, "hidden_size": 1, "intermediate_size": 1, "max_global_tokens": 1,
    "max_position_embeddings": 1, "num_attention_heads": 1, "num_hidden_layers": 1, "num_landmarks": 1,
    "num_random_blocks": 0, "pad_token_id": 0, "segment_means_seq_len": 1, "type_vocab_size": 0, "vocab_size": 1,
}  # fmt: skip
REAL_ENTRIES = ("attention_probs_dropout_prob", "hidden_dropout_prob", "layer_norm_eps")
# allenai/longformer, longformer/longformer.py: ways of computing what the published model, "longformer", computes
WINDOW_MODES = ("tvm", "sliding_chunks")
AI2_ENTRIES = ("attention_mode", "attention_dilation", "autoregressive")


class Entry(NamedTuple):
    """A tensor of ours and those of theirs that it is put together from, along its first dimension."""

    ours: str
    theirs: tuple[str, ...]


def model_type(config: dict[str, Any]) -> str:
    """Which architecture a config.json is of; PretrainedError for one that is not known."""
    found = config.get("model_type")
    if not isinstance(found, str) or found not in PREFIXES:
        raise PretrainedError(f"model_type is {found!r}, known are {', '.join(sorted(PREFIXES))}")
    return found


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with that of AI2's own Longformer turned into a published one, others as they are.

    AI2's is a RoBERTa's with `attention_window` (keys on one side), `attention_dilation` and `attention_mode`. With the
    first alone it is of AI2's notebook that lengthens a RoBERTa by transformers' attention: on both sides.
    """
    mode = config.get("attention_mode")
    by_name = config.get("model_type") in (None, "roberta") and "attention_window" in config
    if not by_name and mode in (None, "longformer"):
        return config
    named = {**config, "model_type": "longformer", "attention_mode": "longformer" if mode in WINDOW_MODES else mode}
    windows = config.get("attention_window")
    if windows is not None and any(name in config for name in AI2_ENTRIES):
        if isinstance(windows, list):
            named["attention_window"] = [2 * one if _whole(one) else one for one in windows]
        elif _whole(windows):
            named["attention_window"] = 2 * windows
    return named


def check_entries(config: dict[str, Any], where: object) -> None:
    """PretrainedError for an entry of a config.json, at `where`, whose value is of a wrong kind."""
    optional = {"conv_kernel_size"} | ({"pad_token_id"} if model_type(config) not in ROBERTA_LIKE else set())
    for name, least in WHOLE_ENTRIES.items():
        value = config.get(name, least)
        if not (_whole(value) and value >= least) and not (value is None and name in optional):
            raise PretrainedError(f"{where}: {name} is {value!r}, it must be a whole number of at least {least}")
    for name in REAL_ENTRIES:
        value = config.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise PretrainedError(f"{where}: {name} is {value!r}, it must be a number of at least 0")
    if not isinstance(config.get("hidden_act", ""), str):
        raise PretrainedError(f"{where}: hidden_act is {config['hidden_act']!r}, it must be a name")
    names, labels = config.get("architectures") or [], config.get("id2label") or {}
    if not _sequence(names) or not all(isinstance(name, str) for name in names):
        raise PretrainedError(f"{where}: architectures is {names!r}, it must be a list of names of classes")
    if not isinstance(labels, Mapping) or not all(str(number).isdecimal() for number in labels):
        raise PretrainedError(f"{where}: id2label is {labels!r}, it must name labels by their numbers, such as '0'")
    dim, num_heads = config.get("hidden_size", 0), config.get("num_attention_heads", 1)
    if dim % num_heads:
        raise PretrainedError(f"{where}: num_attention_heads is {num_heads}, which does not divide hidden_size {dim}")
    if model_type(config) == "longformer" and "attention_window" in config:
        windows, depth = config["attention_window"], config.get("num_hidden_layers", 0)
        if not _whole(windows) and not (_sequence(windows) and len(windows) == depth and all(map(_whole, windows))):
            raise PretrainedError(
                f"{where}: attention_window is {windows!r}, it must be a whole number or a list of {depth}, one a layer"
            )


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _sequence(value):
    return isinstance(value, Sequence) and not isinstance(value, str)


def refuse_unsupported(config: dict[str, Any]) -> None:
    """PretrainedError for a config.json whose model computes something else than an encoder of ours would."""
    positions = config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise PretrainedError(f"position_embedding_type is {positions!r}, the encoders here have 'absolute' ones alone")
    for name in ("is_decoder", "add_cross_attention", "autoregressive"):
        if config.get(name):
            raise PretrainedError(f"{name} is {config[name]!r}: this is a decoder, encoders alone are loaded here")
    if (config.get("attention_mode") or "longformer") != "longformer":
        raise PretrainedError(
            f"attention_mode is {config['attention_mode']!r}, which sees other keys than a sliding window: to compute "
            "that with these weights, load with attention_mode='longformer'"
        )


def refuse_unknown_entries(given: Iterable[str], config: dict[str, Any]) -> None:
    """PretrainedError for an entry that is neither in a config.json nor read here, with the nearest that is."""
    known = sorted({*config, *ENTRIES})
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {nearest[0]}?" if nearest else f"; known are {', '.join(known)}"
            raise PretrainedError(f"config.json has no entry {name}{hint}")


def encoder_options(config: dict[str, Any], compat: str | None) -> dict[str, Any]:
    """Arguments of `Encoder` for a config.json."""
    kind = model_type(config)
    offset, positions = 0, "index"
    if kind in ROBERTA_LIKE:
        offset, positions = config["pad_token_id"] + 1, "counted"
    rows = config["max_position_embeddings"]
    if kind == "nystromformer":
        offset, rows = 2, rows + 2
    scale = config["hidden_size"] ** 0.5 if config.get("rescale_embeddings") else 1.0
    return {
        "attention": _attention(kind, config, compat),
        "vocab_size": config["vocab_size"],
        "max_positions": rows - offset,
        "dim": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "num_token_types": config["type_vocab_size"],
        "position_offset": offset,
        "positions": positions,
        "pad_id": config["pad_token_id"],
        "activation": activation_of(config),
        "norm_eps": config["layer_norm_eps"],
        "dropout": config["hidden_dropout_prob"],
        "dropout_before_norm": kind == "big_bird",
        "embedding_scale": scale,
        "max_global_tokens": config.get("max_global_tokens", 128),  # ours alone
    }


def activation_of(config: dict[str, Any]) -> str:
    """Our name of a configuration's `hidden_act`."""
    name = config["hidden_act"]
    if name not in ACTIVATION_NAMES:
        raise PretrainedError(f"hidden_act is {name!r}, known are {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def _attention(kind, config, compat):
    if kind == "longformer":
        windows = config["attention_window"]
        windows = [windows] * config["num_hidden_layers"] if isinstance(windows, int) else windows
        odd = [window for window in windows if window % 2 or window <= 0]
        if odd:
            raise PretrainedError(f"attention_window has {odd[0]}: it counts both sides and must be even, above 0")
        one_sided = [window // 2 for window in windows]
        dilation = config.get("attention_dilation") or 1
        options = {"window": one_sided, "dilation": dilation, "dropout": config["attention_probs_dropout_prob"]}
        return partial(SlidingWindowAttention, **options, bias=True, global_tokens=True)
    if kind == "big_bird" and config["attention_type"] == "block_sparse":
        return partial(
            BlockSparseAttention,
            max_positions=config["max_position_embeddings"],
            block_size=config["block_size"],
            num_random_blocks=config["num_random_blocks"],
            bias=config["use_bias"],
            compat=compat,
        )
    if kind == "nystromformer":
        num_landmarks, pinv_init = config["num_landmarks"], "original" if compat == "hf" else "exact"
        if num_landmarks == config["segment_means_seq_len"]:
            # as published: plain attention beside the convolution, whatever the length
            num_landmarks = config["max_position_embeddings"]
        taps = config["conv_kernel_size"]
        return partial(NystromAttention, num_landmarks=num_landmarks, num_taps=taps, pinv_init=pinv_init, compat=compat)
    bias = config.get("use_bias", True)
    return partial(DenseAttention, bias=bias, dropout=config["attention_probs_dropout_prob"])


def encoder_entries(config: dict[str, Any], names: set[str]) -> Iterator[Entry]:
    """The tensors of an `Encoder`, without "encoder." before ours and the prefix before theirs.

    names: those of ours that there are, as not every encoder has every tensor.
    """
    pairs: dict[str, tuple[str, ...]] = {
        "word.weight": ("embeddings.word_embeddings.weight",),
        "position.weight": ("embeddings.position_embeddings.weight",),
        "token_type.weight": ("embeddings.token_type_embeddings.weight",),
    }
    pooler = "pooler" if model_type(config) == "big_bird" else "pooler.dense"
    modules = {"norm": ("embeddings.LayerNorm",), "pooler": (pooler,)}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{layer}", f"encoder.layer.{layer}"
        own = f"{theirs}.attention.self"
        modules |= {
            f"{ours}.attention.qkv": tuple(f"{own}.{name}" for name in ("query", "key", "value")),
            f"{ours}.attention.query_global": (f"{own}.query_global",),
            f"{ours}.attention.key_value_global": (f"{own}.key_global", f"{own}.value_global"),
            f"{ours}.attention.out": (f"{theirs}.attention.output.dense",),
            f"{ours}.attention_norm": (f"{theirs}.attention.output.LayerNorm",),
            f"{ours}.mlp.up": (f"{theirs}.intermediate.dense",),
            f"{ours}.mlp.down": (f"{theirs}.output.dense",),
            f"{ours}.mlp_norm": (f"{theirs}.output.LayerNorm",),
        }
        pairs[f"{ours}.attention.conv_weight"] = (f"{own}.conv.weight",)
    for ours, theirs in modules.items():
        for part in ("weight", "bias"):
            pairs[f"{ours}.{part}"] = tuple(f"{name}.{part}" for name in theirs)
    return (Entry(ours, theirs) for ours, theirs in pairs.items() if ours in names)
