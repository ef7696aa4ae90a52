"""ScoringHead takes a linear layer's place: same parameters, same checkpoints, hooks run, scores beside the loss."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn import functional as F

import attent
from attent.modules import ScoringHead

OPTIONS: list[dict[str, Any]] = [
    {},
    {"score": None},
    {"score": ("loss", "head"), "per_example": "mean", "reduction": "example"},
    {"weight": torch.linspace(0.5, 2, 7), "label_smoothing": 0.1, "reduction": "sum"},
    {"softcap": 2.0, "shift": True, "ignore_index": 3, "reduction": "none"},
]


class Model(nn.Module):
    """A tiny language model; tied: the head's weight is the embedding's."""

    def __init__(self, tied: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, target: Tensor | None = None) -> Any:
        hidden = self.hidden(self.embedding(tokens)).tanh()
        return self.head(hidden) if target is None else self.head(hidden, target)


def flat(result: Any) -> list[Tensor]:
    """Loss and scores, however many."""
    loss, scores = (result, {}) if isinstance(result, Tensor) else result
    return [loss, *(scores.values() if isinstance(scores, dict) else [scores])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_it_returns_what_the_function_does(options: dict[str, Any], bias: bool) -> None:
    linear = nn.Linear(4, 7, bias=bias)
    hidden, target = torch.randn(3, 5, 4), torch.randint(7, (3, 5))
    result = ScoringHead(linear, **options)(hidden, target)
    given = {"score": "logit", **options}
    expected = attent.linear_cross_entropy(hidden, linear.weight, target, linear_bias=linear.bias, **given)
    assert all(torch.equal(a, b) for a, b in zip(flat(result), flat(expected), strict=True))


def test_packed_and_weighted_examples_pass_through() -> None:
    linear = nn.Linear(4, 7)
    hidden, target = torch.randn(6, 4), torch.randint(7, (6,))
    given = {"cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32), "example_weight": torch.tensor([2.0, 0.0])}
    result = ScoringHead(linear, score="head", shift=True)(hidden, target, **given)
    expected = attent.linear_cross_entropy(
        hidden, linear.weight, target, linear_bias=linear.bias, score="head", shift=True, **given
    )
    assert all(torch.equal(a, b) for a, b in zip(flat(result), flat(expected), strict=True))


def test_without_a_target_it_gives_logits_capped_as_in_the_loss() -> None:
    linear, hidden = nn.Linear(4, 7), torch.randn(3, 5, 4)
    assert torch.equal(ScoringHead(linear)(hidden), linear(hidden))
    logits = ScoringHead(linear, softcap=2.0)(hidden)
    torch.testing.assert_close(logits, 2 * torch.tanh(linear(hidden) / 2))
    target = torch.randint(7, (3, 5))
    loss = ScoringHead(linear, softcap=2.0, score=None)(hidden, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), target.flatten()))


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_go_both_ways(tied: bool) -> None:
    plain, scoring = Model(tied), Model(tied)
    scoring.head = ScoringHead(scoring.head, weight=torch.ones(7))
    assert list(scoring.state_dict()) == list(plain.state_dict())  # class weights are an option, not in a checkpoint
    assert [name for name, _ in scoring.named_parameters()] == [name for name, _ in plain.named_parameters()]
    scoring.load_state_dict(plain.state_dict())
    tokens = torch.randint(7, (2, 5))
    assert torch.equal(scoring(tokens), plain(tokens))
    plain.load_state_dict(scoring.state_dict())


def test_the_parameters_are_the_layers_own() -> None:
    model = Model(tied=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.head = ScoringHead(model.head, shift=True)
    assert model.head.weight is model.embedding.weight
    before = model.embedding.weight.detach().clone()
    tokens = torch.randint(7, (2, 5))
    loss, scores = model(tokens, tokens)
    loss.backward()
    optimizer.step()  # made before the head was replaced
    assert not torch.equal(model.embedding.weight, before) and scores.shape == (2,)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("tied", [False, True])
def test_copies_and_pickles_compute_the_same(tied: bool, copied: Any) -> None:
    model = Model(tied)
    model.head = ScoringHead(model.head, weight=torch.linspace(0.5, 2, 7), softcap=3.0, score=("logit", "head"))
    other = copied(model)
    tokens = torch.randint(7, (2, 5))
    assert all(torch.equal(a, b) for a, b in zip(flat(model(tokens, tokens)), flat(other(tokens, tokens)), strict=True))
    assert (other.head.weight is other.embedding.weight) == tied
    assert other.head.weight is not model.head.weight


def test_hooks_run_before_the_weight_is_read_and_after_the_loss() -> None:
    head = ScoringHead(nn.Linear(4, 7))
    hidden, target = torch.randn(3, 4), torch.randint(7, (3,))
    seen: list[str] = []
    replacement = nn.Parameter(torch.randn(7, 4))

    def gather(module: nn.Module, arguments: Any) -> None:
        seen.append("before")
        module.weight = replacement  # as FSDP puts the gathered weight in the shard's place

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(lambda module, arguments, result: seen.append(type(result).__name__))
    head.register_full_backward_hook(lambda module, given, got: seen.append("backward"))
    loss, _ = head(hidden.requires_grad_(), target)
    torch.testing.assert_close(loss, attent.linear_cross_entropy(hidden, replacement, target, linear_bias=head.bias))
    loss.backward()
    assert seen == ["before", "tuple", "backward"] and replacement.grad is not None


def test_it_moves_and_casts_as_a_module_does() -> None:
    head = ScoringHead(nn.Linear(4, 7), weight=torch.ones(7)).eval().to(torch.bfloat16)
    assert head.weight.dtype == head.class_weight.dtype == torch.bfloat16
    loss, scores = head(torch.randn(3, 4).bfloat16(), torch.randint(7, (3,)))
    assert loss.dtype == scores.dtype == torch.float32
    assert ScoringHead(nn.Linear(4, 7, device="meta")).weight.is_meta
    assert not ScoringHead(nn.Linear(4, 7).eval()).training


def test_its_repr_tells_its_options() -> None:
    text = repr(ScoringHead(nn.Linear(4, 7, bias=False), softcap=30.0, score="head", shift=True))
    for part in ("in_features=4", "out_features=7", "bias=False", "softcap=30.0", "score='head'", "shift=True"):
        assert part in text


def test_a_model_that_ends_in_it_compiles_to_one_graph() -> None:
    model = Model(tied=True)
    model.head = ScoringHead(model.head, weight=torch.linspace(0.5, 2, 7), score="head", shift=True)
    tokens = torch.randint(7, (2, 5))
    outcomes = []
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss, scores = function(tokens, tokens)
        outcomes.append([loss, scores, *torch.autograd.grad(loss, list(model.parameters()))])
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, eager)


# ------------------------------------------------------------------------------------------------------------- refused


class Adapted(nn.Linear):
    """A layer that computes more than its weight says."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_hook(register: str) -> nn.Linear:
    linear = nn.Linear(4, 7)
    getattr(linear, register)(lambda *_: None)
    return linear


@pytest.mark.parametrize(
    "linear",
    [
        Adapted(4, 7),
        nn.Sequential(nn.Linear(4, 7)),
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 7)),
        nn.Parameter(torch.randn(7, 4)),
        None,
        *(
            with_hook(register)
            for register in (
                "register_forward_hook",
                "register_forward_pre_hook",
                "register_full_backward_hook",
                "register_full_backward_pre_hook",
            )
        ),
    ],
    ids=lambda linear: type(linear).__name__,
)
def test_what_is_more_than_a_linear_layer_is_refused(linear: Any) -> None:
    with pytest.raises(ValueError, match=r"^linear: got .+; takes .+"):
        ScoringHead(linear)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("weight", torch.ones(6)),
        ("weight", torch.ones(7, dtype=torch.int64)),
        ("weight", torch.ones(7, device="meta")),
        ("weight", torch.ones(7, requires_grad=True)),
        ("reduction", "average"),
        ("ignore_index", 0.5),
        ("label_smoothing", 1.5),
        ("softcap", 0.0),
        ("softcap", math.nan),
        ("shift", "yes"),
        ("score", "gradient"),
        ("score", ()),
        ("per_example", "max"),
        ("group", "ranks"),
        ("backend", "fastest"),
    ],
)
def test_options_are_refused_when_the_head_is_made(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; takes .+"):
        ScoringHead(nn.Linear(4, 7), **{argument: value})


# --------------------------------------------------------------------------------------------------------------- FSDP2


def train_sharded(rank: int, file: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        tokens = torch.arange(20).view(4, 5) * 3 % 7
        mine = tokens[2 * rank : 2 * rank + 2]
        for reduction, tied in (("mean", False), ("none", False), ("mean", True)):
            torch.manual_seed(0)
            whole = Model(tied).double()
            whole.head = ScoringHead(whole.head, reduction=reduction, score="head", shift=True)
            sharded = copy.deepcopy(whole)
            if not tied:  # a tied weight belongs to one group, the root's
                fully_shard(sharded.head, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            assert isinstance(sharded.head.weight, DTensor)
            with pytest.raises(ValueError, match=r"linear_weight: got a DTensor; takes .*ScoringHead"):
                attent.linear_cross_entropy(torch.randn(2, 4).double(), sharded.head.weight, torch.tensor([0, 1]))

            loss, scores = sharded(mine, mine)
            loss.mean().backward()
            expected, right = whole(tokens, tokens)
            torch.testing.assert_close(scores, right[2 * rank : 2 * rank + 2])
            expected.mean().backward()
            for (name, parameter), other in zip(sharded.named_parameters(), whole.parameters(), strict=True):
                gathered = parameter.grad.full_tensor()  # the mean over ranks
                torch.testing.assert_close(gathered, other.grad, msg=lambda text, name=name: f"{name}: {text}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_fully_sharded_it_trains_as_unsharded(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_sharded, (str(tmp_path / "rendezvous"),), nprocs=2)
