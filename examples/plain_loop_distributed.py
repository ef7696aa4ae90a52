"""A loop of one's own on several processes: what torchrun and DistributedDataParallel need, and five lines of teaching.

    torchrun --nproc_per_node 2 examples/plain_loop_distributed.py
    torchrun --nproc_per_node 2 examples/plain_loop_distributed.py --stop-after 12    # and start it again: it goes on
    python examples/plain_loop_distributed.py                                         # one process: the same script

Every process trains on its share of the same lesson; scores meet once per lesson, no step waits for them. The state is
saved every few steps and loads on any number of processes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import attent
from attent.checkpoint import read_file, write_state

CLASSES, LENGTH, BATCH, EPOCHS = 8, 7, 16, 6


class Classifier(nn.Module):
    """Attention over a short sequence; given labels, its loss and each example's score."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = attent.ScoringHead(nn.Linear(32, CLASSES), score="head")

    def forward(self, tokens: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(1), label)


def sequences(count: int, seed: int) -> TensorDataset:
    """Tokens, and as their class how many of them are even; one label in 50 is wrong."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(64, (count, LENGTH), generator=generator)
    label = (tokens % 2 == 0).sum(1)
    wrong = torch.rand(count, generator=generator) < 0.02
    return TensorDataset(tokens, torch.where(wrong, (label + 1) % CLASSES, label))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--stop-after", type=int, metavar="STEPS", help="end like a crash, to see it go on")
    parser.add_argument("--state", type=Path, default=Path("runs/plain_loop.pt"), help="file of the checkpoint")
    args = parser.parse_args()

    if "RANK" in os.environ:  # torchrun's
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    data, test = sequences(args.examples, seed=1), sequences(1000, seed=2)
    bare = Classifier()
    model = DistributedDataParallel(bare) if world > 1 else bare
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    teacher = attent.Teacher(len(data), total_epochs=EPOCHS, ratio=0.4)
    sampler = teacher.sampler(batch_size=BATCH // world)
    loader = DataLoader(attent.indexed(data), batch_sampler=sampler)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, teacher.total_steps(batch_size=BATCH // world))

    args.state.parent.mkdir(parents=True, exist_ok=True)
    step = 0
    if args.state.is_file():
        saved = read_file(args.state)
        teacher.load_state_dict(saved["teacher"])
        bare.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        step = saved["step"]
        print(f"rank {rank}: goes on in epoch {sampler.epoch}, after step {step}")

    for epoch in range(sampler.epoch, EPOCHS):
        for ids, tokens, label in loader:
            loss, scores = model(tokens, label)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            teacher.record(ids, scores)
            step += 1
            if step % 50 == 0 or step == args.stop_after:
                state = teacher.state_dict()  # on every rank: what all of them recorded meets here
                if rank == 0:  # one file, written whole or not at all
                    learner = {"model": bare.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    write_state({**learner, "schedule": schedule.state_dict(), "teacher": state}, args.state)
            if step == args.stop_after:
                print(f"rank {rank}: stopped after step {step}; start again to go on")
                return
        with torch.no_grad():
            tokens, label = test.tensors
            accuracy = (bare(tokens).argmax(1) == label).float().mean()
        if rank == 0:
            print(f"epoch {epoch}: step {step} of {schedule.T_max}, accuracy {accuracy:.3f}")
    teacher.state_dict()  # the last scores of all ranks, for the summary
    if rank == 0:
        print(teacher.summary())
        args.state.unlink(missing_ok=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
