"""Finds where the batch sits in everything a forward saves, and refuses learners whose rows look at each other.

The forward runs on a few rows, and on subsets of them in other orders. A saved tensor of a learner without
cross-example operations is then the subset's rows of the first run's, under one layout. No backward is run here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch
from .errors import OnePassError
from .layout import ROW_NUMBERS, Layout, cut
from .probe_mode import ProbeMode, no_trace, seed_all

_ROWS = 5  # of the first run: a prime, so that few sizes divide by it by chance
#: How far values may differ between batch sizes, relative to a tensor's largest: what summing in another order may do.
PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_SMALLEST = 1e-3  # tensors whose largest value is below this are compared absolutely: they may be nothing but rounding


@dataclass
class Plan:
    """What a probe learned of a signature."""

    layouts: list[Layout | None]  # of each saved tensor, None: it has no batch
    shapes: list[tuple[tuple[int, ...], torch.dtype]]  # what the whole batch's forward is to save
    lasting: bool  # the probed rows all differ, so what was learned holds for other batches
    verified: bool = field(default=False)  # a gradient was compared with the full backward's


@dataclass
class Run:
    """A forward on some rows: what it saves for the backward, its losses, and operations' results if asked for."""

    saved: list[Tensor]
    losses: Tensor
    log: list[tuple[str, list[Tensor]]]

    def rows_differ(self) -> bool:
        """Whether the rows can be told apart."""
        return len(self.losses.detach().unique()) == len(self.losses)


#: Runs the forward on rows of the batch; with True, logs results.
Runner = Callable[[list[int], bool], Run]


def probe(function: Callable[..., Any], batch: Batch, modules: list[nn.Module]) -> Plan:
    """Learn a signature's plan, or raise :class:`OnePassError` naming what cannot be cut to rows."""
    with no_trace(modules, batch.device):
        layouts, whole = learn_layouts(lambda rows, log: _run(function, batch, rows, log), batch.size)
    shapes = [(_at_batch_size(x, layout, batch.size), x.dtype) for x, layout in zip(whole.saved, layouts, strict=True)]
    return Plan(layouts, shapes, lasting=whole.rows_differ())


def learn_layouts(run: Runner, size: int) -> tuple[list[Layout | None], Run]:
    """Where the batch of ``size`` rows is in each tensor that ``run`` saves, and the run on a few rows."""
    choose = random.Random(0)
    count = min(size, _ROWS)
    rows = choose.sample(range(size), count)
    # No run on a single row: a size of 1 takes other paths through torch. Where a subset could be one, two are taken.
    positions = [choose.sample(range(count), size) for size in (2, 2, count - 1, count) if size >= 2]
    whole = run(rows, False)
    parts = [(at, run([rows[i] for i in at], False)) for at in positions]
    try:
        return _layouts(whole, parts, count), whole
    except OnePassError as error:
        raise OnePassError(f"{error}{_culprit(run, rows, positions[0])}") from None


def _run(function: Callable[..., Any], batch: Batch, rows: list[int], log_results: bool) -> Run:
    """One forward on some rows: what it saves, and its losses."""
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor if tensor.is_leaf else tensor.detach()

    def some(tensor: Tensor) -> Tensor:
        picked = tensor.detach()[torch.tensor(rows, device=tensor.device)]
        return picked.requires_grad_(tensor.requires_grad)

    args, kwargs = batch.map(some)
    mode = ProbeMode(log_results)
    seed_all(batch.device)  # a learner that draws for all rows alike, as layer drop does, draws the same in each run
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), mode:
            result = function(*args, **kwargs)
    except (OnePassError, NotImplementedError):
        raise
    except Exception as error:
        raise OnePassError(f"per_example_loss does not run on {len(rows)} of the batch's rows: {error}") from error
    finally:
        mode.restore()
    losses = losses_of(result)[0]
    if losses.shape != (len(rows),):
        raise OnePassError(
            f"per_example_loss returns losses of shape {tuple(losses.shape)} for {len(rows)} rows; takes [B]"
        )
    return Run(saved, losses, mode.log or [])


def losses_of(result: Any) -> tuple[Tensor, Any]:
    """What a per-example loss returned as losses and scores (None: it returns no scores)."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor):
        return result[0], result[1]
    if not isinstance(result, Tensor):
        raise OnePassError(f"per_example_loss returns {type(result).__name__}; takes losses [B], or (losses, scores)")
    return result, None


def graph_nodes(tensor: Tensor) -> list[Any]:
    """The nodes of autograd that a tensor hangs on."""
    seen: set[Any] = set()
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return list(seen)


# --------------------------------------------------------------------------------------------------------- the layouts


def _layouts(whole: Run, parts: list[tuple[list[int], Run]], count: int) -> list[Layout | None]:
    if any(len(part.saved) != len(whole.saved) for _, part in parts):
        raise OnePassError("how many tensors the forward saves depends on the rows in the batch")
    found: list[list[Layout | None]] = []
    for i, tensor in enumerate(whole.saved):
        found.append(_explain(tensor, [(at, part.saved[i]) for at, part in parts], count, f"saved tensor {i}"))
    if not _same_rows(whole.losses, Layout(0, 1, 1), [(at, part.losses) for at, part in parts]):
        raise OnePassError("cross-example computation: a row's loss depends on the other rows")
    known = {(x[0].outer * x[0].inner): x[0][1:] for x in found if len(x) == 1 and x[0] is not None}
    layouts: list[Layout | None] = []
    for i, candidates in enumerate(found):
        if len(candidates) > 1:
            # Values that are alike in all rows tell nothing; tensors of the same merged dimension that do, decide.
            first = candidates[0]
            assert first is not None
            merged = known.get(first.outer * first.inner)
            candidates = [x for x in candidates if x is not None and x[1:] == merged]
            clear = all(
                x[0][1:] == merged
                for x in found
                if len(x) == 1 and x[0] is not None and x[0].outer * x[0].inner == first.outer * first.inner
            )
            if len(candidates) != 1 or not clear:
                raise OnePassError(
                    f"cannot tell where the batch is in saved tensor {i} of shape {tuple(whole.saved[i].shape)}: its"
                    " values fit several layouts"
                )
        layouts.append(candidates[0])
    return layouts


def _explain(whole: Tensor, parts: list[tuple[list[int], Tensor]], count: int, name: str) -> list[Layout | None]:
    """The layouts under which every part is its rows of the whole."""
    described = f"{name} of shape {tuple(whole.shape)} ({str(whole.dtype).removeprefix('torch.')})"
    smaller = [(at, part) for at, part in parts if len(at) < count]
    if all(part.shape == whole.shape for _, part in parts):
        if all(_same(whole, part) for _, part in parts):
            return [None]
        raise OnePassError(f"cross-example computation: {described} has no batch dimension but depends on the rows")
    dims = {
        tuple(i for i in range(whole.dim()) if part.dim() == whole.dim() and part.shape[i] != whole.shape[i])
        for _, part in smaller
    }
    if len(dims) != 1 or len(places := dims.pop()) != 1:
        raise OnePassError(
            f"cannot find the batch in {described}: its shape does not grow with the batch in one dimension"
        )
    dim = places[0]
    merged = whole.shape[dim] // count
    if any(part.shape[dim] != merged * len(at) for at, part in parts) or whole.shape[dim] != merged * count:
        raise OnePassError(f"cannot find the batch in {described}: dimension {dim} is no multiple of the batch's size")
    layouts = [Layout(dim, outer, merged // outer) for outer in range(1, merged + 1) if merged % outer == 0]
    fitting: list[Layout | None] = [layout for layout in layouts if _same_rows(whole, layout, parts)]
    if fitting:
        return fitting
    if whole.dim() == 1 and merged == 1 and not whole.is_floating_point() and not whole.is_complex():
        numbers = all(bool((x == torch.arange(len(x), device=x.device)).all()) for x in (whole, *(p for _, p in parts)))
        if numbers:
            return [ROW_NUMBERS]
    raise OnePassError(f"cross-example computation: {described} depends on which other rows are in the batch")


def _same_rows(whole: Tensor, layout: Layout, parts: list[tuple[list[int], Tensor]]) -> bool:
    return all(_same(cut(whole, layout, torch.tensor(at, device=whole.device)), part) for at, part in parts)


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    if a.shape != b.shape or a.data_ptr() == b.data_ptr():
        return a.shape == b.shape
    if not a.is_floating_point() and not a.is_complex():
        return bool(torch.equal(a, b))
    tolerance = PROBE_TOLERANCE.get(a.dtype, 1e-4)
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = a.double(), b.double()
    alike = (a == b) | (a.isnan() & b.isnan())
    if bool(alike.all()):
        return True
    scale = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else b.new_zeros(())
    difference = (a - b).abs().masked_fill(alike, 0)
    return bool(difference.max() <= tolerance * scale.clamp(min=_SMALLEST))


def _at_batch_size(tensor: Tensor, layout: Layout | None, batch: int) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if layout == ROW_NUMBERS:
        return (batch,)
    if layout is not None:
        shape[layout.dim] = layout.outer * batch * layout.inner
    return tuple(shape)


# --------------------------------------------------------------------------------------------- naming what was refused


def _culprit(run: Runner, rows: list[int], at: list[int]) -> str:
    """The first operation whose result is not its rows' alone, in words."""
    whole, part = run(rows, True), run([rows[i] for i in at], True)
    for (name, results), (other_name, others) in zip(whole.log, part.log, strict=False):
        if name != other_name:
            return f"; the operations themselves depend on the rows, from {name} on"
        for result, other in zip(results, others, strict=True):
            if "empty" in name or not result.is_floating_point():  # row numbers and permutations are not to blame yet
                continue
            try:
                _explain(result, [(at, other)], len(rows), "a result")
            except OnePassError:
                return f"; the first operation to mix rows is {name}, whose result has shape {tuple(result.shape)} here"
    return ""
