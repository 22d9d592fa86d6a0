"""Which parameters decay, which go to Muon, and that the wrapped optimizers do what torch's do."""

import copy

import pytest
import torch
from torch import nn

from models.pretrained import build_pretrained
from training import optim
from training.optim import parameter_roles


class Toy(nn.Module):
    def __init__(self, dim: int = 8, tied: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(11, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(3 * dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.content_bias = nn.Parameter(torch.zeros(2, dim // 2))
        self.head = nn.Linear(dim, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids) + self.content_bias.flatten()
        return self.head(self.norm(x + self.out(self.qkv(x))))


def make(tied: bool = True) -> Toy:
    torch.manual_seed(0)
    return Toy(tied=tied)


def backward(model: nn.Module, seed: int = 1) -> None:
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()


def conditioned(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A gradient with singular values from 1 to 4; one near zero would stay near zero."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    return left @ torch.diag(torch.linspace(1, 4, left.shape[1])) @ right


def build_optimizer(model: nn.Module, **options):
    """The optimizer of `model`; what a test is not about is as in the configuration."""
    usual = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "muon_lr_ratio": 1.0}
    return optim.build_optimizer(model, **{**usual, **options})


def muon_options() -> dict:
    return {"name": "muon", "lr": 0.01, "weight_decay": 0.1}


def test_roles():
    assert parameter_roles(make(tied=False)) == {
        "content_bias": "vector",
        "embedding.weight": "embedding",
        "qkv.weight": "matrix",
        "qkv.bias": "vector",
        "out.weight": "matrix",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "head.weight": "head",
    }


SIZES = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 34, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1,
    "attention_window": 4, "num_landmarks": 4, "segment_means_seq_len": 32, "conv_kernel_size": 5,
}  # fmt: skip
# the weights of each head that are hidden matrices, and those that give scores
HEADS = {
    "masked_lm": ({"dense.weight"}, set()),  # its output matrix is the embedding
    "pretraining": ({"dense.weight", "encoder.pooler.weight"}, {"relationship.weight"}),
    "token": (set(), {"out.weight"}),
    "span_qa": (set(), {"out.weight"}),
    "sequence": ({"dense.weight"}, {"out.weight"}),
    "candidates": (set(), {"out.weight"}),
    "retrieval": ({"up.weight"}, {"out.weight"}),
}


@pytest.mark.parametrize("kind", ["longformer", "nystromformer"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_roles_in_an_encoder_with_a_head(kind, head, prefix):
    model = build_pretrained({**SIZES, "model_type": kind}, "nowhere", head=head)
    roles = parameter_roles(nn.ModuleDict({"model": model}) if prefix else model)
    names: dict[str, set[str]] = {}
    for name, role in roles.items():
        names.setdefault(role, set()).add(name.removeprefix(prefix))
    own, heads = HEADS[head]
    block = "encoder.layers.0"
    parts = ["attention.qkv", "attention.out", "mlp.up", "mlp.down"]
    parts += ["attention.query_global", "attention.key_value_global"] if kind == "longformer" else []
    assert names["matrix"] == {f"{block}.{part}.weight" for part in parts} | own
    assert names.get("head", set()) == heads
    assert names["embedding"] == {f"encoder.{table}.weight" for table in ("word", "position", "token_type")}
    taps = f"{block}.attention.conv_weight"
    assert (taps in names["vector"]) == (kind == "nystromformer")


def test_keys_and_values_of_global_tokens_are_two_matrices():
    model = build_pretrained({**SIZES, "model_type": "longformer"}, "nowhere", head="masked_lm")
    shapes = build_optimizer(model, **muon_options()).parameter_shapes()
    attention = "muon/encoder.layers.0.attention"
    assert shapes[f"{attention}.key_value_global.weight[0]"] == shapes[f"{attention}.qkv.weight[2]"] == [8, 8]
    assert f"{attention}.key_value_global.weight" not in shapes
    assert shapes[f"{attention}.query_global.weight"] == [8, 8]


def test_a_tied_head_counts_as_the_embedding():
    roles = parameter_roles(make())
    assert roles["embedding.weight"] == "embedding"
    assert "head.weight" not in roles


def test_frozen_parameters_stay_out():
    model = make()
    model.out.weight.requires_grad_(False)
    assert "out.weight" not in parameter_roles(model)


def test_only_weight_matrices_decay():
    model = make(tied=False)
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, name="adamw", lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.state_dict().items():
        factor = 0.95 if name in ("qkv.weight", "out.weight", "head.weight") else 1.0
        torch.testing.assert_close(value, before[name] * factor, msg=name)


def test_adamw_equals_torch_on_the_same_groups():
    ours, theirs = make(), make()
    optimizer = build_optimizer(ours, name="adamw", lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    expected = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    for seed in range(3):
        for model, stepper in ((ours, optimizer), (theirs, expected)):
            stepper.zero_grad()
            backward(model, seed)
            stepper.step()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_set_lr_scales_the_next_update():
    moved = []
    for lr in (0.01, 0.03):
        model = make()
        before = model.norm.weight.detach().clone()
        optimizer = build_optimizer(model, name="adamw", lr=1.0)
        backward(model)
        optimizer.set_lr(lr)
        optimizer.step()
        moved.append(model.norm.weight.detach() - before)
    torch.testing.assert_close(moved[1], 3 * moved[0], atol=1e-6, rtol=1e-4)


def test_muon_turns_hidden_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    model, plain = make(tied=False), make(tied=False)
    before = copy.deepcopy(model.state_dict())
    for each in (model, plain):
        backward(each)
        each.qkv.weight.grad = torch.cat([conditioned(8, 8, seed) for seed in range(3)])
        each.out.weight.grad = conditioned(8, 24, 3)
    build_optimizer(model, **{**muon_options(), "weight_decay": 0.0}).step()
    build_optimizer(plain, name="adamw", lr=0.01, weight_decay=0.0).step()
    for name, value in model.state_dict().items():
        if name in ("qkv.weight", "out.weight"):
            continue
        assert torch.equal(value, plain.state_dict()[name]), name
    blocks = (model.qkv.weight.detach() - before["qkv.weight"]).chunk(3)
    for block in [*blocks, model.out.weight.detach() - before["out.weight"]]:
        values = torch.linalg.svdvals(block) / (0.01 * 0.2 * max(block.shape) ** 0.5)
        # five Newton-Schulz iterations bring singular values near one, not to it
        assert values.min() > 0.5, values
        assert values.max() < 1.3, values


def test_a_fused_projection_is_stepped_block_by_block():
    fused, separate = make(), nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
    for block, linear in zip(fused.qkv.weight.detach().chunk(3), separate, strict=True):
        linear.weight.data.copy_(block)
    backward(fused)
    for gradient, linear in zip(fused.qkv.weight.grad.chunk(3), separate, strict=True):
        linear.weight.grad = gradient.clone()
    build_optimizer(fused, **muon_options()).step()
    build_optimizer(separate, **muon_options()).step()
    assert torch.equal(fused.qkv.weight, torch.cat([linear.weight for linear in separate]))


def test_muon_ratio_applies_to_matrices_only():
    changes = {}
    for ratio in (1.0, 2.0):
        model = make()
        before = copy.deepcopy(model.state_dict())
        optimizer = build_optimizer(model, **{**muon_options(), "weight_decay": 0.0}, muon_lr_ratio=ratio)
        backward(model)
        optimizer.set_lr(0.02)
        optimizer.step()
        changes[ratio] = {name: value - before[name] for name, value in model.state_dict().items()}
    torch.testing.assert_close(changes[2.0]["out.weight"], 2 * changes[1.0]["out.weight"], atol=1e-6, rtol=1e-4)
    assert torch.equal(changes[2.0]["norm.weight"], changes[1.0]["norm.weight"])


def test_zero_grad_drops_every_gradient():
    model = make()
    optimizer = build_optimizer(model, **muon_options())
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_goes_on_exactly(name):
    first, second = make(), make()
    optimizer = build_optimizer(first, name=name, lr=0.01)
    for seed in range(2):
        optimizer.zero_grad()
        backward(first, seed)
        optimizer.step()
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, name=name, lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, stepper in ((first, optimizer), (second, resumed)):
        stepper.zero_grad()
        backward(model, 7)
        stepper.step()
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_state_keeps_the_hyperparameters_of_the_new_object():
    source = build_optimizer(make(), name="adamw", lr=0.5)
    model = make()
    target = build_optimizer(model, name="adamw", lr=0.0, weight_decay=0.0)
    target.load_state_dict(source.state_dict())
    before = copy.deepcopy(model.state_dict())
    backward(model)
    target.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_state_of_another_model_is_refused():
    state = build_optimizer(make(), name="adamw", lr=0.1).state_dict()
    other = build_optimizer(Toy(dim=16), name="adamw", lr=0.1)
    with pytest.raises(ValueError, match=r"first is adamw/content_bias \(saved \[2, 4\], here \[2, 8\]\)"):
        other.load_state_dict(state)


def test_state_of_a_wrong_shape_is_refused():
    optimizer = build_optimizer(make(), name="adamw", lr=0.1)
    state = optimizer.state_dict()
    state["tensors"]["adamw/norm.weight/exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"adamw/norm.weight/exp_avg of shape \[3\]"):
        optimizer.load_state_dict(state)


def test_bad_choices_are_refused():
    with pytest.raises(ValueError, match="must be adamw or muon, got 'sgd'"):
        build_optimizer(make(), name="sgd", lr=0.1)
    with pytest.raises(ValueError, match="needs a model with hidden weight matrices"):
        build_optimizer(nn.Embedding(3, 2), name="muon", lr=0.1)
