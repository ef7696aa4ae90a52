"""Builds the optional native module ``attent_kernels._native`` from csrc/*.cpp. All else is said in pyproject.toml.

The module makes the torch backend faster on CPUs; attent computes the same without it. So a missing compiler or a
failed build does not stop the installation: it goes on in pure torch. Because pip hides a build's output, the reason is
also left in the installed package (``attent_kernels/_native_failure.txt``). The environment decides otherwise:

    ATTENT_NATIVE=1    a failed build is an error
    ATTENT_NATIVE=0    nothing is compiled
"""

from __future__ import annotations

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("ATTENT_NATIVE", "")
REASON_FILE = "_native_failure.txt"
# No -march: each hot function names its own instruction set and is picked at run time, so one build runs on any CPU.
COMPILE_ARGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fopenmp"]
LINK_ARGS = ["-fopenmp"]


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
        if WANTED == "1":
            raise
        announce("pybind11 is not installed")
        return []
    return [
        Extension(
            "attent_kernels._native",
            sources=sources,
            depends=sorted(glob("csrc/*.h")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
            language="c++",
            optional=WANTED != "1",
        )
    ]


class BuildNative(build_ext):
    """``build_ext`` that leaves the reason in the package when an optional build fails."""

    def build_extension(self, ext: Extension) -> None:
        reason = Path(self.build_lib, *ext.name.split(".")).with_name(REASON_FILE)
        reason.unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except Exception as problem:
            if not ext.optional:
                raise
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build in the same folder
            said = in_brief(str(problem))
            announce(said)
            reason.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(f"{said}\n", encoding="utf-8")

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


setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildNative})
