"""The command line of ``attent bench``: one workload of your own shape, its table, and where the result is from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .._checks import refuse
from . import attention, linear_cross_entropy, select, steps
from .contenders import Workload, failures, measure, table
from .devices import Device
from .provenance import gpu_provenance

#: Distributions whose versions a result depends on.
RIVALS = ("liger-kernel", "cut-cross-entropy", "nvidia-cutlass-dsl")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Counted rounds of each contender. A GPU's are cheap beside what warms them up.
ROUNDS = {"cuda": 20, "cpu": 9}


def bench(asked: argparse.Namespace) -> int:
    """Measure, print, write; 0, or 1 if anything of attent's failed or was outside its error budget."""
    workload: Workload = asked.workload(asked)
    known = [contender.name for contender in workload.contenders.all]
    if unknown := [name for name in asked.contenders if name not in known]:
        refuse("--contenders", ", ".join(unknown), ", ".join(known))
    if asked.out is not None and not asked.out.parent.is_dir():
        refuse("--out", asked.out, "a file in a folder that exists")
    device = Device(asked.device)
    ceilings = device.ceilings(dtype=DTYPES[asked.dtype])
    print(f"{asked.device}, {asked.dtype}; {device.policy}")
    print(
        f"measured here: copy {ceilings['copy, bytes a second'] / 1e9:.1f} GB/s, matrix product"
        f" {ceilings['matrix product, FLOPs a second'] / 1e12:.2f} TFLOP/s ({ceilings['measured by']})\n"
    )
    try:
        row = measure(workload, device, ceilings, asked.rounds or ROUNDS[asked.device], tuple(asked.contenders))
    except torch.OutOfMemoryError as error:
        refuse(
            "the shape", str(error).split("\n")[0], "one whose inputs and whose truth in plain PyTorch fit in memory"
        )
    print(table(workload.key, row))
    if asked.out is not None:
        result = {"benchmark": asked.what, "provenance": gpu_provenance(RIVALS), "rows": {workload.key: row}}
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(asked.out)
    return 1 if failures(row) else 0


# ------------------------------------------------------------------------------------------------------------ workloads


def _attention(asked: argparse.Namespace) -> Workload:
    keys = asked.keys or asked.queries
    if asked.causal and keys != asked.queries:
        refuse("--keys", keys, "as many as --queries with --causal: libraries disagree on which keys others may see")
    shape = {"B": asked.batch, "H": asked.heads, "KV": asked.kv_heads or asked.heads, "Tq": asked.queries, "Tk": keys}
    if shape["H"] % shape["KV"]:
        refuse("--kv-heads", asked.kv_heads, f"a divisor of --heads={asked.heads}")
    shape |= {"D": asked.head_dim, "causal": asked.causal, "classes": asked.classes}
    name = f"{'causal' if asked.causal else 'full'}, T {asked.queries}" + (
        f" and {keys}" if keys != asked.queries else ""
    )
    return attention.workload(name, shape, DTYPES[asked.dtype], asked.device)


def _loss(asked: argparse.Namespace) -> Workload:
    if asked.tokens % asked.tokens_each:
        refuse("--tokens-each", asked.tokens_each, f"a divisor of --tokens={asked.tokens}")
    shape = {"tokens": asked.tokens, "width": asked.width, "vocabulary": asked.vocabulary}
    shape |= {"tokens each": asked.tokens_each, "targets": asked.targets}
    return linear_cross_entropy.workload(shape, DTYPES[asked.dtype], asked.train)


def _select(asked: argparse.Namespace) -> Workload:
    if asked.k > asked.n:
        refuse("--k", asked.k, f"at most --n={asked.n}")
    if asked.dtype != "float32":
        refuse("--dtype", asked.dtype, "float32: scores are")
    return select.workload(asked.n, asked.k, asked.draw, asked.ties)


def _learner(asked: argparse.Namespace) -> dict[str, Any]:
    if asked.width % asked.heads:
        refuse("--heads", asked.heads, f"a divisor of --width={asked.width}")
    return {"B": asked.batch, "T": asked.tokens, "D": asked.width, "heads": asked.heads, "depth": asked.depth}


def _harvest(asked: argparse.Namespace) -> Workload:
    if asked.batch > steps.EXAMPLES:
        refuse("--batch", asked.batch, f"at most {steps.EXAMPLES}, the teacher's examples")
    return steps.harvest(_learner(asked) | {"V": asked.vocabulary}, DTYPES[asked.dtype])


def _one_pass(asked: argparse.Namespace) -> Workload:
    return steps.one_pass(_learner(asked) | {"classes": asked.classes}, DTYPES[asked.dtype])


# --------------------------------------------------------------------------------------------------------------- parser

#: what: (workload, help, options whose values are sizes, flags)
Sizes = dict[str, tuple[int | None, str]]
WHAT: dict[str, tuple[Callable[[argparse.Namespace], Workload], str, Sizes, dict[str, str]]] = {
    "attention": (
        _attention,
        "scored_attention beside attention alone and attention with eager scoring",
        {
            "--batch": (4, "examples"),
            "--heads": (8, "heads of the query"),
            "--kv-heads": (None, "heads of key and value (default: --heads)"),
            "--queries": (1024, "tokens of the query"),
            "--keys": (None, "tokens of the key (default: --queries)"),
            "--head-dim": (64, "width of a head"),
        },
        {"--causal": "query t sees keys up to t"},
    ),
    "loss": (
        _loss,
        "linear_cross_entropy and its scores beside eager PyTorch, rivals, and the matrix products alone",
        {
            "--tokens": (1024, "tokens in all"),
            "--width": (768, "width of the hidden states"),
            "--vocabulary": (50257, "classes"),
            "--tokens-each": (256, "tokens of an example; 1 for a classifier"),
        },
        {"--train": "forward and backward, not the forward alone"},
    ),
    "select": (
        _select,
        "select_top_k beside torch.topk and a stable torch.sort",
        {"--n": (1_000_000, "scores"), "--k": (1024, "how many are chosen")},
        {"--draw": "Gumbel noise at temperature 1 and a floor of 0.2, not hard", "--ties": "many equal scores"},
    ),
    "harvest": (
        _harvest,
        "training step of a GPT with a teacher beside the same without",
        {
            "--batch": (4, "examples"),
            "--tokens": (128, "tokens of an example"),
            "--width": (128, "width"),
            "--heads": (4, "heads"),
            "--depth": (2, "layers"),
            "--vocabulary": (8192, "classes"),
        },
        {},
    ),
    "one-pass": (
        _one_pass,
        "step of a classifier that learns from half of each pool beside the step on all of it",
        {
            "--batch": (32, "examples of the pool"),
            "--tokens": (65, "tokens of an example"),
            "--width": (192, "width"),
            "--heads": (3, "heads"),
            "--depth": (4, "layers"),
            "--classes": (10, "classes"),
        },
        {},
    ),
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``attent bench`` to the command line."""
    command = commands.add_parser(
        "bench",
        help="attent beside plain PyTorch and its rivals, at your shapes",
        description="Time attent beside plain PyTorch and its rivals at one shape. Every contender first has to be "
        "right, within an error budget; those that are run in turn, on a GPU each from a cold L2 cache. Times are "
        "medians with half the width of the middle half; beside them stands the bound from copy bandwidth and matrix "
        "product, both measured in the same run.",
    )
    workloads = command.add_subparsers(dest="what", required=True, metavar="WHAT")
    gpu = torch.cuda.is_available()
    for what, (workload, summary, sizes, flags) in WHAT.items():
        parser = workloads.add_parser(what, help=summary, description=summary[0].upper() + summary[1:] + ".")
        parser.set_defaults(workload=workload)
        for option, (default, words) in sizes.items():
            shown = words if default is None else f"{words} (default: {default})"
            parser.add_argument(option, type=_positive, default=default, metavar="N", help=shown)
        for option, words in flags.items():
            parser.add_argument(option, action="store_true", help=words)
        if what == "attention":
            parser.add_argument(
                "--classes", type=int, default=0, metavar="C", help="of a readout; 0: scored against a target (default)"
            )
        if what == "loss":
            targets = parser.add_argument("--targets", choices=("random", "half confident"), default="random")
            targets.help = "'half confident': every second token is predicted well, as in training"
        devices = ("cuda", "cpu") if gpu else ("cpu",)
        parser.add_argument("--device", choices=devices, default=devices[0])
        usual = "bfloat16" if gpu and what != "select" else "float32"
        parser.add_argument("--dtype", choices=tuple(DTYPES), default=usual, help=f"(default: {usual})")
        parser.add_argument(
            "--rounds", type=_positive, metavar="N", help="counted rounds (default: 20 on a GPU, 9 on a CPU)"
        )
        parser.add_argument("--contenders", nargs="+", default=[], metavar="NAME", help="only these")
        parser.add_argument("--out", type=Path, metavar="JSON", help="write the result and where it is from there")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}; takes an int from 1")
    return value
