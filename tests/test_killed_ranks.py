"""Ranks killed for real (SIGKILL) at random steps, with workers fetching ahead, and started again by torchrun."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attent

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
N, EPOCHS, GLOBAL_BATCH = 64, 4, 8

LOOP = """
import json, os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
import attent
from attent.checkpoint import read_file, write_state

folder, victim, die_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
data = TensorDataset(torch.randn(64, 5), torch.arange(64) % 3)
head = attent.ScoringHead(nn.Linear(5, 3))
model = DistributedDataParallel(head)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
teacher = attent.Teacher(64, total_epochs=4, ratio=0.75)
sampler = teacher.sampler(batch_size=8 // world)
loader = DataLoader(attent.indexed(data), batch_sampler=sampler, num_workers=1, prefetch_factor=4)
step, state = 0, folder / "state.pt"
if state.is_file():
    saved = read_file(state)
    teacher.load_state_dict(saved["teacher"])
    head.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    step = saved["step"]
for epoch in range(sampler.epoch, 4):
    for ids, x, y in loader:
        if step == die_at and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        loss, _ = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.record(ids, (ids * 37 % 11 + 1.0) * (1 + (ids + epoch) % 3))
        with open(folder / f"seen-{world}-{rank}.jsonl", "a") as file:
            file.write(json.dumps([step, ids.tolist()]) + "\\n")
        step += 1
        if step % 3 == 0:
            saved = teacher.state_dict()
            if rank == 0:
                learner = {"model": head.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                write_state({**learner, "teacher": saved}, state)
if rank == 0:
    torch.save(head.state_dict(), folder / "learner.pt")
dist.destroy_process_group()
"""


def torchrun(folder: Path, world: int, victim: int = -1, die_at: int = -1) -> int:
    """Start the loop on ``world`` ranks; its exit status. One rank kills itself before step ``die_at``."""
    script = folder / "loop.py"
    folder.mkdir(exist_ok=True)
    script.write_text(LOOP)
    engine = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command = [*engine, str(script), str(folder), str(victim), str(die_at)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert (ended.returncode != 0) == (die_at >= 0), ended.stderr[-3000:]
    return ended.returncode


def seen(folder: Path) -> dict[int, list[int]]:
    """What all ranks together trained on in each step; one that was lost with its rank was done again, alike."""
    by_world: dict[tuple[int, int], dict[int, list[int]]] = {}
    for file in folder.glob("seen-*.jsonl"):
        _, world, rank = file.stem.split("-")
        by_world[int(world), int(rank)] = dict(json.loads(line) for line in file.read_text().splitlines())
    steps: dict[int, list[int]] = {}
    for world in {world for world, _ in by_world}:
        ranks = [by_world[world, rank] for rank in range(world)]
        for step in set.intersection(*(set(rank) for rank in ranks)):  # the killed rank's last step has no record
            batch = sorted(i for rank in ranks for i in rank[step])
            assert steps.setdefault(step, batch) == batch, step
    return steps


def lessons() -> dict[int, list[int]]:
    """The same run in this process, without a learner: what is trained on follows from the scores alone."""
    teacher = attent.Teacher(N, total_epochs=EPOCHS, ratio=0.75)
    sampler = teacher.sampler(batch_size=GLOBAL_BATCH)
    steps: dict[int, list[int]] = {}
    for epoch in range(EPOCHS):
        for batch in sampler:
            ids = torch.tensor(batch)
            teacher.record(ids, (ids * 37 % 11 + 1.0) * (1 + (ids + epoch) % 3))
            steps[len(steps)] = sorted(batch)
    return steps


def test_two_then_four_then_one_rank_each_killed_finish_the_same_lessons(tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", lessons()
    first, second = random.randrange(4, 12), random.randrange(15, 24)
    torchrun(folder, 2, random.randrange(2), first)
    torchrun(folder, 4, random.randrange(4), second)
    torchrun(folder, 1)
    assert max(whole) == 8 + 6 + 6 + 8 - 1
    assert seen(folder) == whole


def test_the_same_ranks_started_again_end_with_the_same_learner_bit_by_bit(tmp_path: Path) -> None:
    torchrun(tmp_path / "whole", 2)
    torchrun(tmp_path / "killed", 2, random.randrange(2), random.randrange(4, 26))
    torchrun(tmp_path / "killed", 2)
    one, other = (torch.load(tmp_path / name / "learner.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert seen(tmp_path / "whole") == seen(tmp_path / "killed") == lessons()
