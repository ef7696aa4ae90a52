"""GPU kernels' own source, compiled for the CPU (csrc/cuda/emulate.h) and run on CPU tensors."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

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
FLAGS += ["-Wno-unknown-pragmas", "-DATTENT_EMULATE"]


@functools.cache
def module() -> Any:
    """The module attent_emulated, built once for each state of the sources (half a minute on two cores)."""
    return _load(_built())


@functools.cache
def mutated(source: str, spans: tuple[Span, ...]) -> Any:
    """The same with one of SOURCES compiled from a copy of csrc in which texts are replaced: for mutants.

    Only what no other source defines may be replaced: the linker keeps one definition of each function.
    """
    objects = _built().parent
    folder = objects / hashlib.sha256(repr((source, spans)).encode()).hexdigest()[:16]
    library = folder / _LIBRARY
    if not library.exists():
        shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
        for path in {span.path for span in spans}:
            file = folder / path
            text = file.read_text()
            for span in sorted((span for span in spans if span.path == path), key=lambda s: s.start, reverse=True):
                text = text[: span.start] + span.text + text[span.end :]
            file.write_text(text)
        here = _compile(folder / source, folder, _flags(folder / "csrc"))
        others = [str(objects / f"{Path(other).name}.o") for other in SOURCES if other != source]
        _link(library, [here, *others])
    return _load(library)


class Span(NamedTuple):
    """The characters of a source from ``start`` to ``end``, and what is to stand there."""

    path: str
    start: int
    end: int
    text: str


_LIBRARY = f"attent_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"


def _flags(sources: Path) -> list[str]:
    import pybind11

    return [*FLAGS, f"-I{sources}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


def _built() -> Path:
    outcome = _build()
    if isinstance(outcome, AssertionError):
        raise outcome
    return outcome


@functools.cache
def _build() -> Path | AssertionError:
    """The library, or the compiler's complaint: once, since hypothesis would ask for it again for every example."""
    try:
        return _compiled()
    except AssertionError as error:
        return error


def _compiled() -> Path:
    flags = _flags(ROOT / "csrc")
    state = hashlib.sha256(repr(flags).encode())
    for file in sorted((ROOT / "csrc").rglob("*")):
        if file.is_file():
            state.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"attent_emulated_{os.getuid()}_{state.hexdigest()[:16]}"
    library = folder / _LIBRARY
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _compile(ROOT / source, folder, flags), SOURCES))
        _link(library, objects)
    return library


def _load(library: Path) -> Any:
    # A name of its own: pybind11 gives back the first module that it made of a name, whatever file the next is in.
    spec = importlib.util.spec_from_file_location(f"{library.parent.name}.attent_emulated", library)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _compile(source: Path, folder: Path, flags: list[str]) -> str:
    target = folder / f"{source.name}.o"
    unfinished = target.with_suffix(f".{os.getpid()}")
    _run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(unfinished)])
    unfinished.replace(target)
    return str(target)


def _link(library: Path, objects: list[str]) -> None:
    unfinished = library.with_suffix(f".{os.getpid()}")
    _run(["g++", "-shared", "-o", str(unfinished), *objects])
    unfinished.replace(library)


def _run(command: list[str]) -> None:
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
