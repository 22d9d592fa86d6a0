"""The public door of Nyström attention: checks the arguments, picks the path, says once which one ran."""

from collections.abc import Sequence

import torch

from kernels import dispatch
from kernels.checks import check_shapes, check_tensors, empty_result, under_autocast
from kernels.nystrom_attention import reference, streaming
from kernels.nystrom_attention.checks import check_arguments

KERNELS = (
    "nystrom_keys_forward",
    "nystrom_keys_key_grad",
    "nystrom_keys_query_grad",
    "nystrom_queries_forward",
    "nystrom_queries_key_grad",
    "nystrom_queries_query_grad",
    "nystrom_convolve",
    "nystrom_band_grad",
)


def nystrom_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_landmarks: int,
    valid: torch.Tensor | None = None,
    pinv_iterations: int = 6,
    pinv_init: str = "exact",
    conv_weight: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    compat: str | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Nyströmformer's approximation of softmax attention (arXiv 2102.03902, section 3.2), linear in T.

    F Z (B V) + conv(V): the queries' weights on the key landmarks, the pseudo-inverse of the landmarks' own weights,
    the query landmarks' weights on the keys. Landmarks are means of segments of the text, `landmarks.py` says which.

    Args:
        query, key, value: [B, T, H, D] in one dtype. Under autocast all are cast to its dtype first, as
            scaled_dot_product_attention does. What is computed of landmarks is float32 in every case.
        num_landmarks: N, at least 1. An example with no more real tokens than that is plain softmax attention, whatever
            the length of its batch.
        valid: [B, T] bool, True = real. Other tokens are in no landmark, are no keys and no values of the convolution,
            and their rows are zeros without gradient: padding on either side changes nothing. What stands there must be
            finite, as nothing times nan or inf is nan.
        pinv_iterations: steps of the pseudo-inverse, at least 1. They are part of the model: more is another one.
        pinv_init: what the pseudo-inverse begins with: "exact" for each head of each example by itself, "original" with
            one factor for the whole batch, as released: a result then depends on the other examples.
        conv_weight: [H, K], K odd: a filter of K taps for each head that is run over `value` and added.
        scale: factor on the scores, D ** -0.5 if None.
        causal: refused.
        compat: as published code computes, for the length T that it is configured for: padding is cut into landmarks as
            well, its rows are computed, and `valid` hides keys from the query landmarks alone. "hf": no more than that
            (transformers, models/nystromformer); "original": query, key and value are zero at padding before
            (mlpen/Nystromformer, code/attention_nystrom.py).
        impl: "auto" (the kernels on a GPU that can run them, else "blocked"; logged once), "triton", "blocked" or
            "reference"; a named path never falls back.

    Returns:
        [B, T, H, D] in the dtype of `query`, or of autocast.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, `causal`, an unknown `pinv_init`, `compat` or `impl`,
            with `compat` a length that N does not divide, impl="triton" where the kernels cannot run.
        NotImplementedError: fewer key heads than query heads.
    """
    if causal:
        raise ValueError(
            "causal is True, Nyström attention has no causal form: a landmark averages a whole segment of the text, so "
            "each row would see tokens that follow it"
        )
    check_tensors(query=query, key=key, value=value)
    check_tensors(optional=True, valid=valid, conv_weight=conv_weight)
    query, key, value = under_autocast(query, key, value)
    check_shapes(query, key, value, valid)
    check_arguments(query, key, num_landmarks, pinv_iterations, pinv_init, conv_weight, compat)
    impl = dispatch.choose_path("nystrom_attention", impl, query, why_not_triton)
    if query.numel() == 0:
        return empty_result(query, key, value, *([] if conv_weight is None else [conv_weight]))
    if compat is not None and valid is not None:
        if compat == "original":
            query, key, value = (tensor.masked_fill(~valid[:, :, None, None], 0.0) for tensor in (query, key, value))
        valid = valid | ~valid.any(dim=1, keepdim=True)  # a mask that is added hides nothing where it hides all
    options = {
        "num_landmarks": num_landmarks,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "valid": valid,
        "pinv_iterations": pinv_iterations,
        "pinv_init": pinv_init,
        "conv_weight": conv_weight,
        "published": compat is not None,
    }
    if impl == "triton":
        from kernels.nystrom_attention import ops

        return ops.nystrom_attention(query, key, value, **options)
    compute = reference.nystrom_attention if impl == "reference" else streaming.nystrom_attention
    return compute(query, key, value, **options)


def why_not_triton(
    device: torch.device, *, head_dim: int, dtype: torch.dtype = torch.float32, needs: Sequence[str] = ()
) -> str | None:
    """Why the Triton kernels cannot run for tensors like these, as a clause; None where they can.

    needs: arguments beyond query, key and value; the kernels have all of them. Triton is first imported here.
    """
    return dispatch.why_not_triton(device, head_dim=head_dim, dtype=dtype, kernels=KERNELS)
