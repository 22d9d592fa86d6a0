"""AdamW, and Muon with AdamW, behind one object whose state is named tensors.

Weight decay acts on weight matrices only. Norm gains and biases set scales and offsets that the next layer
cannot undo, and a few of them per layer bring no overfitting to hold back; the rows of an embedding get a
gradient only when their symbol occurs, so decay would shrink rare rows for no other reason than being rare.

Muon (K. Jordan et al. 2024) orthogonalises the momentum of a hidden matrix, for which singular values mean
something; embeddings, output heads, norms and biases stay with AdamW. Its updates are scaled to the size of AdamW's
("Muon is Scalable for LLM Training", section 2.2; torch calls it match_rms_adamw), so that one learning rate serves
both.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

HEAD_NAMES = frozenset({"head", "lm_head", "classifier", "relationship"})
# a weight whose name has one of these components is that number of matrices stacked by rows
FUSED_PARTS = {"qkv": 3, "kv": 2, "key_value_global": 2}
MUON_MOMENTUM = 0.95


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Role of each trainable parameter by name: "embedding", "head", "matrix" or "vector"; tied ones once.

    "embedding": owned by nn.Embedding, also where a head shares it. "head": a weight with one of HEAD_NAMES
    as a component of its dotted name, or of a layer `out` that stands beside an `encoder`, as in `models.heads`; the
    dense layers before it are hidden ones. "matrix": any other weight of two or more dimensions that is called
    "weight". "vector": all that is left, so biases that happen to be stored as [H, D] count as vectors, and so do the
    taps [H, taps] of a convolution for each head.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    beside_encoders = {f"{name.removesuffix('encoder')}out.weight" for name, _ in model.named_modules()
                       if name.split(".")[-1] == "encoder"}  # fmt: skip
    roles = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            roles[name] = "embedding"
        elif parameter.ndim < 2 or name.split(".")[-1] != "weight":
            roles[name] = "vector"
        else:
            is_head = HEAD_NAMES & set(name.split(".")) or name in beside_encoders
            roles[name] = "head" if is_head else "matrix"
    return roles


class Optimizers:
    """One or two torch optimizers stepped as one.

    `members` maps a short name to (optimizer, its parameters by name, its learning rate as a multiple of the
    common one). `fused` lists (whole, parts): Muon steps the row blocks of a fused projection each as a
    matrix of its own; the parts share the memory of the whole and get their gradients from it.
    """

    def __init__(
        self,
        members: dict[str, tuple[torch.optim.Optimizer, dict[str, nn.Parameter], float]],
        fused: list[tuple[nn.Parameter, list[nn.Parameter]]] | None = None,
    ):
        self._members = members
        self._fused = fused or []

    def step(self) -> None:
        """One update from the gradients at hand."""
        for whole, parts in self._fused:
            gradients = [None] * len(parts) if whole.grad is None else whole.grad.chunk(len(parts))
            for part, gradient in zip(parts, gradients, strict=True):
                part.grad = gradient
        for optimizer, _, _ in self._members.values():
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients (they become None)."""
        for optimizer, _, _ in self._members.values():
            optimizer.zero_grad(set_to_none=True)
        for whole, _ in self._fused:
            whole.grad = None

    def set_lr(self, lr: float) -> None:
        """Use `lr` from the next step on; Muon's matrices get their ratio of it."""
        for optimizer, _, ratio in self._members.values():
            for group in optimizer.param_groups:
                group["lr"] = lr * ratio

    def state_dict(self) -> dict[str, Any]:
        """{"tensors": {"<member>/<parameter>/<slot>": tensor}, "values": JSON}: no object needs pickling.

        Hyperparameters are not in it: on a resume they come from the configuration.
        """
        tensors: dict[str, Tensor] = {}
        for member, (optimizer, parameters, _) in self._members.items():
            for name, parameter in parameters.items():
                for slot, value in optimizer.state.get(parameter, {}).items():
                    assert isinstance(value, Tensor), f"{member} keeps a {type(value).__name__} as {slot}"
                    tensors[f"{member}/{name}/{slot}"] = value
        return {"tensors": tensors, "values": {"parameters": self.parameter_shapes()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; hyperparameters stay as they are.

        Raises ValueError where the parameters, or the shape of a tensor, are not those of this object.
        """
        saved, own = state["values"]["parameters"], self.parameter_shapes()
        if saved != own:
            differing = sorted(key for key in saved.keys() | own.keys() if saved.get(key) != own.get(key))
            key = differing[0]
            raise ValueError(
                f"the optimizer state is of other parameters: {len(differing)} differ, the first is {key} "
                f"(saved {saved.get(key, 'nothing')}, here {own.get(key, 'nothing')})"
            )
        slots: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state["tensors"].items():
            owner, _, slot = key.rpartition("/")
            # a slot is as large as its parameter, or one number such as AdamW's step
            if owner not in own or list(tensor.shape) not in ([], own[owner]):
                raise ValueError(f"optimizer tensor {key} of shape {list(tensor.shape)} has no place here")
            slots.setdefault(owner, {})[slot] = tensor
        for member, (optimizer, parameters, _) in self._members.items():
            groups = optimizer.state_dict()["param_groups"]
            order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            index = {id(parameter): position for position, parameter in enumerate(order)}
            entries = {
                index[id(parameter)]: slots[f"{member}/{name}"]
                for name, parameter in parameters.items()
                if f"{member}/{name}" in slots
            }
            optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def parameter_shapes(self) -> dict[str, list[int]]:
        """Shape of each parameter, by "<member>/<parameter>"."""
        return {
            f"{member}/{name}": list(parameter.shape)
            for member, (_, parameters, _) in self._members.items()
            for name, parameter in parameters.items()
        }


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    muon_lr_ratio: float,
) -> Optimizers:
    """The optimizer of `model`, which must already be on its device.

    name: "adamw" (torch's fused kernel) or "muon" (hidden matrices by Muon, the rest by AdamW). `betas` and `eps` are
    AdamW's. Muon's learning rate is `muon_lr_ratio * lr`, then scaled by shape. Muon orthogonalises each part of a
    fused projection (FUSED_PARTS) on its own: stacked they would share one set of singular directions.

    Raises ValueError for an unknown name, and for Muon on a model without hidden matrices.
    """
    if name not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be adamw or muon, got {name!r}")
    roles = parameter_roles(model)
    trainable = {key: value for key, value in model.named_parameters() if key in roles}
    by_muon = {
        key: value for key, value in trainable.items() if name == "muon" and roles[key] == "matrix" and value.ndim == 2
    }
    by_adamw = {key: value for key, value in trainable.items() if key not in by_muon}
    members = {}
    if by_adamw:
        decayed = [value for key, value in by_adamw.items() if roles[key] in ("matrix", "head")]
        plain = [value for key, value in by_adamw.items() if roles[key] not in ("matrix", "head")]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        adamw = torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
        members["adamw"] = (adamw, by_adamw, 1.0)
    if name == "adamw":
        return Optimizers(members)
    if not by_muon:
        raise ValueError("optimizer muon needs a model with hidden weight matrices, this one has none")
    parts, fused = _split_fused(by_muon)
    muon = torch.optim.Muon(
        list(parts.values()),
        lr=lr * muon_lr_ratio,
        weight_decay=weight_decay,
        momentum=MUON_MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    members["muon"] = (muon, parts, muon_lr_ratio)
    return Optimizers(members, fused)


def _split_fused(
    matrices: Mapping[str, nn.Parameter],
) -> tuple[dict[str, nn.Parameter], list[tuple[nn.Parameter, list[nn.Parameter]]]]:
    """Replace fused projections by views of their row blocks, named "<name>[0]" and so on."""
    parts: dict[str, nn.Parameter] = {}
    fused = []
    for name, whole in matrices.items():
        num_parts = next((FUSED_PARTS[word] for word in name.split(".") if word in FUSED_PARTS), 1)
        if num_parts == 1 or whole.shape[0] % num_parts:
            parts[name] = whole
            continue
        blocks = [nn.Parameter(block) for block in whole.detach().chunk(num_parts)]
        parts.update({f"{name}[{position}]": block for position, block in enumerate(blocks)})
        fused.append((whole, blocks))
    return parts, fused
