"""Which backend runs an op: the one asked for or an error that says why not; "auto" picks what is measured or there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attent
from attent.ops import dispatch
from attent_kernels import native
from attent_kernels.linear_cross_entropy import launch_scorer_cuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op with an implementation of each kind, another one in PyTorch alone; all is built, but there is no GPU."""
    built = SimpleNamespace(cuda_absent=None, cuda_archs="80;90a", cuda_versions=lambda: (13000, 13000))
    monkeypatch.setattr(native, "module", built)
    table = {"all": dict.fromkeys(dispatch.BACKENDS, print), "plain": {"torch": print}}
    monkeypatch.setattr(dispatch, "_implementations", table)
    monkeypatch.setattr(dispatch, "MEASURED", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def gpu(kernels: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    has(monkeypatch, (9, 0))
    yield
    native._unfit.cache_clear()


def has(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """The machine has a device of this compute capability, and nobody has asked about it before."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    native._unfit.cache_clear()


def test_auto_takes_torch_on_a_cpu(kernels: None) -> None:
    assert dispatch.choose("all", "auto", CPU) == "torch"
    assert dispatch.choose("plain", "auto", CPU) == "torch"


@pytest.mark.usefixtures("gpu")
def test_auto_takes_triton_on_a_gpu_where_the_op_has_it() -> None:
    assert dispatch.choose("all", "auto", CUDA) == "triton"
    assert dispatch.choose("plain", "auto", CUDA) == "torch"


@pytest.mark.usefixtures("gpu")
def test_auto_takes_what_was_measured_fastest_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MEASURED", {"all": {"cuda": "cuda"}, "plain": {"cuda": "cuda"}})
    assert dispatch.choose("all", "auto", CUDA) == "cuda"
    assert dispatch.choose("all", "auto", CPU) == "torch"
    assert dispatch.choose("plain", "auto", CUDA) == "torch"  # has no such kernel
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.choose("all", "auto", CUDA) == "torch"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_a_backend_asked_for_by_name_is_taken(backend: str) -> None:
    assert dispatch.choose("all", backend, CUDA) == backend
    assert dispatch.unavailable(backend) is None


def refusal(op: str, backend: Any, device: torch.device) -> str:
    with pytest.raises(ValueError, match=r"^backend: got .+; takes .+") as error:
        dispatch.choose(op, backend, device)
    return str(error.value)


@pytest.mark.usefixtures("kernels")
def test_a_backend_that_cannot_run_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no CUDA device" in refusal("all", "cuda", CUDA)
    assert "TRITON_INTERPRET=1" in refusal("all", "triton", CUDA)
    assert "'auto', 'cuda', 'triton', 'torch'" in refusal("all", "fastest", CPU)
    assert "'auto', 'cuda', 'triton', 'torch'" in refusal("all", None, CPU)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    has(monkeypatch, (9, 0))
    assert "takes CUDA tensors, these are on cpu" in refusal("all", "triton", CPU)
    assert "takes CUDA tensors, these are on cpu" in refusal("all", "cuda", CPU)
    assert "plain has no triton kernel yet" in refusal("plain", "triton", CUDA)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in refusal("all", "triton", CUDA)


@pytest.mark.usefixtures("gpu")
def test_auto_never_takes_cuda_before_it_is_measured() -> None:
    """The table of measurements is committed: whoever fills it commits the result that it comes from."""
    assert dispatch.choose("all", "auto", CUDA) != "cuda"


@pytest.mark.usefixtures("gpu")
def test_cuda_kernels_that_cannot_run_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(**changes: object) -> None:
        native._unfit.cache_clear()
        built = {"cuda_absent": None, "cuda_archs": "80;90a", "cuda_versions": lambda: (13000, 13000)} | changes
        monkeypatch.setattr(native, "module", SimpleNamespace(**built))

    machine(cuda_versions=lambda: (12080, 13000))
    assert "the driver supports CUDA 12.8, attent was built with 13.0" in refusal("all", "cuda", CUDA)
    assert dispatch.choose("all", "auto", CUDA) == "triton"
    machine(cuda_versions=lambda: (13020, 13000))
    assert dispatch.unavailable("cuda") is None
    machine(cuda_absent="no nvcc was found")
    assert "attent was built without CUDA kernels: no nvcc was found" in refusal("all", "cuda", CUDA)
    assert dispatch.unavailable("cuda") is not None and dispatch.unavailable("triton") is None
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "reason", "the native module cannot be loaded: not there")
    assert "cannot be loaded: not there" in refusal("all", "cuda", CUDA)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("archs", "runs_on", "not_on"),
    [
        ("80;90a", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5)]),  # the last two by PTX
        ("90a", [(9, 0), (10, 0)], [(8, 0), (8, 9)]),
        ("80", [(8, 6), (9, 0)], [(7, 5)]),
        ("86;120", [(8, 6), (8, 9), (12, 0), (12, 1)], [(8, 0), (9, 0), (10, 0)]),
        ("100a", [(10, 0), (12, 0)], [(9, 0)]),
    ],
)
def test_a_build_for_other_gpus_is_refused_with_the_reason(
    archs: str, runs_on: list[tuple[int, int]], not_on: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machine code runs on its major version from its minor on, with a letter on just that one; PTX on all later."""
    assert native.module is not None
    monkeypatch.setattr(native.module, "cuda_archs", archs)
    for capability in runs_on:
        has(monkeypatch, capability)
        assert dispatch.unavailable("cuda") is None
    for capability in not_on:
        has(monkeypatch, capability)
        assert f"this device is sm_{capability[0]}{capability[1]}: build with ATTENT_CUDA_ARCHS" in refusal(
            "all", "cuda", CUDA
        )


@pytest.mark.usefixtures("gpu")
def test_a_device_is_asked_once_what_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking takes as long as a launch."""
    assert dispatch.unavailable("cuda") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: pytest.fail("asked again"))
    assert dispatch.choose("all", "cuda", CUDA) == "cuda"


@pytest.mark.usefixtures("kernels")
def test_triton_takes_cpu_tensors_under_its_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("all", "triton", CPU) == "triton"
    assert dispatch.choose("all", "auto", CPU) == "torch"  # it is slow: for testing
    assert "no CUDA device" in refusal("all", "cuda", CPU)


def test_backends_says_for_each_whether_it_can_run_or_why_not() -> None:
    said = attent.backends()
    assert list(said) == list(dispatch.BACKENDS) and said["torch"] == "available"
    for backend in dispatch.BACKENDS:
        reason = dispatch.unavailable(backend)
        assert said[backend] == ("available" if reason is None else reason) != ""


def test_each_op_is_registered_with_its_backward() -> None:
    for op in ("linear_cross_entropy", "linear_cross_entropy_backward"):
        assert callable(dispatch.implementation(op, "torch"))


@pytest.mark.usefixtures("gpu")
def test_hopper_kernels_run_on_hopper_unless_portable_ones_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.runs_hopper(CUDA) and not native.runs_hopper(CPU)
    assert launch_scorer_cuda.kernels_of(CUDA) == ("hopper", "portable")
    with native.portable_kernels():
        assert not native.runs_hopper(CUDA) and launch_scorer_cuda.kernels_of(CUDA) == ("portable",)
    assert native.runs_hopper(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert not native.runs_hopper(CUDA)
