"""Compiles csrc/cuda/*.cu for setup.py: which nvcc, for which GPUs, and only what has changed.

CUDA_HOME or CUDA_PATH names the toolkit, and one without an nvcc means none. Where neither is set, the compiler is the
one in PATH, else /usr/local/cuda's, else that of PyPI's nvidia-cuda-nvcc package. Objects lie in
build/cuda/<what decides them>: with ninja a rebuild compiles what has changed; without it everything, in parallel all
the same. Beside each object lies what the compiler said (``.log``), ptxas' report included.

    ATTENT_CUDA=auto    (default) where there is an nvcc; what fails leaves the CPU part, with the reason in the module
    ATTENT_CUDA=1       a missing nvcc or a failed compilation is an error
    ATTENT_CUDA=0       the CPU part only
    ATTENT_CUDA_ARCHS   "80;90a" by default; more, such as "80;90a;100;120", make a larger module in more time
    ATTENT_BUILD_JOBS    compilations at a time; the number of cores by default

PTX of the newest architecture is always added, for GPUs that come later. A file whose name has ``sm90`` in it holds
Hopper's own instructions: it is compiled for 90a alone, and left out where that is not asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

DEFAULT_ARCHS = "80;90a"
USUAL = Path("/usr/local/cuda")  # where a toolkit of NVIDIA's installs itself
# -lineinfo costs nothing at run time and lets profilers show source lines. -warn-spills makes a spill a warning, and
# there are to be none. The host part is hidden from, and hides, other libraries' symbols.
FLAGS = [
    "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas", "-v,-warn-spills",
    "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall",
]  # fmt: skip


class NoCuda(Exception):
    """Why the CUDA part is not built."""


class Toolkit(NamedTuple):
    nvcc: Path
    include: Path
    library: Path  # the folder of libcudart_static.a
    version: str  # "13.0"


class Built(NamedTuple):
    objects: list[str]
    archs: list[str]
    toolkit: Toolkit


def wanted() -> str:
    """``ATTENT_CUDA``: "auto", "0" or "1"."""
    value = os.environ.get("ATTENT_CUDA", "auto") or "auto"
    if value not in ("auto", "0", "1"):
        sys.exit(
            f"ATTENT_CUDA: got {value!r}; takes auto (where there is an nvcc), 1 (a failure is an error) or 0 (skip)"
        )
    return value


def archs() -> list[str]:
    """``ATTENT_CUDA_ARCHS`` as a list, in order and once each."""
    value = os.environ.get("ATTENT_CUDA_ARCHS", "") or DEFAULT_ARCHS
    found = [arch for arch in value.replace(",", ";").replace(" ", ";").split(";") if arch]
    for arch in found:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(re.sub(r"\D", "", arch)) < 80:
            sys.exit(
                f'ATTENT_CUDA_ARCHS: got {arch!r} in {value!r}; takes numbers from 80 on, such as "80;90a;100;120"'
            )
    return sorted(set(found), key=lambda arch: (number(arch), arch))


def number(arch: str) -> int:
    return int(arch.rstrip("af"))


def code_flags(archs: list[str]) -> list[str]:
    """nvcc's flags: machine code of each, and PTX of the newest, without the letter: 90a's runs on nothing but 90a."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = number(archs[-1])
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def find_toolkit() -> Toolkit:
    """The first toolkit that is complete; :class:`NoCuda` says where was looked and what is missing."""
    missing = []
    for nvcc in _candidates():
        if not nvcc.is_file():
            continue
        # What is in PATH may be a script that calls the one in the toolkit: ask it where it is.
        asked = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
                               capture_output=True, text=True)  # fmt: skip
        top = re.search(r"^#\$ TOP=(.*)$", asked.stderr, re.MULTILINE)
        version = re.search(
            r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        )
        if top is None or version is None:
            missing.append(f"{nvcc} does not run: {(asked.stderr or asked.stdout).strip()[-200:]}")
            continue
        root = Path(os.path.normpath(top.group(1).strip()))
        include = _first(root, ["include", "targets/*/include"], "cuda_runtime.h")
        library = _first(root, ["lib64", "lib", "targets/*/lib"], "libcudart_static.a")
        if include is None or library is None:
            what = "cuda_runtime.h" if include is None else "libcudart_static.a"
            missing.append(f"{what} is not in {root}, where {nvcc} belongs")
            continue
        return Toolkit(nvcc, include, library, version.group(1))
    looked = ", ".join(f"{name} ({home})" for name, home in _homes().items())
    looked = looked or f"PATH, {USUAL} or PyPI's nvidia-cuda-nvcc"
    raise NoCuda("; ".join(missing) or f"no nvcc was found in {looked}")


def _homes() -> dict[str, str]:
    return {name: os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)}


def _candidates() -> list[Path]:
    if _homes():  # whoever names a toolkit wants that one, or is told
        return [Path(home, "bin", "nvcc") for home in _homes().values()]
    in_path = shutil.which("nvcc")
    found = [Path(in_path)] if in_path else []
    found += [USUAL / "bin" / "nvcc"]
    for folder in {sysconfig.get_path("purelib"), *sys.path}:
        found += sorted(Path(folder or ".", "nvidia").glob("*/bin/nvcc"), reverse=True)
    return found


def _first(root: Path, folders: list[str], name: str) -> Path | None:
    return next(
        (folder for pattern in folders for folder in sorted(root.glob(pattern)) if (folder / name).exists()), None
    )


def build(root: Path, folder: Path) -> Built:
    """Compile root's csrc/cuda/**/*.cu below ``folder``; :class:`NoCuda` says why not."""
    toolkit, asked = find_toolkit(), archs()
    sources = {}  # of each file, for which GPUs
    for source in sorted((root / "csrc" / "cuda").rglob("*.cu")):
        if "sm90" not in source.stem:
            sources[source] = [*FLAGS, *code_flags(asked)]
        elif "90a" in asked:
            sources[source] = [*FLAGS, "-gencode=arch=compute_90a,code=sm_90a"]
    flags = [f"-I{root / 'csrc'}", f"-I{root / 'csrc' / 'cuda'}"]
    if "90a" in asked:
        flags.append("-DATTENT_SM90A")
    decides = repr((toolkit, asked, FLAGS, flags))
    folder = folder / hashlib.sha256(decides.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    commands = {}
    for source, own in sources.items():
        name = str(source.relative_to(root / "csrc" / "cuda")).replace(os.sep, ".")
        commands[folder / f"{name}.o"] = (source, [str(toolkit.nvcc), *own, *flags])
    (_with_ninja if shutil.which("ninja") else _all_anew)(commands, folder)
    for stale in set(folder.glob("*.o")) - set(commands):
        stale.unlink()
    return Built([str(path) for path in commands], asked, toolkit)


def jobs() -> int:
    """Compilations at a time: ``ATTENT_BUILD_JOBS``, or the number of cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("ATTENT_BUILD_JOBS", "") or cores)


Commands = dict[Path, tuple[Path, list[str]]]


def _with_ninja(commands: Commands, folder: Path) -> None:
    def path(text: object) -> str:  # ninja's own escapes
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule nvcc", "  command = $nvcc > $out.log 2>&1 || { cat $out.log; exit 1; }"]
    lines += ["  description = nvcc $in", "  depfile = $out.d", "  deps = gcc"]
    for target, (source, command) in commands.items():
        whole = [*command, "-MD", "-MF", f"{target}.d", "-c", str(source), "-o", str(target)]
        lines += [f"build {path(target)}: nvcc {path(source)}", f"  nvcc = {shlex.join(whole).replace('$', '$$')}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = subprocess.run(["ninja", "-C", str(folder), f"-j{jobs()}"], capture_output=True, text=True)
    print(done.stdout, flush=True)
    if done.returncode != 0:
        raise NoCuda(f"a compilation failed: {_error_in(done.stdout + done.stderr)}")


def _all_anew(commands: Commands, folder: Path) -> None:
    def compile(target: Path) -> None:
        source, command = commands[target]
        print(f"nvcc {source.name}", flush=True)
        done = subprocess.run([*command, "-c", source, "-o", target], capture_output=True, text=True)
        Path(f"{target}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode != 0:
            print(done.stdout + done.stderr, file=sys.stderr, flush=True)
            raise NoCuda(f"a compilation failed: {_error_in(done.stdout + done.stderr)}")

    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(compile, commands))


def _error_in(output: str) -> str:
    """The line that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "nvcc said nothing")[:200]
