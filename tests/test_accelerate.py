"""A teacher in a loop on accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import attent

accelerate = pytest.importorskip("accelerate")

from attent.integrations.accelerate import prepare  # noqa: E402
from tests.ranks import on_ranks  # noqa: E402
from tests.test_transformers_trainer_distributed import as_rank  # noqa: E402

N, EPOCHS = 22, 4


def loop(folder: Path, batch_size: int, save_at: int | None = None, load: bool = False) -> list[list[int]]:
    """Ids of each step; saves after a step, or goes on from there."""
    accelerator = accelerate.Accelerator(cpu=True)
    data = TensorDataset(torch.arange(N) * 10)
    teacher = attent.Teacher(N, total_epochs=EPOCHS, seed=3)
    loader, sampler = prepare(accelerator, teacher, data, batch_size=batch_size)
    steps: list[list[int]] = []
    if load:
        accelerator.load_state(str(folder))
    for _ in range(sampler.epoch, EPOCHS):
        for ids, x in loader:
            assert torch.equal(x, ids * 10)
            teacher.record(ids, 1.0 + ids % 5)
            steps.append(ids.tolist())
            if len(steps) == save_at:
                accelerator.save_state(str(folder))
    assert load or len(steps) == teacher.total_steps(batch_size, 1, accelerator.num_processes, drop_last=False)
    return steps


@pytest.mark.parametrize("save_at", [4, 6, 8])  # 22 / 4: six steps, then three and three: within, between, within
def test_load_state_goes_on_after_the_last_step_that_was_recorded(tmp_path: Path, save_at: int) -> None:
    whole = loop(tmp_path, 4, save_at)
    assert loop(tmp_path, 4, load=True) == whole[save_at:]


def on_rank(rank: int, world: int, folder: Path, load: bool) -> list[list[int]]:
    as_rank(rank, world)
    return loop(folder, 4 // world, save_at=None if load else 7, load=load)


@pytest.mark.slow
def test_two_processes_share_the_lesson_and_one_goes_on_with_it(tmp_path: Path) -> None:
    two = on_ranks(2, on_rank, tmp_path / "meet", 2, tmp_path / "state", False)
    together = [set(one) | set(other) for one, other in zip(*two, strict=True)]
    assert set().union(*together[:6]) == set(range(N))
    one = on_ranks(1, on_rank, tmp_path / "meet1", 1, tmp_path / "state", True)[0]
    assert set(one[0]) == together[7] and set(one[1]) < together[8]  # 11 = 4 + 4 + 3, filled up on two


def test_what_would_deal_batches_out_twice_is_refused() -> None:
    teacher, data = attent.Teacher(4, total_epochs=1), TensorDataset(torch.arange(4))
    options: list[tuple[str, dict[str, Any]]] = [("sampler", {"sampler": [0, 1]}), ("shuffle", {"shuffle": True})]
    for argument, option in options:
        with pytest.raises(ValueError, match=f"^{argument}: got "):
            prepare(accelerate.Accelerator(cpu=True), teacher, data, batch_size=2, **option)
    config = accelerate.utils.DataLoaderConfiguration(split_batches=True)
    with pytest.raises(ValueError, match=r"^accelerator: got one with split_batches"):
        prepare(accelerate.Accelerator(cpu=True, dataloader_config=config), teacher, data, batch_size=2)
