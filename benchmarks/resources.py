"""``python -m benchmarks.resources``: what every Triton kernel takes of a GPU, compiled where there is none.

For sm_80, sm_90 and sm_100: registers a thread, stack (spills), shared memory, which tensor core instructions the main
loop has, whether a block barrier lies before every ticket, and the processor seconds of compiling (next to none where
Triton's cache has it). ``--check`` fails on a stack, on too much shared memory, on a ticket without barrier, on a slow
compilation, and where sm_90's warpgroup products are missing.

``--cuda``: the same of the CUDA C++ kernels, from the module that ``make cuda`` builds (``cuda_resources.py``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import cuda_resources
from .ahead_of_time import CAPABILITIES, SHARED_LIMIT, Compiled, compiled_for, unordered_tickets
from .provenance import gpu_provenance, save
from .resource_cases import Case, cases, with_triton

#: Processor time that a kernel may take to compile, whatever k, the lengths or the vocabulary are.
COMPILE_SECONDS = 30


def compile_case(case: Case, capability: int) -> list[Compiled]:
    """The kernels that a case launches, each once for every way it is specialised."""
    with compiled_for(capability) as found:
        case.launch()
    first: dict[Compiled, Compiled] = {}
    for kernel in found:  # a second launch compiles nothing
        first.setdefault(kernel._replace(seconds=0.0), kernel)
    return list(first.values())


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
        if kernel.seconds > COMPILE_SECONDS:
            yield f"{kernel.kernel} took {kernel.seconds:.0f} s of processor time to compile, of {COMPILE_SECONDS}"
        if kernel.capability == 90 and kernel.kernel in case.wgmma and not kernel.has_wgmma:
            yield f"{kernel.kernel} has no warpgroup products (wgmma)"
    for missing in sorted(set(case.wgmma) - {kernel.kernel for kernel in kernels}):
        yield f"{missing} is not launched"


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
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/resources")
    parser.add_argument("--cuda", action="store_true", help="the CUDA C++ kernels of a built native module instead")
    parser.add_argument("--module", type=Path, help="that module; by default make cuda's, else the installed one")
    asked = parser.parse_args(arguments)
    if asked.cuda:
        return cuda(asked.module, asked.save, asked.check)
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    sizes = f"{'warps':>5} {'stages':>6} {'registers':>9} {'stack':>5} {'shared':>7} {'seconds':>7}"
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
                    f" {kernel.stack:5} {kernel.shared:7} {kernel.seconds:7.1f}  {instructions(kernel):8}"
                    f"  {case.op}: {case.name}",
                    flush=True,
                )
                numbers = {name: value for name, value in kernel._asdict().items() if name not in ("ptx", "seconds")}
                rows.append({"op": case.op, "case": case.name, **numbers, "products": instructions(kernel)})
            for complaint in complaints:
                print(f"{capability:3}  WRONG: {complaint}  {case.op}: {case.name}", flush=True)
                wrong.append(f"sm_{capability}, {case.op}: {case.name}: {complaint}")
    if asked.save:
        what = {"capabilities": asked.capability, "wrong": wrong, "kernels": rows}
        print(f"saved to {save('resources', {'provenance': gpu_provenance()} | what)}")
    print(f"{len(rows)} kernels, {len(wrong)} things wrong")
    return 1 if wrong and asked.check else 0


def cuda(module: Path | None, keep: bool, check: bool) -> int:
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
    if keep:
        result = {"provenance": gpu_provenance(), "wrong": wrong, "kernels": [function._asdict() for function in found]}
        print(f"saved to {save('resources_cuda', result)}")
    print(f"{len(found)} kernels, {len(wrong)} things wrong")
    return 1 if wrong and check else 0


if __name__ == "__main__":
    sys.exit(main())
