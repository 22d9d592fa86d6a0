"""What the attention functions refuse before anything is computed, and under which dtype they run."""

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def refuse_unbuilt(function: str, **arguments) -> None:
    """NotImplementedError naming the first argument that is given."""
    for name, argument in arguments.items():
        if argument is not None:
            raise NotImplementedError(f"{function}: the argument {name} is not implemented yet")


def check_tensors(*, optional: bool = False, **arguments) -> None:
    """ValueError naming the first argument that is no tensor; `optional` ones may be None."""
    for name, argument in arguments.items():
        if not isinstance(argument, torch.Tensor) and not (optional and argument is None):
            raise ValueError(f"{name} is {type(argument).__name__}, it must be a tensor")


def check_flag(name: str, value: bool) -> None:
    """ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, it must be True or False")


def check_shapes(query, key, value, valid, name: str = "query") -> None:
    """ValueError where query [B, T, H, D], key and value [B, S, Hkv, D], valid [B, S] or their dtypes do not fit."""
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(f"{name} and key must be [B, T, H, D], got {tuple(query.shape)} and {tuple(key.shape)}")
    if key.shape != value.shape:
        raise ValueError(f"key and value must share one shape: {tuple(key.shape)}, {tuple(value.shape)}")
    batch, _, num_heads, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"{name} {tuple(query.shape)} and key {tuple(key.shape)} differ in batch or head dim")
    if not key.shape[2]:
        raise ValueError(f"key {tuple(key.shape)} has no heads")
    if num_heads % key.shape[2]:
        raise ValueError(f"{num_heads} query heads are no multiple of {key.shape[2]} key heads")
    if valid is not None and (valid.shape != key.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool [{batch}, {key.shape[1]}], got {valid.dtype} {tuple(valid.shape)}")
    for other, tensor in (("key", key), ("value", value), ("valid", valid)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{other} is on {tensor.device}, {name} is on {query.device}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"{name}, key and value must share one dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if query.dtype not in DTYPES:
        raise ValueError(f"{name}, key and value are {query.dtype}, they must be float64, float32, float16 or bfloat16")


def check_dropout(dropout: float, dropout_seed: torch.Tensor | None, query: torch.Tensor) -> None:
    """ValueError where dropout is outside of [0, 1), or not 0 without an int64 seed of one element beside query."""
    if dropout == 0.0:
        return
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, it must be at least 0 and below 1")
    if dropout_seed is None:
        raise ValueError(f"dropout is {dropout}, it needs a dropout_seed: int64 of one element")
    if not isinstance(dropout_seed, torch.Tensor):
        raise ValueError(f"dropout_seed must be an int64 tensor of one element, got {type(dropout_seed).__name__}")
    if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
        raise ValueError(
            f"dropout_seed must be int64 of one element, got {dropout_seed.dtype} {tuple(dropout_seed.shape)}"
        )
    if dropout_seed.device != query.device:
        raise ValueError(f"dropout_seed is on {dropout_seed.device}, the other tensors are on {query.device}")


def empty_result(query: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Zeros shaped as query, the result where there is no query or no key, with zero gradients of every input."""
    return torch.zeros_like(query) + sum(tensor[:0].sum() for tensor in (query, *others))


def check_count(name: str, value: int, minimum: int) -> None:
    """ValueError unless `value` is a whole number of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} is {value!r}, it must be a whole number of at least {minimum}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError unless `value` is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, it must be one of {', '.join(map(repr, choices))}")


def under_autocast(*tensors: torch.Tensor | None) -> list:
    """The tensors in the dtype of autocast where it is on, as scaled_dot_product_attention casts: float64 stays."""
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]
