"""Problems for tests of linear cross-entropy: drawn by hypothesis, in every layout and with every option."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from attent.ops import head_scores, logits_passes, tokens, torch_linear_cross_entropy

NAMES = ("loss", "logit", "hidden", "head")
PER_EXAMPLE = ("mean", "sum", "rms")
REDUCTIONS = ("mean", "sum", "none", "example")


class Problem(NamedTuple):
    input: Tensor
    linear_weight: Tensor
    target: Tensor
    options: dict[str, Any]  # all but reduction, score and per_example

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        cu_seqlens = self.options.get("cu_seqlens")
        if cu_seqlens is not None:
            lengths: list[int] = cu_seqlens.diff().tolist()
            return lengths
        return [self.input.shape[1:-1].numel()] * len(self.input)

    def examples(self) -> list[tuple[Tensor, Tensor]]:
        """Each example's hidden states [T, D] and what they are to predict, [T] or [T, V], shifted if asked for."""
        hidden = self.input.reshape(sum(self.lengths), self.input.shape[-1]).split(self.lengths)
        target = self.target.reshape(sum(self.lengths), *self.target.shape[self.input.dim() - 1 :]).split(self.lengths)
        if self.options.get("shift"):
            return [(h[:-1], y[1:]) for h, y in zip(hidden, target, strict=True)]
        return list(zip(hidden, target, strict=True))

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        options = {name: cast(value) for name, value in self.options.items()}
        return Problem(cast(self.input), cast(self.linear_weight), cast(self.target), options)

    def valid(self, i: int) -> Tensor:
        """Which of example i's tokens have a target."""
        target = self.examples()[i][1]
        if target.is_floating_point():
            return torch.ones(len(target), dtype=torch.bool)
        return target != self.options.get("ignore_index", -100)

    def token_losses(self, logits: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
        """PyTorch's own cross-entropy of raw logits with the problem's options."""
        softcap = self.options.get("softcap")
        return F.cross_entropy(
            logits if softcap is None else softcap * torch.tanh(logits / softcap),
            target.long() if not target.is_floating_point() else target,
            weight=self.options.get("weight"),
            ignore_index=self.options.get("ignore_index", -100),
            label_smoothing=self.options.get("label_smoothing", 0.0),
            reduction=reduction,
        )


# Sizes are drawn from lists, since integers are drawn with a bias to 0 and 1, and half of all problems would be empty.
SIZES = st.sampled_from([3, 1, 2, 4, 5, 6, 7])
BATCHES = st.sampled_from([3, 2, 4, 1, 0])
LENGTHS = st.sampled_from([4, 3, 2, 5, 6, 1, 0])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any layout, size, target and option, in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def sometimes(value: Any) -> Any:
        return value if draw(st.booleans()) else None

    layout = draw(st.sampled_from(["packed", "padded", "rows"]))
    classes, width, batch = draw(SIZES), draw(SIZES), draw(BATCHES)
    options: dict[str, Any] = {}
    if layout == "packed":
        lengths = [draw(LENGTHS) for _ in range(batch)]
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        shape: tuple[int, ...] = (sum(lengths),)
    else:
        shape = (batch,) if layout == "rows" else (batch, draw(LENGTHS))
    if layout != "rows":
        options["shift"] = draw(st.booleans())

    if draw(st.sampled_from([False, False, True])):
        target = normal(*shape, classes).softmax(-1)
    else:
        options["ignore_index"] = ignore_index = draw(st.sampled_from([-100, 0, classes - 1]))
        target = torch.randint(classes, shape, generator=generator)
        ignored = draw(st.sampled_from([0.4, 0.0, 1.0]))
        target[torch.rand(shape, generator=generator) < ignored] = ignore_index
        target = target.to(draw(st.sampled_from([torch.int64, torch.int32])))
    options["linear_bias"] = sometimes(normal(classes))
    options["weight"] = sometimes((normal(classes) + 0.5).clamp(min=0))  # some are 0
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    options["softcap"] = draw(st.sampled_from([None, 2.0]))
    options["example_weight"] = sometimes((normal(batch) + 0.5).clamp(min=0))
    hidden = with_layout(normal(*shape, width), draw(st.sampled_from(["contiguous", "transposed", "every second"])))
    linear_weight = with_layout(normal(classes, width), draw(st.sampled_from(["contiguous", "transposed"])))
    return Problem(hidden, linear_weight, target, options)


def with_layout(values: Tensor, layout: str) -> Tensor:
    """The same values at other strides."""
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second":
        return torch.stack([values, values.new_full((), torch.nan).expand_as(values)], -1).flatten(-2)[..., ::2]
    return values


@contextmanager
def small_chunks(max_bytes: int) -> Iterator[None]:
    """Chunks, slabs and Gram matrices of ``max_bytes`` instead of 64 MB."""
    with (
        mock.patch.object(head_scores, "MAX_BYTES", max_bytes),
        mock.patch.object(torch_linear_cross_entropy, "MAX_BYTES", max_bytes),
    ):
        yield


@contextmanager
def passes_of(which: str) -> Iterator[None]:
    """The passes over logits by the "native" module, or, as where it is not installed, by "PyTorch"."""
    with ExitStack() as stack:
        if which == "PyTorch":
            stack.enter_context(mock.patch.object(logits_passes.native, "unavailable", lambda: "switched off"))
        yield


@contextmanager
def no_looking() -> Iterator[None]:
    """Values are not read to decide what to compute, as on a GPU: tokens are masked, not left out."""
    with mock.patch.object(tokens, "may_look", lambda device: False):
        yield
