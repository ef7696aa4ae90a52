"""Learners on the texts, byte by byte: a small GPT from scratch, and LoRA on a trained one for instructions.

The instruction-like task is made of the texts: an instruction, the beginning of a passage, and as the answer how it
goes on, 3 to 24 bytes in the form that the instruction asks for; only the answer's bytes have a loss. Lengths are
mixed, so that ``per_example`` counts (the default, "rms", is neutral to length); examples are padded to one length, so
that a step costs the same whatever is chosen.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import attent

from ..small_gpt import BYTES, SmallGPT
from .variants import variant

IGNORED = -100
DATA_SEED = 7


@dataclass(frozen=True)
class Sizes:
    """Examples of each part, their length in bytes, and the network's sizes."""

    train: int
    validation: int
    test: int
    length: int
    width: int
    depth: int
    heads: int = 4
    variant: str = "plain"
    pretraining: tuple[int, int] = (0, 0)  # steps and batch size, before LoRA
    rank: int = 0


@dataclass(frozen=True)
class Pairs:
    """Tokens and targets [N, T]; IGNORED where there is no loss."""

    tokens: Tensor
    targets: Tensor


def windows(texts: Tensor, count: int, length: int, generator: torch.Generator) -> Pairs:
    """Random passages; token t predicts token t + 1."""
    start = torch.randint(len(texts) - length, (count, 1), generator=generator)
    window = texts[start + torch.arange(length + 1)].long()
    return Pairs(window[:, :-1], window[:, 1:])


#: Instruction -> the form of the answer.
INSTRUCTIONS: dict[bytes, Callable[[bytes], bytes]] = {
    b"go on: ": lambda text: text,
    b"capitals: ": lambda text: text.upper(),
    b"no vowels: ": lambda text: re.sub(rb"[aeiouAEIOU]", b"", text),
    b"spaced: ": lambda text: b" ".join(text[i : i + 1] for i in range(len(text))),
}
BEGINNING, SHORTEST, LONGEST = 10, 3, 24  # bytes


def instructions(texts: Tensor, count: int, length: int, generator: torch.Generator) -> Pairs:
    """Instruction, beginning, ``=``, answer, line end; padded behind."""
    tokens = torch.full((count, length), ord("\n"))
    targets = torch.full((count, length), IGNORED)
    names = list(INSTRUCTIONS)
    for row in range(count):
        start = int(torch.randint(len(texts) - BEGINNING - LONGEST, (1,), generator=generator))
        passage = bytes(texts[start : start + BEGINNING + LONGEST].tolist()).replace(b"\n", b" ")
        name = names[int(torch.randint(len(names), (1,), generator=generator))]
        size = int(torch.randint(SHORTEST, LONGEST + 1, (1,), generator=generator))
        asked = name + passage[:BEGINNING] + b"="
        answer = INSTRUCTIONS[name](passage[BEGINNING:])[:size] + b"\n"
        both = torch.tensor(list(asked + answer))
        if len(both) > length + 1:
            raise ValueError(f"length: got {length}; takes at least {len(both) - 1}")
        tokens[row, : len(both) - 1] = both[:-1]
        targets[row, len(asked) - 1 : len(both) - 1] = both[len(asked) :]
    return Pairs(tokens, targets)


class Data:
    """The parts: validation and test come from the last fifth of the texts' bytes, shuffled in blocks beforehand."""

    def __init__(self, texts: Tensor, sizes: Sizes, device: str) -> None:
        generator = torch.Generator().manual_seed(DATA_SEED)
        block = 20_000  # bytes: so that all times are in all parts
        blocks = texts[: len(texts) // block * block].view(-1, block)
        blocks = blocks[torch.randperm(len(blocks), generator=generator)]
        held_out = len(blocks) // 5
        self.texts, others = blocks[held_out:].flatten(), blocks[:held_out].flatten()
        make = instructions if sizes.rank else windows
        train = make(self.texts, sizes.train, sizes.length, generator)
        ids, _ = variant(sizes.variant, torch.zeros(sizes.train, dtype=torch.int64), 1, sizes.train)
        self.train = _to(Pairs(train.tokens[ids], train.targets[ids]), device)
        self.parts = {
            part: _to(make(others, count, sizes.length, generator), device)
            for part, count in (("validation", sizes.validation), ("test", sizes.test))
        }


class LanguageModel:
    """A SmallGPT, or one with LoRA. Metric: mean loss of an example, in bits per byte."""

    def __init__(self, data: Data, model: nn.Module) -> None:
        self.data, self.model = data, model
        self.num_examples = len(data.train.tokens)
        self.head = model.get_submodule("base_model.model.head" if hasattr(model, "base_model") else "head")

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def batch(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self.data.train.tokens[ids], self.data.train.targets[ids]

    def losses(self, *batch: Tensor, score: str | None) -> tuple[Tensor, Tensor | None]:
        tokens, targets = batch
        result = attent.linear_cross_entropy(
            self.model(tokens),
            self.head.weight,
            targets,
            reduction="example",
            ignore_index=IGNORED,
            score=score,
        )
        return (result, None) if score is None else result

    @torch.no_grad()
    def evaluate(self, part: str) -> float:
        pairs = self.data.parts[part]
        total = 0.0
        for tokens, targets in zip(pairs.tokens.split(100), pairs.targets.split(100), strict=True):
            total += float(self.losses(tokens, targets, score=None)[0].sum())
        return total / len(pairs.tokens) / math.log(2)


def gpt(data: Data, sizes: Sizes, device: str) -> LanguageModel:
    """From scratch."""
    return LanguageModel(data, _new(sizes).to(device))


def with_lora(data: Data, sizes: Sizes, device: str) -> LanguageModel:
    """A GPT trained on the texts (once a process, always the same), all but low-rank updates of its layers frozen."""
    from peft import LoraConfig, get_peft_model

    model = _new(sizes)
    model.load_state_dict(_pretrained(data, sizes, device))
    targets = r".*\.(qkv|merge|perceptron\.0|perceptron\.2)"
    config = LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules=targets)
    return LanguageModel(data, get_peft_model(model.to(device), config))


def _new(sizes: Sizes) -> SmallGPT:
    return SmallGPT(sizes.length, width=sizes.width, heads=sizes.heads, depth=sizes.depth, vocabulary=BYTES)


@functools.lru_cache(maxsize=1)
def _pretrained(data: Data, sizes: Sizes, device: str) -> dict[str, Tensor]:
    """Weights after ``sizes.pretraining`` on windows of the training texts."""
    steps, batch_size = sizes.pretraining
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DATA_SEED)
        model = _new(sizes).to(device)
    generator = torch.Generator().manual_seed(DATA_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        pairs = _to(windows(data.texts, batch_size, sizes.length, generator), device)
        loss = attent.linear_cross_entropy(model(pairs.tokens), model.head.weight, pairs.targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _to(pairs: Pairs, device: str) -> Pairs:
    return Pairs(pairs.tokens.to(device), pairs.targets.to(device))
