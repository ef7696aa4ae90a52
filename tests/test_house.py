"""The house is in order: versions agree, layers point one way, names are documented, and what is built is complete."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import attent
from attent_kernels import row_statistics

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"attent": ROOT / "python" / "attent", "attent_kernels": ROOT / "attent_kernels"}
MAXIMUM_LINES = 450


def python_files(package: str) -> Iterator[Path]:
    yield from sorted(PACKAGES[package].rglob("*.py"))


def imported_modules(file: Path, package: str) -> set[str]:
    """The absolute names of all that ``file`` imports anywhere, `from a import b` counted as both a and a.b."""
    inside = [package, *file.relative_to(PACKAGES[package]).parent.parts]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def lies_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


# --------------------------------------------------------------------------------------------------- versions and names


def test_the_installed_version_is_the_packages_and_the_changelogs() -> None:
    assert importlib.metadata.version("attent") == attent.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    assert released[0] == attent.__version__


def test_every_requirement_of_the_development_environment_is_pinned_once_per_python() -> None:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = [Requirement(line) for line in lines if line]
    here = [canonicalize_name(pin.name) for pin in pins if pin.marker is None or pin.marker.evaluate()]
    assert sorted(here) == sorted(set(here))
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) for pin in pins)
    wanted = [Requirement(line) for line in importlib.metadata.requires("attent") or []]
    for requirement in wanted:
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", "dev", "demo")):
            assert canonicalize_name(requirement.name) in here


def test_all_names_exist_once_and_everything_public_is_named() -> None:
    assert len(attent.__all__) == len(set(attent.__all__))
    assert all(hasattr(attent, name) for name in attent.__all__)
    defined_here = {
        name
        for name, value in vars(attent).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert defined_here <= set(attent.__all__)


def public_objects() -> Iterator[tuple[str, object]]:
    """All that ``attent.__all__`` reaches: functions, classes with public methods, modules with functions.

    Overrides of what a foreign base class documents (``nn.Module.forward``, ``extra_repr``) are left out.
    """
    for name in attent.__all__:
        value = getattr(attent, name)
        if isinstance(value, str):
            continue
        yield name, value
        if isinstance(value, ModuleType):
            members = [m for m in vars(value).items() if getattr(m[1], "__module__", None) == value.__name__]
        elif inspect.isclass(value):
            foreign = [base for base in value.__mro__ if not lies_in(base.__module__, "attent")]
            members = [m for m in vars(value).items() if inspect.isfunction(m[1]) or isinstance(m[1], property)]
            members = [m for m in members if not any(hasattr(base, m[0]) for base in foreign)]
        else:
            continue
        yield from ((f"{name}.{member}", thing) for member, thing in members if not member.startswith("_"))


def test_no_public_name_is_undocumented() -> None:
    assert [name for name, thing in public_objects() if not (getattr(thing, "__doc__", None) or "").strip()] == []


# --------------------------------------------------------------------------------------------------------------- layers


def test_the_kernels_never_import_attent() -> None:
    wrong = {
        str(file.relative_to(ROOT))
        for file in python_files("attent_kernels")
        if any(lies_in(module, "attent") for module in imported_modules(file, "attent_kernels"))
    }
    assert wrong == set()


def test_nothing_imports_the_integrations() -> None:
    integrations = PACKAGES["attent"] / "integrations"
    wrong = {
        str(file.relative_to(ROOT))
        for file in python_files("attent")
        if integrations not in file.parents
        and any(lies_in(module, "attent.integrations") for module in imported_modules(file, "attent"))
    }
    assert wrong == set()


def test_only_the_integrations_import_other_peoples_trainers() -> None:
    trainers = ("accelerate", "lightning", "peft", "pytorch_lightning", "transformers", "trl")
    integrations = PACKAGES["attent"] / "integrations"
    wrong = {
        str(file.relative_to(ROOT))
        for file in python_files("attent")
        if integrations not in file.parents
        and any(lies_in(module, name) for module in imported_modules(file, "attent") for name in trainers)
    }
    assert wrong == set()


def test_relative_imports_are_seen_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "attent", tmp_path)
    file = tmp_path / "ops" / "some.py"
    file.parent.mkdir()
    file.write_text("def f():\n    from ..integrations import hf\n    from . import dispatch\n    import torch.nn\n")
    assert imported_modules(file, "attent") == {
        "attent.integrations",
        "attent.integrations.hf",
        "attent.ops",
        "attent.ops.dispatch",
        "torch.nn",
    }


def test_every_folder_of_code_is_a_package() -> None:
    folders = {file.parent for package in PACKAGES for file in python_files(package)}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_files_are_short_enough_to_hold_one_concept() -> None:
    folders = [*PACKAGES.values(), ROOT / "csrc", ROOT / "tests", ROOT / "benchmarks", ROOT / "tools"]
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: lines for name, lines in lengths.items() if lines > MAXIMUM_LINES} == {}


# --------------------------------------------------------------------------------------------------- in its own process


def test_importing_attent_adds_little_to_importing_torch() -> None:
    # Seconds of this process's own CPU time, so that a busy machine does not count; the best of three, since the first
    # may have to write bytecode.
    code = "import time, torch; start = time.process_time(); import attent; print(time.process_time() - start)"
    best = float("inf")
    for _ in range(3):
        best = min(
            best, float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
        )
        if best <= 0.3:
            break
    assert best <= 0.3


def python_blocks(markdown: str) -> list[str]:
    """The code that a page shows (```python) and what it starts from, which readers need not see (<!-- python)."""
    found = re.finditer(r"^```python\n(.*?)^```|^<!-- python\n(.*?)^-->", markdown, re.MULTILINE | re.DOTALL)
    return [shown or unseen for shown, unseen in (match.groups() for match in found)]


def test_python_blocks_are_found_in_the_order_of_the_page() -> None:
    page = "<!-- python\nx = 1\n-->\ntext\n```python\ny = x\n```\n```console\nmake\n```\n```python\nz = y\n```\n"
    assert python_blocks(page) == ["x = 1\n", "y = x\n", "z = y\n"]


def test_the_python_in_readme_runs() -> None:
    # One namespace, as the reader goes: a block may use what an earlier one made.
    namespace: dict[str, object] = {"attent": attent, "torch": torch}
    for number, block in enumerate(python_blocks((ROOT / "README.md").read_text(encoding="utf-8")), start=1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)


# -------------------------------------------------------------------------------------------------------- distributions


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what makes a build, so that building leaves nothing behind in this checkout."""
    copy = tmp_path / "checkout"
    unwanted = shutil.ignore_patterns(
        ".*",
        "build",
        "dist",
        "out",
        "*.egg-info",
        "__pycache__",
        "*.so",
        "_native_failure.txt",
        "demo*.png",
        "demo*.json",
    )
    shutil.copytree(ROOT, copy, ignore=unwanted)
    shutil.copytree(ROOT / ".ci", copy / ".ci")
    shutil.copy(ROOT / ".clang-format", copy)
    return copy


def run(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_distributions_hold_all_of_the_packages_and_nothing_else(checkout: Path) -> None:
    outcome = run(checkout, "-m", "build", "--no-isolation", ATTENT_NATIVE="0")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr

    sources = {str(file.relative_to(checkout)) for file in checkout.rglob("*") if file.is_file()}
    made = {name for name in sources if name.startswith(("dist/", "build/")) or ".egg-info/" in name}
    with tarfile.open(next((checkout / "dist").glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in (m.name for m in archive.getmembers() if m.isfile())}
    assert sources - made <= packed

    # Nothing was compiled, so one wheel serves every platform.
    wheel_file = checkout / "dist" / f"attent-{attent.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel_file) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"attent-{attent.__version__}.dist-info/METADATA").decode()
        entry_points = wheel.read(f"attent-{attent.__version__}.dist-info/entry_points.txt").decode()
    inside = {
        name.removeprefix("python/") for name in sources if name.startswith(("python/attent/", "attent_kernels/"))
    }
    assert {name for name in names if ".dist-info/" not in name} == inside
    assert f"attent-{attent.__version__}.dist-info/licenses/LICENSE" in names
    assert "attent = attent.cli:main" in entry_points
    needed = [
        Requirement(line.partition(": ")[2]) for line in metadata.splitlines() if line.startswith("Requires-Dist: ")
    ]
    plain = {r.name: r for r in needed if r.marker is None or "extra" not in str(r.marker)}
    assert set(plain) == {"torch", "numpy", "triton"}
    triton = plain["triton"].marker
    assert triton is not None and not triton.evaluate({"platform_system": "Darwin", "platform_machine": "arm64"})


def test_the_native_module_is_built_where_there_is_a_compiler() -> None:
    if os.environ.get("ATTENT_NATIVE") == "0":
        pytest.skip("ATTENT_NATIVE=0")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    assert row_statistics.unavailable() is None


@pytest.mark.slow
def test_a_failed_native_build_is_an_error_only_when_asked_for(checkout: Path) -> None:
    no_compiler = {"CC": "/bin/false", "CXX": "/bin/false", "ATTENT_CUDA": "0"}
    reason = checkout / "attent_kernels" / "_native_failure.txt"

    tried = run(checkout, "setup.py", "build_ext", "--inplace", ATTENT_NATIVE="", **no_compiler)
    assert tried.returncode == 0, tried.stderr
    assert "the native CPU module was NOT built" in tried.stderr
    assert "/bin/false" in reason.read_text(encoding="utf-8")

    demanded = run(checkout, "setup.py", "build_ext", "--inplace", ATTENT_NATIVE="1", **no_compiler)
    assert demanded.returncode != 0

    skipped = run(checkout, "setup.py", "build_ext", "--inplace", ATTENT_NATIVE="0", **no_compiler)
    assert skipped.returncode == 0 and "NOT built" not in skipped.stderr
