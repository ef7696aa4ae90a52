"""CPU paths take no more processor time, over plain PyTorch, than they did: see ``tests/cpu_gates.py``."""

from __future__ import annotations

import pytest

from attent_kernels import row_statistics

from .cpu_gates import GATES, cost, half_as_slow_again, measured_here, one_thread


def skip_without_native_module(name: str) -> None:
    if row_statistics.unavailable() and name in ("scorer, logit", "scorer, head", "training loss, logit"):
        pytest.skip("its ratio is that of the native module, which is not built here")


@pytest.mark.parametrize("name", GATES)
def test_a_path_takes_no_more_processor_time_than_it_did(name: str) -> None:
    skip_without_native_module(name)
    gate = GATES[name]
    with one_thread():
        found = cost(*gate.make(), limit=gate.limit)
    assert found <= gate.limit


def test_a_gate_notices_a_path_that_takes_half_as_long_again() -> None:
    gate = GATES["Teacher.record"]
    with one_thread():
        ours, theirs = gate.make()
        normal = cost(ours, theirs)
        # What is slowed is measured twice, so nothing here depends on the processor.
        assert cost(half_as_slow_again(ours), theirs, limit=normal * 1.5**0.5) > normal * 1.5**0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", GATES)
def test_every_gate_notices_a_path_that_takes_half_as_long_again(name: str) -> None:
    skip_without_native_module(name)
    gate = GATES[name]
    if not measured_here():
        pytest.skip("the limit is twice the ratio on processors that it was not measured on")
    with one_thread():
        ours, theirs = gate.make()
        assert cost(half_as_slow_again(ours), theirs, limit=gate.limit, rounds=30) > gate.limit
