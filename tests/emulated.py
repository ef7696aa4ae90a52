"""GPU kernels' own source, compiled for the CPU (csrc/cuda/emulate.h) and run on CPU tensors."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    "csrc/emulated/module.cpp",
    "csrc/bind_scored_attention.cpp",
    "csrc/scored_attention_plan.cpp",
    *(f"csrc/cuda/scored_attention{width}.cu" for width in ("", "_64", "_96", "_128", "_192", "_256", "_sm90")),
    "csrc/bind_scorer.cpp",
    "csrc/scorer_plan.cpp",
    "csrc/cuda/scorer.cu",
    "csrc/cuda/scorer_sm90.cu",
]
# Warnings are errors: the emulator's compiler reads the kernels with other eyes than nvcc.
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-DATTENT_EMULATE", f"-I{ROOT / 'csrc'}"]


@functools.cache
def module() -> Any:
    """The module attent_emulated, built once for each state of the sources (half a minute on two cores)."""
    import pybind11

    flags = [*FLAGS, f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    state = hashlib.sha256(repr(flags).encode())
    for file in sorted((ROOT / "csrc").rglob("*")):
        if file.is_file():
            state.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"attent_emulated_{os.getuid()}_{state.hexdigest()[:16]}"
    library = folder / f"attent_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _compile(source, folder, flags), SOURCES))
        unfinished = library.with_suffix(f".{os.getpid()}")
        _run(["g++", "-shared", "-o", str(unfinished), *objects])
        unfinished.replace(library)
    spec = importlib.util.spec_from_file_location("attent_emulated", library)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _compile(source: str, folder: Path, flags: list[str]) -> str:
    target = folder / f"{Path(source).name}.{os.getpid()}.o"
    _run(["g++", *flags, "-x", "c++", "-c", str(ROOT / source), "-o", str(target)])
    return str(target)


def _run(command: list[str]) -> None:
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
