"""Nyström attention by kernels: which pass follows which, forward and backward (arXiv 2102.03902, section 3.2).

Forward: landmarks, the landmarks' queries over all keys, the core, all queries over the landmarks' keys. Backward: the
last of these first, so that what landmarks get is complete when their tokens' gradients are written.
"""

from typing import Any, NamedTuple

import torch

from kernels.launch import Launch
from kernels.nystrom_attention.core import core, core_grad
from kernels.nystrom_attention.key_grad import softmax_key_grad
from kernels.nystrom_attention.launch import Pass, Spread, make_tables
from kernels.nystrom_attention.means import segment_means
from kernels.nystrom_attention.query_grad import softmax_query_grad
from kernels.nystrom_attention.softmax_forward import softmax_fwd


class Saved(NamedTuple):
    """What the backward pass needs beside the inputs and the result."""

    query: torch.Tensor  # [B, N, H, D] landmarks
    key: torch.Tensor  # [B, N, H, D] landmarks
    attended: torch.Tensor  # [B, N, H, D], what the landmarks' queries get from the keys
    attended_lse2: torch.Tensor  # [B, H, N]
    value: torch.Tensor  # [B, N, H, D], what a row gets for its weight on each landmark
    lse2: torch.Tensor  # [B, H, T]


def nystrom_fwd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    counted: torch.Tensor | None,
    num_landmarks: int,
    scale: float,
    options: dict[str, Any],
) -> tuple[torch.Tensor, Saved]:
    """(out [B, T, H, D], what to save) of query, key, value [B, T, H, D]; valid, counted [B, T] as in `Pass`.

    options: `iterations` and `init` of the core.
    """
    tables = make_tables(query, num_landmarks, counted, Launch(query, key, scale).accumulator)
    query_landmarks, key_landmarks = segment_means(query, tables), segment_means(key, tables)
    over_keys = Pass("keys", query_landmarks, key, value, valid, None, scale)
    attended, attended_lse2 = softmax_fwd(over_keys, query_landmarks.dtype)
    landmark_value = core(query_landmarks, key_landmarks, attended, tables.real, scale=scale, **options)
    if tables.single is not None:
        # each landmark is a token: with the tokens' own values the weights on landmarks are plain attention
        landmark_value = torch.where(tables.single[:, None, None, None], segment_means(value, tables), landmark_value)
    over_landmarks = Pass("queries", query, key_landmarks, landmark_value, tables.real, counted, scale)
    out, lse2 = softmax_fwd(over_landmarks, query.dtype)
    return out, Saved(query_landmarks, key_landmarks, attended, attended_lse2, landmark_value, lse2)


def nystrom_grad(
    out_grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    counted: torch.Tensor | None,
    out: torch.Tensor,
    saved: Saved,
    scale: float,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value [B, T, H, D]; the other arguments as `nystrom_fwd` has and gave them."""
    tables = make_tables(query, saved.key.shape[1], counted, saved.key.dtype)
    over_landmarks = Pass("queries", query, saved.key, saved.value, tables.real, counted, scale)
    key_grad, landmark_value_grad, delta = softmax_key_grad(over_landmarks, out_grad, saved.lse2, out=out)

    value_spread, core_value_grad = None, landmark_value_grad
    if tables.single is not None:
        single = tables.single[:, None, None, None]
        core_value_grad = landmark_value_grad.masked_fill(single, 0.0)
        value_spread = landmark_value_grad.masked_fill(~single, 0.0)
    grads = core_grad(saved.query, saved.key, saved.attended, tables.real, core_value_grad, scale=scale, **options)
    query_landmarks_grad, key_landmarks_grad, attended_grad = grads

    share = tables.share[..., None, None]
    spread = Spread(tables, (key_landmarks_grad + key_grad) * share, value_spread)
    over_keys = Pass("keys", saved.query, key, value, valid, None, scale)
    attended_delta = (attended_grad * saved.attended).sum(-1).transpose(1, 2).contiguous()
    key_grad, value_grad, _ = softmax_key_grad(
        over_keys, attended_grad, saved.attended_lse2, delta=attended_delta, spread=spread
    )
    query_grad = softmax_query_grad(over_keys, attended_grad, saved.attended_lse2, attended_delta)
    spread = Spread(tables, (query_landmarks_grad + query_grad) * share)
    query_grad = softmax_query_grad(over_landmarks, out_grad, saved.lse2, delta, spread)
    return query_grad, key_grad, value_grad
