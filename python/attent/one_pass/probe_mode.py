"""What watches the operations of a probe: stand-ins for random numbers, and undoing of what the learner writes.

A probe compares runs on different rows, so every random number has to belong to its row: it is computed from the values
that are dropped out or that the noise is shaped like.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import OnePassError
from .rules import attention_dropout


class ProbeMode(TorchDispatchMode):
    """Replaces random numbers, refuses batch statistics, keeps what is about to be overwritten; may log results."""

    def __init__(self, log_results: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log: list[tuple[str, list[Tensor]]] | None = [] if log_results else None
        self._made_here: set[int] = set()  # storages
        self._overwritten: dict[int, tuple[Tensor, Tensor]] = {}
        self._templates: dict[int, Tensor] = {}  # storage of an empty_like -> what it is like
        self._versions = ExitStack()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if "batch_norm" in name:
            _refuse_batch_statistics(func, args)
        self._keep_overwritten(func, args, kwargs)
        result = self._stand_in(func, name, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        results = [x for x in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(x, Tensor)]
        self._made_here.update(x.untyped_storage()._cdata for x in results if not func._schema.is_mutable)
        if name == "empty_like":
            self._templates[results[0].untyped_storage()._cdata] = args[0]
        outside = func._schema.is_mutable and any(x.untyped_storage()._cdata not in self._made_here for x in results)
        if self.log is not None and not outside:
            self.log.append((str(func), [x.detach().clone() for x in results]))
        return result

    def _stand_in(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A random operation's result as a function of its row; None: not a random operation."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        dropout = attention_dropout(func, args, kwargs)
        if dropout is not None:
            if dropout > 0:
                raise OnePassError(
                    f"{func} with dropout {dropout:g} replays its random numbers in the backward: on chosen rows it"
                    " would draw those of other rows. Set the attention's dropout to 0"
                )
            return None
        if name == "native_dropout":
            p = float(args[1])
            kept = _noise(args[0]) >= p
            return args[0] * kept / (1 - p) if p < 1 else args[0] * 0, kept
        if name in ("bernoulli_", "uniform_", "normal_", "exponential_"):
            template = self._templates.get(args[0].untyped_storage()._cdata)
            noise = torch.full_like(args[0], 0.75) if template is None else _noise(template).to(args[0].dtype)
            if name == "bernoulli_":
                p = args[1] if len(args) > 1 else 0.5
                noise = noise < p if template is not None else torch.ones_like(noise)
            return args[0].copy_(noise)
        if name in ("rand_like", "randn_like"):
            return _noise(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if name == "bernoulli":
            return (_noise(args[0]) < args[0]).to(args[0].dtype)
        if name in ("rand", "randn", "normal"):
            return func(*args, **kwargs).fill_(0.75)
        return None  # a permutation, a draw among rows: runs on different rows will differ, and the probe will say so

    def _keep_overwritten(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not func._schema.is_mutable:
            return
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._made_here:
                    self._keep(tensor)

    def _keep(self, tensor: Tensor) -> None:
        if id(tensor) not in self._overwritten:
            self._versions.enter_context(_unsafe_preserve_version_counter(tensor))
            self._overwritten[id(tensor)] = (tensor, tensor.detach().clone())

    def restore(self) -> None:
        """Put back what was overwritten, unseen by autograd's count of changes."""
        with torch.no_grad():
            for tensor, before in self._overwritten.values():
                tensor.detach().copy_(before)
        self._overwritten.clear()
        self._versions.close()


def _noise(values: Tensor) -> Tensor:
    """Numbers in [0, 1) that look random and depend on each element's value alone."""
    spread = torch.nan_to_num(values.detach().double() + 0.1) * 12.9898
    return (spread.sin() * 43758.5453).frac().abs()


def _refuse_batch_statistics(func: Any, args: tuple[Any, ...]) -> None:
    for i, argument in enumerate(func._schema.arguments):
        if argument.name in ("training", "train") and i < len(args) and args[i] is False:
            return
    if "backward" in func._schema.name or args[0].shape[0] == 1:  # InstanceNorm folds the batch into the channels
        return
    raise OnePassError(
        f"cross-example computation: {func} on a tensor of shape {tuple(args[0].shape)} normalises by statistics of the"
        " batch (BatchNorm in training mode), so each row's gradient depends on the other rows"
    )


def seed_all(device: torch.device) -> None:
    """Give every generator that a forward may draw from a fixed state; inside :func:`no_trace`."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - learners that draw from the global generator are what this is for
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


@contextmanager
def no_trace(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Leave random states, buffers, autocast's cache and training modes as they were."""
    buffers = [(module, dict(module._buffers), module.training) for root in modules for module in root.modules()]
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [device] if device.type == "cuda" else []
    kind = device.type
    autocast = torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )
    try:
        # Met under a mode that watches operations, torch.compile would give a function up for good.
        with torch.random.fork_rng(devices=devices), autocast, torch.compiler.set_stance("force_eager"):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module, before, training in buffers:
            module._buffers.update(before)
            module.training = training
