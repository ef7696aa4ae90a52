"""Odd inputs to every public op: an answer, or a ValueError; never a crash, never a silent wrong answer.

Three promises for any layout and any values. The strides of an input change nothing. What is poisoned in one example
(NaN, infinities, the largest numbers) never reaches another's loss or score, and never looks like an answer of its own.
Inputs are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attent
from attent import reference

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "expanded": lambda t: t[:1].expand_as(t),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "huge strides": lambda t: torch.stack([t] * 1000, 0).movedim(0, -1).contiguous()[..., 500],
    "overlapping": lambda t: torch.as_strided(t.flatten().clone(), t.shape, [1] * t.dim()),
    "offset": lambda t: torch.cat([t.new_zeros(7), t.flatten()])[7:].view(t.shape),
}
POISON = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38)
TINY = (1e-42, -1e-42, 0.0, -0.0)  # denormal in float32

#: How often inputs are drawn: a few times in the fast tier, many in the slow one.
DRAWS = pytest.mark.parametrize("draws", [8, pytest.param(100, marks=pytest.mark.slow)])


def drawn(draws: int, body: Callable[[Any], None]) -> None:
    """Run ``body`` on ``draws`` examples."""

    @settings(max_examples=draws)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        body(data)

    run()


B, T, D, V, H = 4, 5, 6, 11, 2
TARGET = torch.arange(B * T).view(B, T) * 7 % V
CLASS = TARGET[:, 0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss(score: str, **options: Any) -> Callable[..., dict[str, Tensor]]:
    def run(input: Tensor, weight: Tensor) -> dict[str, Tensor]:
        losses, scores = attent.linear_cross_entropy(
            input, weight, TARGET[:, : input.shape[1]], reduction="example", score=score, backend="torch", **options
        )
        return {"losses": losses, "scores": scores}

    return run


def attention(**options: Any) -> Callable[..., dict[str, Tensor]]:
    def run(query: Tensor, key: Tensor, value: Tensor, target: Tensor) -> dict[str, Tensor]:
        found = attent.scored_attention(query, key, value, target=target, score="residual", backend="torch", **options)
        return {"output": found.output, "losses": found.losses, "scores": found.scores}

    return run


def classified(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    readout = attent.Readout(normal(V, H * D, seed=9), CLASS)
    found = attent.scored_attention(query, key, value, readout=readout, score="logit", backend="torch")
    return {"losses": found.losses, "scores": found.scores}


def predictions(prediction: Tensor) -> dict[str, Tensor]:
    return {"scores": attent.example_scores(prediction, TARGET)}


#: name -> (op, shapes of its inputs, how many of them have the examples as their first size)
OPS: dict[str, tuple[Callable[..., dict[str, Tensor]], list[tuple[int, ...]], int]] = {
    **{f"loss, {s}": (loss(s), [(B, T, D), (V, D)], 1) for s in ("loss", "logit", "hidden", "head")},
    "loss, smoothed": (loss("logit", label_smoothing=0.1), [(B, T, D), (V, D)], 1),
    "loss, softcap": (loss("head", softcap=5.0), [(B, T, D), (V, D)], 1),
    **{
        f"attention, {name}": (attention(**options), [(B, H, T, D)] * 4, 4)
        for name, options in {
            "full": {},
            "causal": {"is_causal": True},
            "window": {"window": (2, 0)},
            "softcap": {"softcap": 3.0},
        }.items()
    },
    "attention, readout": (classified, [(B, H, T, D)] * 3, 3),
    "predictions": (predictions, [(B, T, V)], 1),
}


def inputs_of(op: str) -> list[Tensor]:
    return [normal(*shape, seed=i) for i, shape in enumerate(OPS[op][1])]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        # float32: sums of at most T·V terms of size 10, each rounded by 6e-8.
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=3e-5, equal_nan=True, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("op", OPS)
@DRAWS
def test_strides_change_nothing_and_inputs_are_left_alone(op: str, draws: int) -> None:
    def body(data: Any) -> None:
        run = OPS[op][0]
        views = [LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](tensor) for tensor in inputs_of(op)]
        plain = [view.clone(memory_format=torch.contiguous_format) for view in views]
        found = run(*views)
        assert_same(found, run(*plain))
        assert all(torch.equal(view, before) for view, before in zip(views, plain, strict=True))

    drawn(draws, body)


@pytest.mark.parametrize("op", OPS)
@DRAWS
def test_poison_stays_in_its_example_and_never_looks_like_an_answer(op: str, draws: int) -> None:
    def body(data: Any) -> None:
        run, shapes, count = OPS[op]
        tensors = inputs_of(op)
        clean = run(*tensors)
        which, example = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, B - 1))
        value = data.draw(st.sampled_from(POISON))
        place = tuple(data.draw(st.integers(0, size - 1)) for size in shapes[which][1:])
        tensors[which][(example, *place)] = value
        found = run(*tensors)
        others = [i for i in range(B) if i != example]
        for name in clean:
            # Not bit for bit: PyTorch's fast kernel loses what is
            # not finite, so a batch that holds such goes another way.
            assert_same({name: found[name][others]}, {name: clean[name][others]})
        if value != value:
            assert found["scores"][example].isnan()

    drawn(draws, body)


@pytest.mark.parametrize("op", OPS)
@DRAWS
def test_denormals_and_signed_zeros_are_numbers(op: str, draws: int) -> None:
    def body(data: Any) -> None:
        run, _, count = OPS[op]
        tensors = inputs_of(op)
        which = data.draw(st.integers(0, count - 1))
        tensors[which].flatten()[::3] = 0
        tensors[which].view(-1)[::2] = data.draw(st.sampled_from(TINY))
        assert all(bool(value.isfinite().all()) for value in run(*tensors).values())
        tensors[which].fill_(TINY[0])
        assert all(bool(value.isfinite().all()) for value in run(*tensors).values())

    drawn(draws, body)


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 2, 9, 4), (1, 2, 70, 8)])
@pytest.mark.parametrize("value", POISON[:3])
@pytest.mark.parametrize("where", range(2))
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_row_whose_scores_are_lost_is_nan_as_in_the_specification(
    shape: tuple[int, ...], value: float, where: int, is_causal: bool
) -> None:
    # PyTorch's CPU flash attention makes 0 of them: it takes a row of NaN, or of -inf, for one without keys.
    tensors = [normal(*shape, seed=i) for i in range(3)]
    tensors[where][0, 0, shape[2] // 2, 3] = value
    target = normal(*shape, seed=3)
    options: dict[str, Any] = {"score": "residual", "is_causal": is_causal}
    found = attent.scored_attention(*tensors, target=target, backend="torch", **options)
    expected = reference.scored_attention(*(t.double() for t in tensors), target=target.double(), **options)
    bad = expected.output.isnan()
    assert torch.equal(found.output.isnan(), bad)
    assert torch.equal(found.scores.isnan(), expected.scores.isnan())
    torch.testing.assert_close(found.output[~bad].double(), expected.output[~bad], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- devices and sizes


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    return on_meta(*shape, dtype=torch.int64)


LONG = 1 << 31  # tokens: more than an int32 counts
META: dict[str, tuple[Callable[[], Any], list[tuple[int, ...]]]] = {
    "loss": (lambda: attent.linear_cross_entropy(on_meta(4, LONG, 16), on_meta(20, 16), ints(4, LONG), score="head"),
             [(), (4,)]),
    "wide loss": (lambda: attent.linear_cross_entropy(on_meta(70_000, 40_000), on_meta(200_000, 40_000), ints(70_000)),
                  [()]),
    "attention": (lambda: attent.scored_attention(*[on_meta(8, 64, 1 << 20, 128)] * 3, score="residual",
                                                  target=on_meta(8, 64, 1 << 20, 128))[:2],
                  [(8, 64, 1 << 20, 128), (8, 64, 1 << 20)]),
    "selection": (lambda: attent.select_top_k(on_meta(LONG - 1), 1 << 30, temperature=1.0, floor=0.5, seed=3),
                  [(1 << 30,)] * 3),
    "score and select": (lambda: attent.score_and_select(on_meta(9, 40, 16), on_meta(20, 16), ints(9, 40), 2),
                         [(2,)] * 3),
    "predictions": (lambda: attent.example_scores(on_meta(3, 4, 5), ints(3, 4)), [(3,)]),
}  # fmt: skip


@pytest.mark.parametrize("name", META)
def test_tensors_without_data_give_shapes_at_any_size(name: str) -> None:
    call, shapes = META[name]
    found = call()
    found = [found] if isinstance(found, Tensor) else list(found)
    assert [tuple(tensor.shape) for tensor in found] == shapes
    assert all(tensor.is_meta for tensor in found)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: attent.linear_cross_entropy(normal(2, 3), on_meta(4, 3), CLASS[:2]), "linear_weight"),
        (lambda: attent.linear_cross_entropy(normal(2, 3), normal(4, 3), ints(2)), "target"),
        (lambda: attent.score_and_select(normal(2, 3), normal(4, 3), ints(2), 1), "target"),
        (lambda: attent.scored_attention(normal(1, 1, 2, 4), on_meta(1, 1, 2, 4), normal(1, 1, 2, 4)), "key"),
        (lambda: attent.example_scores(normal(2, 3), ints(2)), "target"),
        (lambda: attent.select_top_k(normal(4), 2, valid=on_meta(4, dtype=torch.bool)), "valid"),
        (lambda: attent.select_top_k(on_meta(1 << 32), 5), "scores"),
        (lambda: attent.Teacher(4, total_epochs=2).record(torch.arange(2), on_meta(2)), "scores"),
        (lambda: attent.Teacher(4, total_epochs=2).record(ints(2), normal(2).abs()), "example_ids"),
    ],
)  # fmt: skip
def test_tensors_on_the_wrong_device_are_named(call: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: got "):
        call()


@pytest.mark.parametrize("empty", [(0, 5, 6), (3, 0, 6)])
def test_no_examples_and_no_tokens_are_fine(empty: tuple[int, ...]) -> None:
    target = torch.zeros(empty[:2], dtype=torch.long)
    for score in ("logit", "hidden", "head"):
        losses, scores = attent.linear_cross_entropy(
            normal(*empty), normal(V, D), target, score=score, reduction="example", backend="torch"
        )
        assert losses.shape == scores.shape == empty[:1] and not scores.any()
    heads = normal(empty[0], H, empty[1], D)
    found = attent.scored_attention(heads, heads, heads, target=heads, score="residual", backend="torch")
    assert found.scores.shape == empty[:1] and not found.scores.any()
    assert len(attent.select_top_k(normal(0), 0).index) == 0
