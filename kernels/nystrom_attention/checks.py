"""What Nyström attention refuses beyond what all attention functions do."""

from kernels.checks import check_choice, check_count
from kernels.nystrom_attention.inverse import INITS

COMPAT = ("hf", "original")


def check_arguments(query, key, num_landmarks, pinv_iterations, pinv_init, conv_weight, compat) -> None:
    """ValueError or NotImplementedError where they do not fit query and key [B, T, H, D]."""
    seq_len, num_heads = query.shape[1:3]
    if key.shape[2] != num_heads:
        raise NotImplementedError(
            f"nystrom_attention: {key.shape[2]} key heads for {num_heads} query heads are not implemented yet"
        )
    if key.shape[1] != seq_len:
        raise ValueError(f"query has {seq_len} tokens and key {key.shape[1]}: landmarks need one text for both")
    check_count("num_landmarks", num_landmarks, 1)
    check_count("pinv_iterations", pinv_iterations, 1)
    check_choice("pinv_init", pinv_init, INITS)
    if compat is not None:
        check_choice("compat", compat, COMPAT)
    if compat is not None and seq_len > num_landmarks and seq_len % num_landmarks:
        raise ValueError(f"compat={compat!r} needs a length that {num_landmarks} landmarks divide, got {seq_len}")
    if conv_weight is not None:
        _check_taps(conv_weight, query)


def _check_taps(conv_weight, query):
    num_heads = query.shape[2]
    if conv_weight.dim() != 2 or len(conv_weight) != num_heads or conv_weight.shape[1] % 2 == 0:
        raise ValueError(f"conv_weight must be [{num_heads}, K] (heads, taps), K odd, got {tuple(conv_weight.shape)}")
    if not conv_weight.dtype.is_floating_point:
        raise ValueError(f"conv_weight must be of a floating type, got {conv_weight.dtype}")
    if conv_weight.device != query.device:
        raise ValueError(f"conv_weight is on {conv_weight.device}, the other tensors are on {query.device}")
