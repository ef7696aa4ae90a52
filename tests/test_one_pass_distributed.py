"""One-pass teaching under DistributedDataParallel and FSDP2: what the ranks learn is what one process would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attent.one_pass import OnePass, OnePassError
from tests.one_pass_learners import ViT, classify, gradients, relative_error
from tests.ranks import on_ranks

B = 6


def learner() -> ViT:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    return ViT()


def pool(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's own images and labels, and its choice of them."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(B, 1, 8, 8, generator=generator)
    return images, torch.randint(5, (B,), generator=generator), torch.randperm(B, generator=generator)[:3]


def expected(world: int) -> list[Tensor | None]:
    """One process's gradient of the mean over all ranks' chosen."""
    model = learner()
    for rank in range(world):
        images, labels, index = pool(rank)
        (classify(model)(images[index], labels[index]).mean() / world).backward()
    return gradients(model)


def under_ddp(rank: int, engine: str) -> tuple[float, str | None]:
    model = learner()
    ddp = nn.parallel.DistributedDataParallel(model)
    step = OnePass(classify(ddp), engine=engine)
    for _ in range(2):  # the first step probes and compares, the second does not
        ddp.zero_grad()
        images, labels, index = pool(rank)
        step.backward(step(images, labels), index)
    return relative_error(gradients(model), expected(dist.get_world_size())), step.report().engine


def under_fsdp2(rank: int, engine: str) -> tuple[float, str | None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = learner()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step = OnePass(classify(model), engine=engine)
    for _ in range(2):
        model.zero_grad()
        images, labels, index = pool(rank)
        step.backward(step(images, labels), index)
    found = [None if p.grad is None else p.grad.full_tensor() for p in model.parameters()]
    return relative_error(found, expected(dist.get_world_size())), step.report().engine


def refusal_of_compile(rank: int) -> str:
    ddp = nn.parallel.DistributedDataParallel(learner())
    try:
        OnePass(classify(ddp), engine="compile", compile_backend="aot_eager")(*pool(rank)[:2])
    except OnePassError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("engine", ["eager", pytest.param("two_pass", marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrapped", [under_ddp, under_fsdp2])
def test_two_ranks_learn_what_one_process_would(wrapped: object, engine: str, tmp_path: Path) -> None:
    for error, used in on_ranks(2, wrapped, tmp_path, engine):
        assert error < 1e-10 and used == engine  # sums over ranks run in another order


def test_the_compile_engine_refuses_ddp_by_name(tmp_path: Path) -> None:
    (said,) = on_ranks(1, refusal_of_compile, tmp_path)
    assert "DistributedDataParallel" in said and "engine='eager'" in said
