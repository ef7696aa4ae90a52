"""``python -m benchmarks.score_quality --texts DIR_OR_TAR``: which score ranks examples like the true gradient norm?

The true norm of example i is that of the gradient of its own loss L_i = s Σ_t ℓ_t in *all* parameters, by one autograd
call per example. Beside it stand all scores of the same forward: their rank correlation with it (Spearman), and whom
they choose. Four learners, each at initialisation, early, and after a brief training:

GPT, one length         bytes of the texts, every example as long: s changes nothing
GPT, small embeddings   the same from embeddings of standard deviation 0.02, as GPT-2 starts, instead of PyTorch's 1:
                        the first layer norm then multiplies their gradients, which outweigh all others in the norm
GPT, mixed lengths      lengths log-uniform: s = 1/n, 1/√n and 1 choose different examples
ViT                     the demo's, on its images: one token per example, so s changes nothing

So the norm over all parameters but the embeddings (of tokens or patches, and positions) is measured too.

Each with several seeds, which draw weights, batches and the examples that are scored.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attent
from attent.demo.data import Images, load
from attent.demo.learner import VisionTransformer

from .provenance import provenance, save
from .small_gpt import SmallGPT, read_texts

SCORES = ("loss", "logit", "hidden", "head")
PER_EXAMPLE = ("mean", "rms", "sum")
IGNORED = -100


class Examples(NamedTuple):
    input: Tensor  # [B, ...]
    target: Tensor  # [B, T]; IGNORED behind an example's end
    lengths: Tensor  # [B]

    def one(self, i: int) -> Examples:
        """Example i alone, without padding."""
        n = int(self.lengths[i])
        clipped = self.input[i : i + 1, :n] if self.input.dim() == 2 else self.input[i : i + 1]
        return Examples(clipped, self.target[i : i + 1, :n], self.lengths[i : i + 1])


class Learner(NamedTuple):
    """A model as hidden states and a linear head, and where its examples come from."""

    model: nn.Module
    hidden: Callable[[Tensor], Tensor]  # input -> [B, T, D]
    head: nn.Linear
    draw: Callable[[int], Examples]


class Scale(NamedTuple):
    """How much is trained and scored."""

    at: tuple[int, ...] = (0, 100, 300)  # training steps after which examples are scored
    batch: int = 16
    examples: int = 200
    length: int = 64  # of the GPT's examples where all are as long
    lengths: tuple[int, int] = (8, 128)  # and where they are not


def fixed_lengths(scale: Scale, generator: torch.Generator, count: int) -> Tensor:
    return torch.full((count,), scale.length)


def mixed_lengths(scale: Scale, generator: torch.Generator, count: int) -> Tensor:
    """Log-uniform."""
    low, high = (math.log(n) for n in scale.lengths)
    return (low + (high - low) * torch.rand(count, generator=generator)).exp().round().long()


def gpt(
    texts: Tensor,
    scale: Scale,
    lengths_of: Callable[[Scale, torch.Generator, int], Tensor],
    seed: int,
    embedding_std: float = 1.0,
) -> Learner:
    generator = torch.Generator().manual_seed(seed)
    model = SmallGPT(max(scale.length, scale.lengths[1]), embedding_std=embedding_std)

    def draw(count: int) -> Examples:
        lengths = lengths_of(scale, generator, count)
        T = int(lengths.max())
        start = torch.randint(len(texts) - T, (count, 1), generator=generator)
        window = texts[start + torch.arange(T + 1)].long()  # [B, T + 1]
        behind = torch.arange(T) >= lengths[:, None]
        return Examples(window[:, :-1], window[:, 1:].masked_fill(behind, IGNORED), lengths)

    return Learner(model, model, model.head, draw)


def vit(images: Images, seed: int) -> Learner:
    generator = torch.Generator().manual_seed(seed)
    model = VisionTransformer()
    readout = model.classifier.readout

    def draw(count: int) -> Examples:
        ids = torch.randperm(len(images.train_images), generator=generator)[:count]
        return Examples(images.train_images[ids], images.train_labels[ids, None], torch.ones(count, dtype=torch.long))

    def hidden(input: Tensor) -> Tensor:
        """What the readout reads, as one token per example."""
        anything = torch.zeros(len(input), dtype=torch.long)
        pooled = model(input, anything, None).pooled
        assert pooled is not None
        return pooled[:, None]

    return Learner(model, hidden, readout, draw)


# ------------------------------------------------------------------------------------------------------------ measures


def train(learner: Learner, scale: Scale) -> Iterator[int]:
    """AdamW at a constant rate on the mean loss over tokens; yields at each step of ``scale.at``."""
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=2e-3)
    for step in range(max(scale.at) + 1):
        if step in scale.at:
            yield step
        examples = learner.draw(scale.batch)
        logits = learner.head(learner.hidden(examples.input))
        F.cross_entropy(logits.flatten(0, 1), examples.target.flatten(), ignore_index=IGNORED).backward()
        optimizer.step()
        optimizer.zero_grad()


def true_norms(learner: Learner, examples: Examples) -> dict[str, Tensor]:
    """‖∂ Σ_t ℓ_t / ∂θ‖ of each example alone, [B]: θ all parameters, or all but the embeddings."""
    names = [name.partition(".")[0] for name, _ in learner.model.named_parameters()]
    inner = torch.tensor([name not in ("embed", "position") for name in names])
    norms = []
    for i in range(len(examples.target)):
        example = examples.one(i)
        logits = learner.head(learner.hidden(example.input))
        loss = F.cross_entropy(logits.flatten(0, 1), example.target.flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, list(learner.model.parameters()))
        norms.append(torch.stack([gradient.norm() for gradient in gradients]))
    each = torch.stack(norms)  # [B, tensors]
    return {"all parameters": each.norm(dim=1), "all but embeddings": each[:, inner].norm(dim=1)}


def scores_of(learner: Learner, examples: Examples) -> dict[str, Tensor]:
    """Every score under ``per_example="sum"`` [B] (``"loss"``: the mean loss), out of one batched forward."""
    with torch.no_grad():
        hidden = learner.hidden(examples.input)
        _, scores = attent.linear_cross_entropy(
            hidden, learner.head.weight, examples.target, linear_bias=learner.head.bias, score=SCORES,
            per_example="sum", ignore_index=IGNORED,
        )  # fmt: skip
    return dict(scores)


def scaled(values: Tensor, lengths: Tensor, per_example: str) -> Tensor:
    """Norms of Σ_t ℓ_t times s."""
    return values * {"mean": 1 / lengths, "rms": lengths.rsqrt(), "sum": torch.ones_like(lengths)}[per_example]


def spearman(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of their ranks."""

    def ranks(values: Tensor) -> Tensor:
        below = (values[:, None] > values).sum(1)
        equal = (values[:, None] == values).sum(1)
        return below + (equal - 1) / 2

    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]).double())[0, 1])


def shares_chosen(values: Tensor, lengths: Tensor) -> dict[str, float]:
    """Which part of the shortest and of the longest third is among the higher half of the values."""
    chosen = torch.zeros(len(values))
    chosen[attent.select_top_k(values, len(values) // 2).index] = 1
    by_length = lengths.argsort(stable=True)
    third = len(values) // 3
    return {"short": float(chosen[by_length[:third]].mean()), "long": float(chosen[by_length[-third:]].mean())}


def measure(learner: Learner, scale: Scale) -> Iterator[dict[str, Any]]:
    """One entry per step of ``scale.at``: rank correlations and, where lengths differ, who is chosen."""
    for step in train(learner, scale):
        examples = learner.draw(scale.examples)
        scores, true = scores_of(learner, examples), true_norms(learner, examples)
        lengths = examples.lengths.to(scores["loss"].dtype)
        one_length = bool((lengths == lengths[0]).all())
        scalings = ("sum",) if one_length else PER_EXAMPLE
        candidates = {("loss", "mean"): scores["loss"]}
        candidates |= {(name, s): scaled(scores[name], lengths, s) for name in SCORES[1:] for s in scalings}
        truths = {of: {s: scaled(norms, lengths, s) for s in scalings} for of, norms in true.items()}
        entry: dict[str, Any] = {"step": step, "mean loss": float(scores["loss"].mean()), "scores": []}
        embeddings = 1 - (true["all but embeddings"] / true["all parameters"]).square()
        entry["embeddings' share of the squared norm"] = float(embeddings.mean())
        for (name, s), values in candidates.items():
            row: dict[str, Any] = {"score": name, "per_example": s}
            for of, by_scaling in truths.items():
                row[f"spearman, {of}"] = {s: spearman(values, truth) for s, truth in by_scaling.items()}
            if not one_length:
                row["chosen"] = shares_chosen(values, lengths)
            entry["scores"].append(row)
        if not one_length:
            by_scaling = truths["all parameters"]
            entry["true norm chooses"] = {s: shares_chosen(truth, lengths) for s, truth in by_scaling.items()}
        yield entry


def spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values),
        "low": min(values),
        "high": max(values),
    }


def over_seeds(runs: list[Any]) -> Any:
    """The same structure with every number replaced by its spread over the runs; equal things are kept."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: over_seeds([run[key] for run in runs]) for key in first}
    if isinstance(first, list):
        return [over_seeds(list(entries)) for entries in zip(*runs, strict=True)]
    return spread(runs) if isinstance(first, float) else first


def run(texts: Tensor, images: Images, scale: Scale, seeds: int) -> dict[str, Any]:
    learners: dict[str, Callable[[int], Learner]] = {
        "GPT, one length": lambda seed: gpt(texts, scale, fixed_lengths, seed),
        "GPT, small embeddings": lambda seed: gpt(texts, scale, fixed_lengths, seed, embedding_std=0.02),
        "GPT, mixed lengths": lambda seed: gpt(texts, scale, mixed_lengths, seed),
        "ViT": lambda seed: vit(images, seed),
    }
    result: dict[str, Any] = {"provenance": provenance(), "seeds": seeds, "scale": scale._asdict()}
    settings = {}
    for name, make in learners.items():
        start, runs = time.process_time(), []
        for seed in range(seeds):
            torch.manual_seed(seed)
            learner = make(seed)
            runs.append(list(measure(learner, scale)))
        parameters = sum(p.numel() for p in learner.model.parameters())
        settings[name] = {"parameters": parameters, "processor seconds": time.process_time() - start}
        settings[name]["steps"] = over_seeds(runs)
        print(name, f"{settings[name]['processor seconds']:.0f} s", flush=True)
        for row in settings[name]["steps"][-1]["scores"]:
            shown = ", ".join(
                f"{s} {v['mean']:.2f} ± {v['sd']:.2f}" for s, v in row["spearman, all parameters"].items()
            )
            print(f"  {row['score']:7} {row['per_example']:5} Spearman with the true norm: {shown}", flush=True)
    return result | {"learners": settings}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--texts", required=True, help="a folder or a tar archive of .txt files")
    parser.add_argument("--images", default="subset", help="as attent demo's --data (default: the shipped subset)")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/score_quality/")
    asked = parser.parse_args(arguments)
    if asked.seeds < 2:
        parser.error("--seeds: one seed has no spread; takes 2 or more")
    torch.set_num_threads(1)
    result = run(read_texts(asked.texts), load(asked.images), Scale(), asked.seeds)
    if asked.save:
        print(save("score_quality", result))
    else:
        print(json.dumps(result["provenance"]))


if __name__ == "__main__":
    main()
