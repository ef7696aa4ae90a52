"""Probe a pretrained model: which package of Python's standard library is a docstring from?

The body is frozen, so its features are computed once. What learns is an attention pool with a linear readout, whose one
operation returns losses and scores; the teacher spends each epoch on the texts that the probe has not learnt yet.

    python examples/probe_frozen_features.py [--model FOLDER] [--backend auto]

Prints accuracy and measured seconds with the teacher, with all texts, and with all texts for as many steps as the
teacher took. Its seconds are few and its test texts are some hundreds: a look at how it is used, not evidence.
"""

from __future__ import annotations

import argparse
import time

import torch
from pretrained import PACKAGES, docstrings, hidden_states, load_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import attent

BATCH = 32


def train(
    features: Tensor, lengths: Tensor, labels: Tensor, epochs: int, ratio: float, backend: str
) -> tuple[attent.AttentiveClassifier, int, float]:
    """A probe trained for ``epochs`` at this keep ratio (1: all texts), its number of steps and its seconds."""
    torch.manual_seed(0)
    probe = attent.AttentiveClassifier(features.shape[-1], num_heads=6, num_classes=len(PACKAGES))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.01)
    teacher = attent.Teacher(len(labels), total_epochs=epochs, ratio=ratio)
    sampler = teacher.sampler(batch_size=BATCH)
    loader = DataLoader(attent.indexed(TensorDataset(features, lengths, labels)), batch_sampler=sampler)
    steps = teacher.total_steps(batch_size=BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    start = time.perf_counter()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for ids, x, n, y in loader:
            out = probe(x, y, key_lengths=n, backend=backend)
            out.losses.mean().backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()
            teacher.record(ids, out.scores)
    return probe, steps, time.perf_counter() - start


@torch.no_grad()
def accuracy(probe: attent.AttentiveClassifier, features: Tensor, lengths: Tensor, labels: Tensor) -> float:
    return float((probe(features, key_lengths=lengths).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a folder as transformers saves it (default: MiniLM, from PyPI)")
    parser.add_argument("--texts", type=int, default=120, help="docstrings of each package, at most")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--backend", default="auto")
    arguments = parser.parse_args()

    tokenizer, model = load_model(arguments.model)
    pairs = docstrings(arguments.texts)
    features, lengths = hidden_states(tokenizer, model, [text for text, _ in pairs], length=48)
    labels = torch.tensor([label for _, label in pairs])
    held_out = len(labels) // 4
    test, learn = slice(0, held_out), slice(held_out, None)
    print(f"{len(labels) - held_out} texts to learn from, {held_out} to test, {len(PACKAGES)} classes")

    def run(name: str, epochs: int, ratio: float) -> int:
        probe, steps, seconds = train(features[learn], lengths[learn], labels[learn], epochs, ratio, arguments.backend)
        percent = 100 * accuracy(probe, features[test], lengths[test], labels[test])
        print(f"{name:<24} {steps:5d} steps {seconds:6.1f} s   accuracy {percent:5.1f} %")
        return steps

    steps = run(f"attent, ratio {arguments.ratio}", arguments.epochs, arguments.ratio)
    per_epoch = (len(labels) - held_out) // BATCH
    run("all texts, as many steps", max(1, round(steps / per_epoch)), 1.0)
    run("all texts", arguments.epochs, 1.0)


if __name__ == "__main__":
    main()
