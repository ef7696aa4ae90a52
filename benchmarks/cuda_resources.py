"""What the CUDA kernels of a built native module take of a GPU, read from its machine code: no GPU is needed.

``python -m benchmarks.resources --cuda`` prints it. ptxas' report in the module (``cuobjdump -res-usage``) has the
registers, stack and shared memory; its machine code (``cuobjdump -sass``) the instructions. cuobjdump and nvdisasm come
with Triton or with CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .cuda_kernels import KERNELS, Kernel

#: Where ``make cuda`` leaves its module.
BUILT = Path(__file__).resolve().parent.parent / "build" / "cuda-module" / "attent_kernels"

#: What is counted: the name in the table, and the instructions. Products of warpgroups and of warps; loads of tiles
#: from shared memory; copies to it, by threads and by the tensor memory accelerator; spills; accesses of 16 bytes.
COUNTED = {
    "HGMMA": re.compile(r"\bHGMMA\b"),
    "HMMA": re.compile(r"\bHMMA\b"),
    "LDSM": re.compile(r"\bLDSM\b"),
    "LDGSTS": re.compile(r"\bLDGSTS\b"),
    "UTMALDG": re.compile(r"\bUTMALDG\b"),
    "USETMAXREG": re.compile(r"\bUSETMAXREG\b"),
    "LDL, STL": re.compile(r"\b(?:LDL|STL)\b"),
    "16 bytes": re.compile(r"\b(?:LDG|STG|LD|ST|LDS|STS|LDGSTS)\b[A-Z0-9_.]*\.128\b"),
}


class Function(NamedTuple):
    """One instance of a kernel for one architecture."""

    kernel: str  # without "_kernel"
    instance: str  # its template arguments
    arch: str  # "sm_90a"
    registers: int  # a thread
    stack: int  # bytes a thread
    shared: int  # bytes a block, static; dynamic shared memory is the launch's
    counts: dict[str, int]


def built_module() -> Path | None:
    """The module that ``make cuda`` has built, else the installed one if it has CUDA kernels."""
    made = sorted(BUILT.glob("_native*.so"))
    if made:
        return made[-1]
    from attent_kernels import native

    if native.module is not None and native.module.cuda_absent is None:
        return Path(str(native.module.__file__))
    return None


def functions(module: Path) -> list[Function]:
    """All kernels in ``module``, for each architecture that it has machine code for."""
    used, counted = _resources(_dump("-res-usage", module)), _instructions(_dump("-sass", module))
    names = _demangled(sorted({name for _, name in used}))
    found = []
    for (arch, symbol), sizes in used.items():
        kernel, instance = _short(names[symbol])
        found.append(Function(kernel, instance, arch, *sizes, counted[arch, symbol]))
    return sorted(found, key=lambda function: (function.kernel, function.arch, function.instance))


def problems(found: Iterable[Function], kernels: Iterable[Kernel] = KERNELS) -> Iterator[str]:
    """What is wrong with them."""
    found, rows = list(found), {kernel.name: kernel for kernel in kernels}
    for function in found:
        name = f"{function.kernel}<{function.instance}> for {function.arch}"
        row = rows.get(function.kernel)
        if row is None:
            yield f"{name} has no row in benchmarks/cuda_kernels.py"
            continue
        if function.stack > 0 or function.counts["LDL, STL"] > 0:
            accesses = function.counts["LDL, STL"]
            yield f"{name} has a stack of {function.stack} bytes a thread, {accesses} accesses: spills"
        if row.registers not in (None, function.registers) and function.arch == "sm_90a":
            yield f"{name} starts with {function.registers} registers a thread; its setmaxnreg share {row.registers}"
        for instruction in row.every + (row.sm_90a if function.arch == "sm_90a" else ()):
            if function.counts[instruction] == 0:
                yield f"{name} is meant to have {instruction} and has none"
    for row in rows.values():
        own = [function for function in found if function.kernel == row.name]
        if not own:
            yield f"{row.name} has a row in benchmarks/cuda_kernels.py and is not in the module"
        for instruction in row.some if own else ():
            if all(function.counts[instruction] == 0 for function in own):
                yield f"no instance of {row.name} has {instruction}"


def warnings(folder: Path) -> list[str]:
    """What the compiler warned of, in the logs that a build leaves beside its objects.

    ptxas calls it information, with a number, when it serialises wgmma, fences it by itself or leaves setmaxnreg out.
    """
    lines = [line for log in sorted(folder.glob("*.log")) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "warning" in line.lower() or re.match(r"ptxas info *: \(C\d+\)", line)]


def table(found: Iterable[Function]) -> Iterator[str]:
    """One line for each, and a heading."""
    heads = " ".join(f"{name:>8}" for name in COUNTED)
    yield f"{'sm':7} {'kernel':20} {'registers':>9} {'stack':>5} {'shared':>6} {heads}  instance"
    for function in found:
        counts = " ".join(f"{count:8}" for count in function.counts.values())
        sizes = f"{function.registers:9} {function.stack:5} {function.shared:6}"
        yield f"{function.arch:7} {function.kernel:20} {sizes} {counts}  {function.instance}"


def _tool(name: str) -> str:
    triton = importlib.util.find_spec("triton")
    beside = Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin" / name if triton else Path()
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in Triton's folder nor in PATH")
    return found


def _dump(what: str, module: Path) -> str:
    # It calls nvdisasm, which lies beside it.
    tool = _tool("cuobjdump")
    path = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [tool, what, str(module)], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout


def _resources(text: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(arch, symbol) -> registers, stack, shared."""
    found, arch, symbol = {}, "", ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif name := re.match(r"\s*Function (\S+):$", line):
            symbol = name.group(1)
        elif sizes := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = (int(size) for size in sizes.groups())
            found[arch, symbol] = registers, stack, shared
    return found


def _instructions(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """(arch, symbol) -> how many of each."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch, counts = "", dict.fromkeys(COUNTED, 0)
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif name := re.match(r"\s*Function : (\S+)$", line):
            counts = found[arch, name.group(1)] = dict.fromkeys(COUNTED, 0)
        elif re.match(r"\s*/\*[0-9a-f]+\*/", line) and ";" in line:  # an address
            instruction = line.partition("*/")[2].partition(";")[0]
            for what, pattern in COUNTED.items():
                counts[what] += pattern.search(instruction) is not None
    return found


def _demangled(symbols: list[str]) -> dict[str, str]:
    if shutil.which("c++filt") is None:
        return {symbol: symbol for symbol in symbols}
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return dict(zip(symbols, done.stdout.splitlines(), strict=True))


def _short(name: str) -> tuple[str, str]:
    """Kernel and template arguments of a function's name, demangled or not."""
    for length in re.finditer(r"(?=(?<!^)([1-9]\d*))", name) if name.startswith("_Z") else ():
        start = length.end(1)  # an identifier of a mangled name stands behind its length
        identifier, rest = name[start : start + int(length.group(1))], name[start + int(length.group(1)) :]
        if identifier.endswith("_kernel"):
            return identifier.removesuffix("_kernel"), rest
    if shown := re.search(r"(\w+)_kernel(?:<(.*)>)?\(", name):
        return shown.group(1), (shown.group(2) or "").replace("attent::gpu::", "")
    return name, ""
