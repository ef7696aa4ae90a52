"""Puts a compiled native module into the checkout: one that is built now, or that of a wheel.

What lies there is then loaded in a process of its own, which says what it holds: a module for another Python, for a
newer system's libraries or without CUDA kernels is an error here and not, half an hour later, a row of a table.
"""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "attent_kernels"
# As `import` finds it, and with nothing else: neither torch nor Triton.
SHOW = """
import importlib.machinery, importlib.util, sys
spec = importlib.machinery.PathFinder.find_spec("_native", [sys.argv[1]])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if module.cuda_absent is not None:
    sys.exit(f"it holds no CUDA kernels: {module.cuda_absent}")
print(f"CUDA kernels for sm_{module.cuda_archs.replace(';', ', sm_')}")
"""


def install(wheel: Path | None = None, root: Path | None = None) -> str:
    """Build the module in ``root`` (this checkout), or take that of ``wheel``; says what it holds.

    Raises ``SystemExit`` with the reason if there is none then, or none with CUDA kernels that this Python can load.
    """
    root = root or ROOT
    came_from = "--build" if wheel is None else f"--wheel {wheel}"
    if wheel is None:
        _build(root)
    else:
        _extract(wheel, root)
    shown = subprocess.run([sys.executable, "-c", SHOW, root / PACKAGE], capture_output=True, text=True)
    if shown.returncode != 0:
        raise SystemExit(f"{came_from}: the module is in place, but {_last_line(shown.stderr)}")
    return shown.stdout.strip()


def _build(root: Path) -> None:
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=root, env=os.environ | {"ATTENT_CUDA": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if made.returncode != 0:
        sys.stderr.write(made.stderr)
        raise SystemExit(f"--build: {_last_line(made.stderr)}")


def _extract(wheel: Path, root: Path) -> None:
    if not wheel.is_file():
        raise SystemExit(f"--wheel: got {wheel}, which is no file")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        modules = [name for name in names if name.startswith(f"{PACKAGE}/_native.")]
        if len(modules) != 1:
            raise SystemExit(
                f"--wheel: got {wheel}, which holds {modules or 'no compiled module'}; takes one built with it"
            )
        suffix = modules[0].removeprefix(f"{PACKAGE}/_native")
        if suffix not in importlib.machinery.EXTENSION_SUFFIXES:
            raise SystemExit(
                f"--wheel: got {wheel}, whose module is for another Python ({suffix}); "
                f"this one loads {importlib.machinery.EXTENSION_SUFFIXES[0]}"
            )
        # With auditwheel's copies of the libraries that it needs, which it looks for at ../attent.libs.
        for name in (*modules, *(name for name in names if name.startswith("attent.libs/") and name[-1] != "/")):
            # A loaded library is mapped: writing into its file would end the process that loaded it.
            (root / name).unlink(missing_ok=True)
            archive.extract(name, root)


def _last_line(said: str) -> str:
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "nothing was said")
