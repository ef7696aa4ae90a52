"""``python -m benchmarks.resources``: what every Triton kernel takes of a GPU, compiled where there is none.

For sm_80, sm_90 and sm_100: registers a thread, stack (spills), shared memory, which tensor core instructions the main
loop has, and whether a block barrier lies before every ticket. ``--check`` fails on a stack, on too much shared memory,
on a ticket without barrier, and where sm_90's warpgroup products are missing.

``--cuda``: the same of the CUDA C++ kernels, from the module that ``make cuda`` builds (``cuda_resources.py``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import cuda_resources
from .ahead_of_time import CAPABILITIES, SHARED_LIMIT, Compiled, compiled_for, unordered_tickets
from .resource_cases import Case, cases, with_triton


def compile_case(case: Case, capability: int) -> list[Compiled]:
    """The kernels that a case launches, each once for every way it is specialised."""
    with compiled_for(capability) as found:
        case.launch()
    return list(dict.fromkeys(found))


def problems(case: Case, kernels: list[Compiled]) -> Iterator[str]:
    """What is wrong with them."""
    for kernel in kernels:
        limit = SHARED_LIMIT[kernel.capability]
        if kernel.stack > 0:
            yield f"{kernel.kernel} has a stack of {kernel.stack} bytes a thread: spills, or calls"
        if kernel.shared > limit:
            yield f"{kernel.kernel} takes {kernel.shared} bytes of shared memory of {limit}"
        for instruction in unordered_tickets(kernel.ptx):
            yield f"{kernel.kernel} takes a ticket with no barrier behind its stores: {instruction}"
    if case.wgmma and kernels and kernels[0].capability == 90 and not any(kernel.has_wgmma for kernel in kernels):
        yield f"no warpgroup products (wgmma) in {', '.join(sorted({kernel.kernel for kernel in kernels}))}"


def instructions(kernel: Compiled) -> str:
    """Which tensor core instructions a kernel has."""
    if kernel.has_wgmma:
        return "wgmma"
    return "tcgen05" if "tcgen05.mma" in kernel.ptx else "mma" if kernel.has_mma else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", nargs="+", choices=with_triton(), default=with_triton())
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases whose name holds this text")
    parser.add_argument("--capability", nargs="+", type=int, choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--decisive", action="store_true", help="only what the tests compile")
    parser.add_argument("--check", action="store_true", help="exit with 1 if anything is wrong")
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--cuda", action="store_true", help="the CUDA C++ kernels of a built native module instead")
    parser.add_argument("--module", type=Path, help="that module; by default make cuda's, else the installed one")
    asked = parser.parse_args(arguments)
    if asked.cuda:
        return cuda(asked.module, asked.json, asked.check)
    rows: list[dict[str, Any]] = []
    wrong = 0
    sizes = f"{'warps':>5} {'stages':>6} {'registers':>9} {'stack':>5} {'shared':>7}"
    print(f"{'sm':>3}  {'kernel':34} {sizes}  products  case")
    for case in cases():
        if case.op not in asked.op or asked.case not in case.name or (asked.decisive and not case.decisive):
            continue
        for capability in asked.capability:
            try:
                kernels = compile_case(case, capability)
                complaints = list(problems(case, kernels))
            except Exception as error:  # what does not compile must not hide what does
                kernels, complaints = [], [f"{type(error).__name__}: {error}".split("\n")[0]]
            for kernel in kernels:
                print(
                    f"{capability:3}  {kernel.kernel:34} {kernel.warps:5} {kernel.stages:6} {kernel.registers:9}"
                    f" {kernel.stack:5} {kernel.shared:7}  {instructions(kernel):8}  {case.op}: {case.name}",
                    flush=True,
                )
                numbers = kernel._asdict() | {"ptx": None, "products": instructions(kernel)}
                rows.append({"op": case.op, "case": case.name} | {k: v for k, v in numbers.items() if k != "ptx"})
            for complaint in complaints:
                print(f"{capability:3}  WRONG: {complaint}  {case.op}: {case.name}", flush=True)
            wrong += len(complaints)
    write(asked.json, rows)
    print(f"{len(rows)} kernels, {wrong} things wrong")
    return 1 if wrong and asked.check else 0


def cuda(module: Path | None, to: Path | None, check: bool) -> int:
    """The table of a native module's CUDA kernels."""
    module = module or cuda_resources.built_module()
    if module is None:
        print("there is no native module with CUDA kernels: make cuda builds one", file=sys.stderr)
        return 2
    found = cuda_resources.functions(module)
    for line in cuda_resources.table(found):
        print(line)
    wrong = list(cuda_resources.problems(found))
    for complaint in wrong:
        print(f"WRONG: {complaint}")
    write(to, [function._asdict() for function in found])
    print(f"{len(found)} kernels, {len(wrong)} things wrong")
    return 1 if wrong and check else 0


def write(to: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write the table where it was asked for."""
    if to is None:
        return
    from .provenance import gpu_provenance

    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps({"provenance": gpu_provenance(), "kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
