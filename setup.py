"""Builds the optional native module ``attent_kernels._native``. All else about the package is said in pyproject.toml.

It has two parts. csrc/*.cpp makes the torch backend faster on CPUs. csrc/cuda/*.cu, where there is an nvcc, are the
kernels of backend "cuda" (tools/cuda_build.py, which says how to choose). Building takes neither torch nor a GPU.

attent computes the same without the module. So a missing compiler or a failed build does not stop the installation: it
goes on in pure torch, and without nvcc with the CPU part alone. Because pip hides a build's output, the reason is also
left where Python finds it: in the installed package (``attent_kernels/_native_failure.txt``), or in the module
(``_native.cuda_absent``). The environment decides otherwise:

    ATTENT_NATIVE=1    a failed build is an error
    ATTENT_NATIVE=0    nothing is compiled
    ATTENT_CUDA=1      a missing or failing nvcc is an error
    ATTENT_CUDA=0      the CPU part only

For another Python than the one that builds, whose headers lie in a folder of their own; for another machine, too, whose
compilers' names begin with its own (CC and CXX name others), the CPU part only; and for a wheel that says which CUDA it
is for (a local version, as package indexes other than PyPI take them):

    ATTENT_FOR_PYTHON=3.12:/usr/include/python3.12
    ATTENT_FOR_MACHINE=aarch64-linux-gnu
    ATTENT_LOCAL_VERSION=cu13
"""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))  # a build frontend does not put it there

import cuda_build  # noqa: E402

WANTED = os.environ.get("ATTENT_NATIVE", "")
LOCAL_VERSION = os.environ.get("ATTENT_LOCAL_VERSION", "")
FOR_PYTHON, _, HEADERS = os.environ.get("ATTENT_FOR_PYTHON", "").partition(":")
if FOR_PYTHON and not (re.fullmatch(r"3\.\d+", FOR_PYTHON) and Path(HEADERS, "Python.h").is_file()):
    sys.exit(
        f"ATTENT_FOR_PYTHON: got {FOR_PYTHON}:{HEADERS}; takes VERSION:FOLDER, such as 3.12:/usr/include/python3.12"
    )
FOR_MACHINE = os.environ.get("ATTENT_FOR_MACHINE", "")
if FOR_MACHINE:
    if FOR_MACHINE not in ("aarch64-linux-gnu", "x86_64-linux-gnu") or not FOR_PYTHON:
        sys.exit(
            f"ATTENT_FOR_MACHINE: got {FOR_MACHINE}; takes aarch64-linux-gnu or x86_64-linux-gnu, "
            "and ATTENT_FOR_PYTHON with it"
        )
    os.environ.setdefault("CC", f"{FOR_MACHINE}-gcc")
    cxx = os.environ.setdefault("CXX", f"{FOR_MACHINE}-g++")
    os.environ.setdefault("LDCXXSHARED", f"{cxx} -shared")
REASON_FILE = "_native_failure.txt"
# No -march: each hot function names its own instruction set and is picked at run time, so one build runs on any CPU.
COMPILE_ARGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fopenmp"]
LINK_ARGS = ["-fopenmp"]
if sys.platform == "linux":
    LINK_ARGS.append("-Wl,--version-script=csrc/exports.map")


def native_extensions() -> list[Extension]:
    """The native module, or nothing when there is nothing to build or nothing to build it with."""
    sources = sorted(glob("csrc/*.cpp"))
    if WANTED not in ("", "0", "1"):
        sys.exit(f"ATTENT_NATIVE: got {WANTED!r}; takes 0 (skip), 1 (a failed build is an error) or nothing (try)")
    if WANTED == "0" or not sources:
        return []
    try:
        import pybind11
    except ImportError:
        # Only without build isolation: otherwise pyproject.toml brings it.
        if WANTED == "1" or cuda_build.wanted() == "1":
            raise
        announce("pybind11 is not installed")
        return []
    return [
        Extension(
            "attent_kernels._native",
            sources=sources,
            depends=sorted(glob("csrc/**/*.*", recursive=True)),
            # Debian's headers look beside their folder for what depends on the machine.
            include_dirs=[pybind11.get_include(), *([HEADERS, str(Path(HEADERS).parent)] if HEADERS else [])],
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
            language="c++",
            optional=WANTED != "1" and cuda_build.wanted() != "1",
        )
    ]


class BuildNative(build_ext):
    """``build_ext`` with nvcc's part, which leaves the reason in the package when an optional build fails."""

    def build_extension(self, ext: Extension) -> None:
        reason = Path(self.build_lib, *ext.name.split(".")).with_name(REASON_FILE)
        reason.unlink(missing_ok=True)
        try:
            add_cuda(ext)
            self.compile_side_by_side()
            # setuptools compares times alone: what an earlier build in this folder left, with nvcc or without it, would
            # pass. A set, since a wheel's build comes here twice and adds the same again.
            asked = "\n".join(sorted({repr(x) for x in (*ext.define_macros, *ext.extra_objects, *ext.extra_link_args)}))
            record = Path(self.build_temp, "asked.txt")
            self.force = self.force or not record.exists() or record.read_text(encoding="utf-8") != asked
            super().build_extension(ext)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(asked, encoding="utf-8")
        except Exception as problem:
            if not ext.optional:
                raise
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build in the same folder
            said = in_brief(str(problem))
            announce(said)
            reason.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(f"{said}\n", encoding="utf-8")

    def get_ext_filename(self, fullname: str) -> str:
        name: str = super().get_ext_filename(fullname)
        if FOR_PYTHON:
            name = re.sub(r"cpython-\d+", f"cpython-{FOR_PYTHON.replace('.', '')}", name)
        return re.sub(r"\w+-linux-gnu", FOR_MACHINE, name) if FOR_MACHINE else name

    def compile_side_by_side(self) -> None:
        """Let the compiler take several files at a time: setuptools gives it one after another."""
        one_after_another = self.compiler.compile

        def compile(sources: list[str], *args: Any, **options: Any) -> list[str]:
            with ThreadPoolExecutor(cuda_build.jobs()) as pool:
                compiled = pool.map(lambda source: one_after_another([source], *args, **options), sources)
                return [object for objects in compiled for object in objects]

        self.compiler.compile = compile

    def copy_extensions_to_source(self) -> None:
        """After an editable or in-place build the checkout holds what was built, and nothing of an older build."""
        for ext in self.extensions:
            package = Path(*ext.name.split(".")).parent
            Path(package, Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
            Path(package, REASON_FILE).unlink(missing_ok=True)
            built_reason = Path(self.build_lib, package, REASON_FILE)
            if built_reason.exists():
                self.copy_file(str(built_reason), str(package / REASON_FILE))
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """``bdist_wheel`` that is named after what it holds: the Python the module was built for; any, without a module."""

    def run(self) -> None:
        self.run_command("build_ext")
        made = self.get_finalized_command("build_ext")
        if self.distribution.ext_modules and not any(Path(file).exists() for file in made.get_outputs()):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if FOR_PYTHON and abi != "none":
            python = abi = f"cp{FOR_PYTHON.replace('.', '')}"
        if FOR_MACHINE and abi != "none":
            platform = f"linux_{FOR_MACHINE.split('-')[0]}"
        return python, abi, platform


def add_cuda(ext: Extension) -> None:
    """Compile csrc/cuda and give the extension its objects; or give it the reason why it has none."""
    if cuda_build.wanted() == "0":
        absent = "it was left out (ATTENT_CUDA=0)"
    elif FOR_MACHINE and cuda_build.wanted() != "1":
        absent = f"it was left out (ATTENT_FOR_MACHINE={FOR_MACHINE})"
    elif FOR_MACHINE:
        raise cuda_build.NoCuda(f"nvcc's part is not built for another machine (ATTENT_FOR_MACHINE={FOR_MACHINE})")
    else:
        try:
            built = cuda_build.build(ROOT, ROOT / "build" / "cuda")
        except cuda_build.NoCuda as problem:
            if cuda_build.wanted() == "1":
                raise
            absent = str(problem)
            print(f"attent: the CUDA kernels were NOT built: {absent}", file=sys.stderr, flush=True)
        else:
            ext.extra_objects += built.objects
            ext.define_macros += [("ATTENT_CUDA", None), ("ATTENT_CUDA_ARCHS", c_string(";".join(built.archs)))]
            if "90a" in built.archs:
                ext.define_macros.append(("ATTENT_SM90A", None))
            # The runtime is linked in, its symbols are not exported: torch has a copy of its own.
            ext.extra_link_args += [
                f"-L{built.toolkit.library}", "-l:libcudart_static.a", "-lrt", "-lpthread", "-ldl",
            ]  # fmt: skip
            return
    ext.define_macros.append(("ATTENT_CUDA_ABSENT", c_string(absent)))


def c_string(text: str) -> str:
    """``text`` as a literal of C++."""
    plain = text.encode("ascii", "replace").decode().replace("\\", "/").replace('"', "'").replace("\n", " ")
    return f'"{plain}"'


def in_brief(problem: str) -> str:
    """Which program, and how it ended: the ends of a message whose middle is a compiler's whole command line."""
    return problem if len(problem) <= 200 else f"{problem[:60]} ... {problem[-60:]}"


def announce(reason: str) -> None:
    """Say, so that it is not overlooked, that the installation goes on without the native module."""
    line = "*" * 100
    print(
        f"\n{line}\nattent: the native CPU module was NOT built: {reason}\n"
        "attent is installed without it and computes the same in pure torch, more slowly on CPUs.\n"
        "With a C++17 compiler and OpenMP in place, install again; ATTENT_NATIVE=1 shows the compiler's errors.\n"
        f"{line}\n",
        file=sys.stderr,
        flush=True,
    )


setup(
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options={"egg_info": {"tag_build": f"+{LOCAL_VERSION}"}} if LOCAL_VERSION else {},
)
