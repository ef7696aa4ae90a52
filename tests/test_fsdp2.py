"""Weights sharded by FSDP2 (``fully_shard``), two ranks: loss, gradients and scores are those of the whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import attent
from tests.ranks import on_ranks

WORLD = 2
UNITS = ["head its own unit", "head in the root's unit"]


def shard(model: nn.Module, head: nn.Module, layers: list[nn.Module], units: str) -> None:
    """As a user does it, or accelerate: layers first, the root last; every unit is gathered only while it runs."""
    for module in layers:
        fully_shard(module)
    if units == UNITS[0]:
        tied = [module for module in model.modules() if getattr(module, "weight", None) is head.weight]
        fully_shard(tied)
    fully_shard(model, reshard_after_forward=True)


def mean_over_ranks(grad: Tensor) -> Tensor:
    dist.all_reduce(grad)
    return grad / WORLD


def compare(sharded: nn.Module, whole: nn.Module) -> None:
    """Gradients in float64, averaged over ranks as FSDP2 averages them: they differ in the order of additions only.

    Two ranks add two numbers, in one order, and the mean is exact: so the bound is what a rank's own arithmetic may do
    differently, which is nothing but the memory its matrices lie in (BLAS may block them otherwise): 1e-14 of the
    tensor's norm is 50 roundings.
    """
    whole_parameters = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        wanted = whole_parameters[name].grad
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None:
            wanted = mean_over_ranks(wanted.clone())
            assert isinstance(parameter.grad, dist.tensor.DTensor)
            found = parameter.grad.full_tensor()
            assert (found - wanted).norm() <= 1e-14 * wanted.norm(), name


# -------------------------------------------------------------------------------------------------- a loop of one's own


class Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.layer = nn.Linear(16, 16)
        linear = nn.Linear(16, 40, bias=bias)
        self.head = attent.ScoringHead(linear, score=("head", "hidden", "logit"), shift=True, softcap=2.0)

    def forward(self, tokens: Tensor, target: Tensor | None) -> Any:
        return self.head(self.layer(self.embed(tokens)).tanh(), target)


def scoring_heads(rank: int, units: str) -> None:
    for bias in (False, True):
        scoring_head(rank, units, bias)


def scoring_head(rank: int, units: str, bias: bool) -> None:
    torch.manual_seed(1)
    whole = Model(bias).double()
    sharded = copy.deepcopy(whole)
    shard(sharded, sharded.head, [sharded.layer], units)
    for step in range(2):
        torch.manual_seed(10 * rank + step)
        tokens = torch.randint(40, (3, 7))
        loss, scores = whole(tokens, tokens)
        loss.backward()
        loss_sharded, scores_sharded = sharded(tokens, tokens)
        loss_sharded.backward()
        assert isinstance(sharded.head.weight, dist.tensor.DTensor)
        assert sharded.head.weight.to_local().shape[0] == 40 // WORLD
        assert torch.equal(loss, loss_sharded)
        assert all(torch.equal(scores[name], scores_sharded[name]) for name in scores)
        compare(sharded, whole)
        assert torch.equal(whole(tokens, None), sharded(tokens, None))


@pytest.mark.parametrize("units", UNITS)
def test_a_sharded_scoring_head_scores_and_learns_as_the_whole_one(tmp_path: Path, units: str) -> None:
    on_ranks(WORLD, scoring_heads, tmp_path, units)


# ------------------------------------------------------------------------------------------------------ TeachingTrainer


def imported_before_forking() -> Any:
    from attent.integrations.transformers import TeachingArguments, TeachingTrainer
    from tests.test_transformers_trainer_distributed import as_rank

    return TeachingArguments, TeachingTrainer, as_rank


def trainers_loss(
    rank: int, folder: Path, kind: str, config: dict[str, Any], teaching: dict[str, Any], units: str
) -> None:
    """The trainer's loss of a sharded model against the plain Trainer's of a whole one, on this rank's batch.

    accelerate shards on accelerators only, so the model is sharded here, in place as accelerate does it.
    """
    import transformers

    from tests.transformers_learners import arguments, classifier, language_model, texts

    TeachingArguments, TeachingTrainer, as_rank = imported_before_forking()
    as_rank(rank, WORLD)
    torch.manual_seed(1)
    if kind.startswith("classifier "):
        model, data = classifier(kind.removeprefix("classifier "))
        data = data * 2
        model.eval()  # no dropout
    else:
        model, data = language_model(kind, **config), texts(16)
    model = model.double()
    whole = copy.deepcopy(model)
    plain = transformers.Trainer(whole, arguments(folder), train_dataset=data)
    alone = TeachingTrainer(whole, arguments(folder), train_dataset=data, teaching=TeachingArguments(**teaching))
    taught = TeachingTrainer(model, arguments(folder), train_dataset=data, teaching=TeachingArguments(**teaching))
    weight, batches = torch.tensor([0.5, 2.0, 1.0, 0.0]), list(alone.get_train_dataloader())
    for trainer in (alone, taught):
        trainer.teacher.weights = lambda ids: weight  # type: ignore[method-assign]
    head = model.get_submodule(taught._scored_loss.head.name)  # type: ignore[union-attr]
    layers = model.model.layers if hasattr(model, "model") else model.bert.encoder.layer
    shard(model, head, list(layers), units)
    whole.training = model.training = True
    for step in range(2):  # the first checks the head
        batch = batches[step]
        loss = taught.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(40))
        loss.backward()
        expected = alone.compute_loss(whole, dict(batch), num_items_in_batch=torch.tensor(40))
        expected.backward()
        assert torch.equal(loss, expected)
        if "reweight" not in teaching:
            own = {name: value for name, value in batch.items() if name != "example_id"}
            with torch.no_grad():
                unscored = plain.compute_loss(whole, own, num_items_in_batch=torch.tensor(40))
            assert abs(unscored - expected) <= 4e-6 * abs(unscored)  # as in test_transformers_trainer.py
        compare(model, whole)
        model.zero_grad()
        whole.zero_grad()
    for trainer in (alone, taught):
        trainer.teacher.state_dict()
    one, other = (trainer.teacher._harvest.store.score for trainer in (alone, taught))
    assert torch.equal(one, other) and one.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize(
    ("kind", "config", "teaching"),
    [
        ("Llama", {}, {"score": "head"}),
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}, {"score": "head"}),
        (
            "Mixtral",
            {"output_router_logits": True, "router_aux_loss_coef": 0.5, "num_local_experts": 2,
             "experts_implementation": "eager"},
            {"score": "head"},
        ),
        ("Llama", {}, {"score": "head", "keep_logits": True, "reweight": "inverse"}),
        ("classifier Bert", {}, {"score": "head"}),
        ("classifier Llama", {}, {"score": "head", "reweight": "inverse"}),
    ],
)  # fmt: skip
def test_a_sharded_model_in_the_trainer_scores_and_learns_as_the_whole_one(
    tmp_path: Path, kind: str, config: dict[str, Any], teaching: dict[str, Any], units: str
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    imported_before_forking()
    on_ranks(WORLD, trainers_loss, tmp_path / "meet", tmp_path, kind, config, teaching, units)
