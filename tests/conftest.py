"""What every test shares: a seed, a reason to skip without a GPU, and the names that doctests see."""

from __future__ import annotations

import importlib.abc
import os
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

from tests.launches import patch_language_once_per_launch


class _SkipWithoutHypothesis(importlib.abc.MetaPathFinder):
    """Skips, with the reason, every test module that imports hypothesis, itself or by what it imports."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "hypothesis":
            pytest.skip("hypothesis is not installed", allow_module_level=True)


try:
    import hypothesis
except ModuleNotFoundError:  # a machine with a GPU and without a network, say
    sys.meta_path.append(_SkipWithoutHypothesis())  # the last one: asked for what nobody else has found
else:
    # The same examples on every run, so that a green checkout stays green; no deadline, since machines differ.
    hypothesis.settings.register_profile("attent", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("attent")


def pytest_configure(config: pytest.Config) -> None:
    """Triton kernels run in its interpreter, on CPU tensors, unless they are to be compiled or run on a GPU.

    That is decided when a kernel is decorated, so before any test module is imported.
    """
    if config.option.markexpr not in ("aot", "gpu"):
        os.environ["TRITON_INTERPRET"] = "1"
        patch_language_once_per_launch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator before each test, so that no test depends on their order; returns the seed."""
    value = 0
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - code that uses the global generator is what this is for
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True, scope="session")
def names_in_doctests(doctest_namespace: dict[str, Any]) -> None:
    """Doctests see ``torch`` and ``attent``."""
    import attent

    doctest_namespace.update(attent=attent, torch=torch)
