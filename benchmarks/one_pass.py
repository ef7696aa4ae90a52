"""One-pass teaching beside two-pass, masked loss and full training: step time over a full step, one thread, on a ViT.

python -m benchmarks.one_pass [--ratios 0.25 0.5 0.75] [--rounds 5] [--save]

The figure is processor time of the process, rounds interleaved over the contenders, median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attent
from benchmarks.provenance import provenance, save
from benchmarks.timing import interleave, ratio

BATCH, TOKENS, WIDTH, HEADS, DEPTH, CLASSES = 64, 65, 192, 3, 6, 10


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.feed(self.norm2(x))


def contenders(keep: float) -> dict[str, Callable[[], object]]:
    """Each: one step's forward and backward; the optimizer, the same for all, is left out."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(DEPTH)), nn.LayerNorm(WIDTH))
    head = nn.Linear(WIDTH, CLASSES)
    x, labels = torch.randn(BATCH, TOKENS, WIDTH), torch.randint(CLASSES, (BATCH,))
    chosen = int(keep * BATCH + 0.5)

    def losses(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(model(x)[:, 0]), labels, reduction="none")

    def clear() -> None:
        model.zero_grad()
        head.zero_grad()

    def full() -> None:
        clear()
        torch.autograd.backward(losses(x, labels).mean())

    def masked() -> None:
        clear()
        of_all = losses(x, labels)
        torch.autograd.backward(of_all[of_all.detach().topk(chosen).indices].mean())

    def taught(engine: str) -> Callable[[], None]:
        step = attent.OnePass(losses, engine=engine)

        def run() -> None:
            clear()
            of_all = step(x, labels)
            step.backward(of_all, of_all.detach().topk(chosen).indices)

        return run

    return {"full": full, "masked": masked, "eager": taught("eager"), "two_pass": taught("two_pass")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"provenance": provenance(), "clock": "process CPU time", "rows": []}
    for keep in options.ratios:
        timings = interleave(contenders(keep), options.rounds, warmup=2)
        row = {"r": keep, "full_seconds": timings["full"].spread("cpu")}
        for name in ("eager", "two_pass", "masked"):
            row[name] = ratio(timings[name], timings["full"], "cpu")
        result["rows"].append(row)
        theory = {"eager": (1 + 2 * keep) / 3, "two_pass": (1 + 3 * keep) / 3, "masked": 1.0}
        shares = (f"{x} {row[x]['median']:.2f} [{row[x]['low']:.2f}, {row[x]['high']:.2f}]" for x in theory)
        counted = ", ".join(f"{name} {cost:.2f}" for name, cost in theory.items())
        print(
            f"r = {keep:.2f}: {', '.join(shares)} of a full step (counting forward 1, backward 2: {counted})",
            flush=True,
        )
    if options.save:
        print(save("one_pass", result))
    else:
        print(json.dumps(result["provenance"]))


if __name__ == "__main__":
    main()
