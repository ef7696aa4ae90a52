"""The API reference: every public name has an entry, and its docstring says what a caller has to know."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import attent
import attent.checkpoint
import attent.one_pass
import attent.report
from tests.test_house import ROOT

REFERENCE = ROOT / "docs" / "api"
#: Formulas and methods from the literature: their docstrings say where from.
AFTER_PAPERS = ("AttentiveClassifier", "Teacher", "linear_cross_entropy", "scored_attention", "select_top_k")


def names_of(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What a module makes public: its ``__all__``, or all that is defined in it; modules among it opened."""
    public = getattr(module, "__all__", None)
    for name, thing in vars(module).items():
        own = getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_")
        if name in public if public is not None else own:
            if isinstance(thing, ModuleType):
                yield from names_of(thing)
            elif not isinstance(thing, str):
                yield f"{module.__name__}.{name}", thing


NAMES = {
    name: thing
    for module in (attent, attent.checkpoint, attent.one_pass, attent.report)
    for name, thing in names_of(module)
}


def documented() -> dict[str, set[str]]:
    """The names that the reference's pages ask autodoc for, in full, and the options of each entry."""
    found: dict[str, set[str]] = {}
    for page in REFERENCE.glob("*.rst"):
        module, current = "", ""
        for line in page.read_text(encoding="utf-8").splitlines():
            directive = re.match(r"\.\. ([\w:]+):: (\S+)", line)
            option = re.match(r"   :([\w-]+):", line)
            if directive and directive[1] == "currentmodule":
                module = directive[2]
            elif directive and directive[1] == "automodule":
                current = directive[2]
                found[current] = set()
            elif directive and (directive[1].startswith("auto") or directive[1] == "py:data"):
                current = f"{module}.{directive[2]}"
                found[current] = set()
            elif option:
                found.setdefault(current, set()).add(option[1])
    return found


@pytest.mark.parametrize("name", [*NAMES, "attent.__version__"])
def test_every_public_name_has_an_entry_in_the_reference(name: str) -> None:
    entries = documented()
    short = "attent." + name.rpartition(".")[2]  # attent.one_pass.OnePass is attent.OnePass too
    assert name in entries or short in entries or name.rpartition(".")[0] in entries


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="there is no lightning")
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="there are no transformers")
def test_every_integration_has_an_entry_in_the_reference() -> None:
    entries = documented()
    modules = [f"attent.integrations.{name}" for name in ("accelerate", "lightning", "transformers")]
    public = {name for module in modules for name, _ in names_of(importlib.import_module(module))}
    assert public <= set(entries) and len(public) == 5


def parameters(thing: Callable[..., Any]) -> list[inspect.Parameter]:
    """The named arguments of a function, or of making an object of a class that says itself how it is made."""
    if inspect.isclass(thing) and "__init__" not in vars(thing) and "__new__" not in vars(thing):
        return []
    named = inspect.signature(thing).parameters.values()
    return [p for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"]


def refuses(thing: Any) -> bool:
    """Whether a function, or making an object of a class, raises by itself."""
    code = thing.__dict__.get("__init__") if inspect.isclass(thing) else thing
    if inspect.isclass(thing) and (code is None or hasattr(thing, "__dataclass_fields__")):
        return False  # there is none, or one that dataclasses wrote
    return code is not None and re.search(r"\brefuse\(|\braise \w|\bcheck_\w+\(", inspect.getsource(code)) is not None


def lacking(name: str, thing: Any, *, example: bool) -> list[str]:
    """What a docstring does not say."""
    text = inspect.getdoc(thing) or ""
    own = parameters(thing)
    missing = [f"argument {p.name}" for p in own if not re.search(rf"\b{p.name}\b", text)]
    takes_tensors = any("Tensor" in str(p.annotation) for p in own)
    if takes_tensors and not re.search(r"\[[\w, *.+=]+\]|:func:`attent\.", text):
        missing.append("shapes")
    if refuses(thing) and "Raises:" not in text:
        missing.append("Raises:")
    if name.rpartition(".")[2] in AFTER_PAPERS and "Source:" not in text:
        missing.append("Source:")
    if example and ">>> " not in text:
        missing.append("an example")
    return missing


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_every_argument_with_shapes_errors_sources_and_an_example(name: str) -> None:
    thing = NAMES[name]
    assert lacking(name, thing, example=True) == []
    if inspect.isclass(thing):
        methods = {
            member: method
            for member, method in vars(thing).items()
            if inspect.isfunction(method) and not member.startswith("_") and member.isidentifier()
        }
        gaps = {member: lacking(member, method, example=False) for member, method in methods.items()}
        assert {member: gap for member, gap in gaps.items() if gap} == {}


def test_the_gaps_that_the_test_looks_for_are_seen() -> None:
    def bare(scores: torch.Tensor, k: int) -> None:
        """Choose ``scores``."""
        raise ValueError(scores)

    assert lacking("select_top_k", bare, example=True) == ["argument k", "shapes", "Raises:", "Source:", "an example"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="there is no Sphinx")
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-n",
        "-W",
        "--keep-going",
        str(ROOT / "docs"),
        str(tmp_path / "html"),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    index = (tmp_path / "html" / "genindex.html").read_text(encoding="utf-8")
    assert {
        name for name in attent.__all__ if f">{name}" not in index and name not in ("presets", "schedules")
    } == set()
