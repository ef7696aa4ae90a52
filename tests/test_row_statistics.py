"""The native row statistics: right to their stated bounds for every instruction set, and safe on every input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attent_kernels import row_statistics as native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

SETS = native.instruction_sets() if native.unavailable() is None else ()
ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


class Truth:
    """What csrc/row_statistics.h promises, in float64 and without subtracting, and the error it allows."""

    def __init__(self, logits: Tensor, target: Tensor, softcap: float | None = None) -> None:
        z = logits.double()
        slope = torch.ones_like(z)
        largest = float(z[z.isfinite()].abs().max()) if z.isfinite().any() else 0.0
        if softcap is not None:
            slope = torch.cosh(z / softcap).square().reciprocal()
            z = softcap * torch.tanh(z / softcap)
        column = target[:, None]
        own = z.gather(1, column).squeeze(1)
        others = z.scatter(1, column, -torch.inf)
        pivot = torch.maximum(own, others.amax(1))
        e = torch.exp(others - pivot[:, None])
        total = e.sum(1) + torch.exp(own - pivot)
        miss = e.sum(1) / total
        log_total = torch.where(own == pivot, e.sum(1).log1p(), total.log())
        self.loss = (pivot - own) + log_total
        self.logsumexp = pivot + log_total
        p = e / total[:, None]
        self.gradient = (slope * p).scatter(1, column, (-slope.gather(1, column).squeeze(1) * miss)[:, None])
        self.squared_norm = self.gradient.square().sum(1)

        log_v, cap = math.log(logits.shape[1]), softcap or 0.0
        steepness = 0.0 if softcap is None else 1 + 2 * largest / softcap
        # float64 has no better truth than this one, whose own error is as large; nor has it a wider format for scalars.
        double = logits.dtype == torch.float64
        u = ROUNDOFF[logits.dtype] * (2 if double else 1)
        scalars = (own - others.amax(1)).abs().nan_to_num(0, 0, 0) if double else torch.zeros_like(own)
        self.loss_error = (67 + log_v + 4 * cap + scalars) * u * self.loss
        self.logsumexp_error = u * self.logsumexp.abs() + (66 + log_v + 4 * cap) * u
        self.squared_norm_error = (201 + 3 * log_v + 12 * cap + 8 * steepness + 2 * scalars) * u * self.squared_norm
        # The target's entry has the relative error of the loss, every p_v that of its exponent.
        exponent = 2 * (z - self.logsumexp[:, None]).abs() + torch.minimum(self.loss, self.logsumexp.abs())[:, None]
        relative = (exponent + (miss * (66 + log_v))[:, None]).scatter(1, column, (67 + log_v + scalars)[:, None])
        relative = relative + 4 + 4 * cap + 4 * steepness
        self.gradient_error = relative * u * self.gradient.abs()

    def check(self, found: native.RowStatistics) -> None:
        assert_within(found.loss, self.loss, self.loss_error)
        assert_within(found.logsumexp, self.logsumexp, self.logsumexp_error)
        assert_within(found.squared_norm, self.squared_norm, self.squared_norm_error)


def assert_within(found: Tensor, truth: Tensor, error: Tensor) -> None:
    smallest = 5 * torch.finfo(found.dtype).tiny  # exponentials below tiny become 0; a slope is up to 4 of them
    excess = (found.double() - truth).abs() - error - smallest
    assert bool((excess <= 0).all()), f"exceeds the allowed error by {float(excess.max()):.3g}"


def random_rows(rows: int, vocabulary: int, scale: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and targets; in every other row the target is well ahead of the others."""
    target = torch.randint(vocabulary, (rows,))
    logits = scale * torch.randn(rows, vocabulary, dtype=dtype)
    logits[torch.arange(0, rows, 2), target[::2]] += 5 * scale
    return logits, target


# ------------------------------------------------------------------------------------------------------------ accuracy


@given(
    rows=st.integers(1, 9),
    # around the ends of vectors (4, 8, 16) and of blocks (256, 512, 1024)
    vocabulary=st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 511, 513, 1023, 1024, 1025, 2049, 5000])),
    scale=st.sampled_from([0.0, 0.01, 1.0, 8.0, 60.0]),
    shift=st.sampled_from([0.0, -300.0, 1000.0]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    instruction_set=st.sampled_from(SETS or ("none",)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200)
def test_statistics_and_gradient_are_right_to_the_stated_bounds(
    rows: int,
    vocabulary: int,
    scale: float,
    shift: float,
    softcap: float | None,
    dtype: torch.dtype,
    instruction_set: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    logits, target = random_rows(rows, vocabulary, scale, dtype)
    logits += shift if softcap is None else 0.0
    truth = Truth(logits, target, softcap)
    found = native.row_statistics(logits, target, softcap=softcap, instruction_set=instruction_set)
    truth.check(found)
    ones = torch.ones(rows, dtype=dtype)
    gradient = native.logits_gradient_(
        logits, target, found.loss, found.logsumexp, ones, softcap=softcap, instruction_set=instruction_set
    )
    assert gradient is logits
    assert_within(gradient, truth.gradient, truth.gradient_error)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("miss", [1e-3, 1e-7, 1e-12, 1e-30])
def test_a_confident_row_keeps_its_relative_accuracy(instruction_set: str, miss: float) -> None:
    vocabulary = 1000
    logits = torch.randn(4, vocabulary)
    target = torch.tensor([0, 17, 998, 999])
    others = logits.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    logits[torch.arange(4), target] = others - math.log(miss)
    truth = Truth(logits, target)
    assert torch.allclose(truth.loss, torch.full((4,), miss, dtype=torch.float64), rtol=1e-2)
    found = native.row_statistics(logits, target, instruction_set=instruction_set)
    truth.check(found)
    gradient = native.logits_gradient_(
        logits, target, found.loss, found.logsumexp, torch.ones(4), instruction_set=instruction_set
    )
    assert_within(gradient, truth.gradient, truth.gradient_error)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("order", ["falling", "rising"])
def test_the_bound_holds_over_many_blocks_and_moving_maxima(instruction_set: str, order: str) -> None:
    vocabulary = 262144
    logits = torch.randn(2, vocabulary).mul_(3).sort(descending=order == "falling").values
    target = torch.tensor([7, vocabulary - 7])
    Truth(logits, target).check(native.row_statistics(logits, target, instruction_set=instruction_set))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -87.33), (torch.float64, -708.3)])
def test_the_exponential_is_right_to_two_roundoffs(instruction_set: str, dtype: torch.dtype, lowest: float) -> None:
    # A logsumexp given as 0 makes the gradient of every class but the target exp(z), z as it stands.
    logits = torch.linspace(lowest, 0, 200_001, dtype=dtype)[None]
    target, zero, one = torch.tensor([7]), torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    truth = logits[0].double().exp()
    native.logits_gradient_(logits, target, zero, zero, one, instruction_set=instruction_set)
    # For float64 the truth's own rounding, up to 1 roundoff in a good libm, comes on top.
    allowed = 2 if dtype == torch.float32 else 3
    error = ((logits[0].double() - truth).abs() / truth)[8:].max()
    assert float(error) <= allowed * ROUNDOFF[dtype]


def test_float64_agrees_with_autograd_through_pytorchs_cross_entropy() -> None:
    logits, target = random_rows(6, 300, 3.0, torch.float64)
    factor = torch.rand(6, dtype=torch.float64)
    for softcap in (None, 10.0):
        z = logits.clone().requires_grad_()
        capped = z if softcap is None else softcap * torch.tanh(z / softcap)
        losses = torch.nn.functional.cross_entropy(capped, target, reduction="none")
        (expected,) = torch.autograd.grad((losses * factor).sum(), z)
        found = native.row_statistics(logits, target, softcap=softcap)
        # PyTorch subtracts: 1e-12 allows for 300 entries of p rounded to 1e-16 each.
        torch.testing.assert_close(found.loss, losses.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.logsumexp, capped.detach().logsumexp(1), rtol=0, atol=1e-12)
        gradient = native.logits_gradient_(logits.clone(), target, found.loss, found.logsumexp, factor, softcap=softcap)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
        norms = (expected / factor[:, None]).square().sum(1)
        torch.testing.assert_close(found.squared_norm, norms, rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- unusual rows


@pytest.mark.parametrize("instruction_set", SETS)
def test_rows_with_a_target_outside_the_vocabulary_are_ignored(instruction_set: str) -> None:
    logits, target = random_rows(5, 40, 1.0)
    target[1], target[2], target[4] = -100, 40, torch.iinfo(torch.int64).max
    logits[2] = torch.nan
    found = native.row_statistics(logits, target, instruction_set=instruction_set)
    kept = torch.tensor([0, 3])
    Truth(logits[kept], target[kept]).check(native.RowStatistics(*(each[kept] for each in found)))
    for each in found:
        assert each[[1, 2, 4]].tolist() == [0, 0, 0]
    gradient = native.logits_gradient_(
        logits, target, found.loss, found.logsumexp, torch.ones(5), instruction_set=instruction_set
    )
    assert gradient[[1, 2, 4]].eq(0).all()
    assert gradient[kept].ne(0).all()


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("vocabulary", [3, 16, 1500])
def test_minus_infinity_is_a_class_that_cannot_be(instruction_set: str, vocabulary: int) -> None:
    logits, target = random_rows(4, vocabulary, 1.0)
    target[:] = 1
    logits[0, 0] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 1] = 2.5  # only the target is left: certain
    logits[2, 1] = -torch.inf  # the target cannot be: infinite loss, a finite gradient
    logits[3] = -torch.inf  # nothing can be
    found = native.row_statistics(logits, target, instruction_set=instruction_set)
    Truth(logits[:1], target[:1]).check(native.RowStatistics(*(each[:1] for each in found)))
    assert [float(each[1]) for each in found] == [0, 2.5, 0]
    assert float(found.loss[2]) == math.inf
    torch.testing.assert_close(found.logsumexp[2], logits[2].logsumexp(0))
    assert found.loss[3].isnan() and found.squared_norm[3].isnan()

    expected = torch.softmax(logits[2], 0)
    expected[1] = -1
    gradient = native.logits_gradient_(
        logits, target, found.loss, found.logsumexp, torch.ones(4), instruction_set=instruction_set
    )
    torch.testing.assert_close(gradient[2], expected)
    torch.testing.assert_close(found.squared_norm[2], expected.square().sum())
    assert gradient[1].eq(0).all() and gradient[0, 0] == 0 and gradient[3].isnan().all()


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("vocabulary", [1, 5, 16, 1500])
def test_a_nan_or_infinite_logit_anywhere_makes_its_row_nan_and_no_other(
    instruction_set: str, bad: float, vocabulary: int
) -> None:
    for place in {0, vocabulary // 2, vocabulary - 1}:
        for at in {0, place}:
            logits, target = random_rows(3, vocabulary, 1.0)
            target[1] = at
            logits[1, place] = bad
            found = native.row_statistics(logits, target, instruction_set=instruction_set)
            gradient = native.logits_gradient_(
                logits.clone(), target, found.loss, found.logsumexp, torch.ones(3), instruction_set=instruction_set
            )
            for each in (*found, gradient):
                assert each[1].isnan().all()
                assert each[[0, 2]].isfinite().all()


def test_a_softcap_makes_infinite_logits_finite() -> None:
    logits = torch.tensor([[torch.inf, 0.0, -torch.inf], [1.0, torch.nan, 2.0]])
    found = native.row_statistics(logits, torch.tensor([1, 0]), softcap=2.0)
    torch.testing.assert_close(found.logsumexp[0], torch.tensor([2.0, 0.0, -2.0]).logsumexp(0))
    assert found.squared_norm[0].isfinite()
    assert all(each[1].isnan() for each in found)


def test_a_vocabulary_of_one_is_certain() -> None:
    found = native.row_statistics(torch.tensor([[3.5], [-1e30]]), torch.zeros(2, dtype=torch.int64))
    assert found.loss.tolist() == [0, 0]
    assert found.squared_norm.tolist() == [0, 0]
    assert found.logsumexp.tolist() == torch.tensor([3.5, -1e30]).tolist()


def test_no_rows_give_empty_results() -> None:
    for vocabulary in (0, 7):
        logits, nothing = torch.empty(0, vocabulary), torch.empty(0)
        found = native.row_statistics(logits, torch.empty(0, dtype=torch.int64))
        assert [each.shape for each in found] == [(0,)] * 3
        assert native.logits_gradient_(logits, nothing.long(), nothing, nothing, nothing) is logits


def test_logits_at_the_ends_of_the_number_range_do_not_overflow() -> None:
    for dtype in (torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        logits = torch.tensor([[largest, -largest, 0.0], [-largest, largest, largest]], dtype=dtype)
        found = native.row_statistics(logits, torch.tensor([0, 1]))
        torch.testing.assert_close(found.loss, torch.tensor([0, math.log(2)], dtype=dtype))
        torch.testing.assert_close(found.squared_norm, torch.tensor([0, 0.5], dtype=dtype))


# ------------------------------------------------------------------------------------------------- layout, threads, use


@pytest.mark.parametrize("instruction_set", SETS)
def test_rows_may_lie_apart_and_what_lies_between_is_left_alone(instruction_set: str) -> None:
    wide = torch.randn(6, 50)
    before = wide.clone()
    logits, target = wide[1:5, 3:40], torch.tensor([0, 36, 5, 17])  # unaligned, with columns on either side
    found = native.row_statistics(logits, target, instruction_set=instruction_set)
    truth = Truth(logits, target)
    truth.check(found)
    native.logits_gradient_(logits, target, found.loss, found.logsumexp, torch.ones(4), instruction_set=instruction_set)
    assert_within(logits, truth.gradient, truth.gradient_error)
    wide[1:5, 3:40] = before[1:5, 3:40]
    assert wide.equal(before)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    logits, target = random_rows(333, 700, 2.0)
    target[50:150] = -1
    factor = torch.randn(333)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = native.row_statistics(logits, target)
            gradient = native.logits_gradient_(logits.clone(), target, found.loss, found.logsumexp, factor)
            results.append((*found, gradient))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def test_the_factor_multiplies_each_rows_gradient_and_zero_clears_it() -> None:
    logits, target = random_rows(4, 100, 1.0)
    found = native.row_statistics(logits, target)
    plain = native.logits_gradient_(logits.clone(), target, found.loss, found.logsumexp, torch.ones(4))
    factor = torch.tensor([0.5, 0.0, -2.0, 0.0])  # powers of two: exact
    logits[3] = torch.nan
    scaled = native.logits_gradient_(logits, target, found.loss, found.logsumexp, factor)
    assert scaled.equal(plain * factor[:, None])


def test_the_best_instruction_set_comes_first_and_portable_is_always_there() -> None:
    assert SETS[-1] == "portable"
    assert [name for name in ("avx512", "avx2", "portable") if name in SETS] == list(SETS)
    logits, target = random_rows(2, 100, 1.0)
    best = native.row_statistics(logits, target, instruction_set=SETS[0])
    assert all(a.equal(b) for a, b in zip(best, native.row_statistics(logits, target), strict=True))


# --------------------------------------------------------------------------------------------------------------- errors


def test_wrong_tensors_are_refused_by_name() -> None:
    logits, target = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    for bad in (logits.half(), logits[0], logits.t(), logits[:, ::2], logits.to("meta")):
        with pytest.raises(ValueError, match=r"^logits: got .*; takes"):
            native.row_statistics(bad, target)
    for bad in (target.int(), target[:2], target.repeat_interleave(2)[::2], target.to("meta")):
        with pytest.raises(ValueError, match=r"^target: got .*; takes"):
            native.row_statistics(logits, bad)
    rows = torch.zeros(3)
    for name in ("loss", "logsumexp", "factor"):
        arguments: dict[str, Any] = {"loss": rows, "logsumexp": rows, "factor": rows, name: rows.double()}
        with pytest.raises(ValueError, match=rf"^{name}: got .*; takes"):
            native.logits_gradient_(logits, target, **arguments)
    with pytest.raises(ValueError, match=r"rows that are written"):
        native.logits_gradient_(torch.randn(1, 8).expand(3, 8), target, rows, rows, rows)


@pytest.mark.parametrize("softcap", [0.0, -1.0, math.nan, math.inf, 1e-60])
def test_a_softcap_that_is_no_cap_is_refused(softcap: float) -> None:
    with pytest.raises(ValueError, match="softcap"):
        native.row_statistics(torch.randn(3, 8), torch.zeros(3, dtype=torch.int64), softcap=softcap)


def test_the_native_functions_refuse_what_they_cannot_do() -> None:
    module = native._native
    assert module is not None
    logits, target, out = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64), torch.full((3,), 7.0)
    z, y, o = logits.data_ptr(), target.data_ptr(), out.data_ptr()
    refused = {
        "negative": (z, -1, 8, 8, y, 0.0, o, o, o, 1),
        "vocabulary must not be 0": (z, 3, 0, 8, y, 0.0, o, o, o, 1),
        "pointer is null": (z, 3, 8, 8, 0, 0.0, o, o, o, 1),
        "threads": (z, 3, 8, 8, y, 0.0, o, o, o, 0),
        "instruction set": (z, 3, 8, 8, y, 0.0, o, o, o, 1, "abacus"),
    }
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message):
            module.row_statistics_float32(*arguments)
    assert out.tolist() == [7, 7, 7]


def test_without_the_native_module_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_reason", "it was not built")
    assert native.unavailable() == "it was not built"
    with pytest.raises(RuntimeError, match="it was not built"):
        native.row_statistics(torch.randn(3, 8), torch.zeros(3, dtype=torch.int64))
