"""``attent.OnePass``: forward a pool once, train on the rows chosen from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from .._checks import (
    FLOATING,
    INTEGER,
    check_choice,
    check_has_values,
    check_int,
    check_number,
    check_tensor,
    describe,
    refuse,
    values_readable,
)
from .batch import Batch, modules_of
from .chosen_loss import chosen_loss, whole_loss
from .compiled import CompiledForward, CompileEngine
from .eager import EagerEngine, EagerForward, what_is_compiled
from .errors import OnePassError
from .lowering import BACKENDS
from .packed import CU_SEQLENS, PackedBatch, batch_of
from .probe import losses_of
from .report import OnePassReport, estimated_cost
from .two_pass import TwoPassForward
from .verify import gradient_error

#: A forward that keeps its graph: its backward can be cut to chosen rows.
Forward = EagerForward | CompiledForward


class OnePass:
    """Trains on rows chosen from a batch at one forward of the batch and a backward of the chosen rows only.

    A stream taught in five lines:

    >>> model = torch.nn.Linear(8, 4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> stream = [(torch.randn(32, 8), torch.randint(4, (32,))) for _ in range(3)]
    >>> def per_example_loss(x, y):
    ...     logits = model(x)
    ...     return torch.nn.functional.cross_entropy(logits, y, reduction="none"), attent.example_scores(logits, y)
    >>> step = attent.OnePass(per_example_loss)                                                      # 1
    >>> teacher = attent.Teacher(total_steps=len(stream), ratio=0.5, reweight="inverse")             # 2
    >>> for x, y in stream:
    ...     losses, scores = step(x, y)                                                              # 3
    ...     lesson = teacher.choose(scores)                                                          # 4
    ...     step.loss(losses, lesson.index, teacher.weights(lesson)).backward()                      # 5
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> print(step.report().engine, step.report().keep_ratio)
    eager 0.5

    ``teacher.choose(scores, example_ids=ids)`` of a teacher made with ``num_examples`` records the pool's scores too.

    Gradients are those of training on the chosen rows alone, to rounding. With random operations (dropout) they are
    those of the forward that was run: of the whole batch's masked backward.

    Engines:

    * ``"eager"`` costs (1 + 2r)/3 of a full step at keep ratio r. The learner is probed on a few rows first, once per
      signature (shapes, dtypes, options, training modes, autocast): one whose rows look at each other (BatchNorm,
      in-batch contrast) is refused, naming tensor and operation. The first gradient of each signature is compared with
      the whole batch's masked backward, and so is every ``verify_every``-th: that step costs two backwards more.
    * ``"compile"`` costs as much, with what torch.compile saves. The learner, compiled or not, is compiled here as one
      graph, once per signature; graph breaks are refused. It is probed, and the first gradient of each k compared, in
      the same way. ``"inductor"`` compiles the backward for each k: a fifth k of a signature is refused.
    * ``"two_pass"`` costs (1 + 3r)/3: a forward without gradient, then forward and backward of the chosen rows, which
      draw new random numbers: with dropout, the losses and scores chosen by come from other masks than those trained
      with. It takes any learner, batch statistics being those of the chosen rows; peak memory is r of a full step's.
    * ``"auto"`` is ``"compile"`` if ``per_example_loss`` or a module that it uses is already under torch.compile, else
      ``"eager"``. Where that one refuses the learner it is ``"two_pass"``, with a warning and the reason in
      :meth:`report`.

    Not yet run on a GPU.

    Args:
        per_example_loss: called with the batch, returns ``losses`` ``[B]`` or ``(losses, scores)``.
        engine: ``"auto"``, ``"eager"``, ``"compile"`` or ``"two_pass"``.
        verify_every: n: compare every n-th step's gradient with the whole batch's masked backward and raise if they
            differ by more than rounding explains; 0: only the first of each signature.
        compile_backend: what runs the compiled graphs: ``"inductor"``, or ``"aot_eager"``, operation by operation,
            which takes seconds to compile where Inductor takes minutes.

    Raises:
        ValueError: an argument is out of its range.
        OnePassError: with ``engine="eager"`` or ``"compile"``, a learner that cannot be served; with any, a gradient
            that fails ``verify_every``.
    """

    def __init__(
        self,
        per_example_loss: Callable[..., Any],
        *,
        engine: str = "auto",
        verify_every: int = 0,
        compile_backend: str = "inductor",
    ) -> None:
        if not callable(per_example_loss):
            refuse("per_example_loss", describe(per_example_loss), "a function of the batch that returns losses [B]")
        check_choice("engine", engine, ("auto", "eager", "compile", "two_pass"))
        check_choice("compile_backend", compile_backend, BACKENDS)
        check_int("verify_every", verify_every, low=0)
        self._function = per_example_loss
        self._engine, self._verify_every, self._compile_backend = engine, verify_every, compile_backend
        self._engines: dict[str, EagerEngine | CompileEngine] = {
            "eager": EagerEngine(per_example_loss),
            "compile": CompileEngine(per_example_loss, compile_backend),
        }
        self._refused_signatures: set[Hashable] = set()
        self._pending: Any = WeakIdKeyDictionary()  # losses -> the forward that they came from, and its signature
        self._refused: dict[str, str] = {}
        self._last: tuple[str, float] | None = None
        self._losses_made = self._verified = 0
        self._largest_error = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins anew: forwards that wait for their backward, and what was compiled, stay here."""
        options: dict[str, Any] = {
            "engine": self._engine,
            "verify_every": self._verify_every,
            "compile_backend": self._compile_backend,
        }
        return partial(OnePass, **options), (self._function,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward on a batch; B is the leading size of its first tensor.

        With an int32 ``cu_seqlens`` ``[B+1]`` among the keyword arguments, or in a dict, the batch is packed: its
        examples are segments of tensors ``[tokens, ...]``. Only ``"two_pass"`` serves those.

        Returns:
            What ``per_example_loss`` returns: losses ``[B]``, or (losses, scores); scores without gradient.

        Raises:
            ValueError: the batch holds no tensor, or the losses are not ``[B]``.
        """
        if not torch.is_grad_enabled():
            return self._function(*args, **kwargs)
        batch = batch_of(args, kwargs)
        modules = modules_of(self._function)
        signature = batch.signature(modules)
        forward, result = self._forward(batch, signature, modules)
        losses, scores = losses_of(result)
        if losses.shape != (batch.size,):
            refuse(
                "per_example_loss",
                f"losses of shape {tuple(losses.shape)}",
                f"losses [B={batch.size}], one a row of the batch's first tensor (of a packed batch: one a segment, its"
                " cu_seqlens being passed under that name)",
            )
        self._pending[losses] = (forward, signature)
        if scores is None:
            return losses
        return losses, pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, scores)

    def loss(
        self, losses: Tensor, index: Tensor, weights: Tensor | None = None, denominator: float | Tensor | None = None
    ) -> Tensor:
        """The chosen rows' loss: a scalar whose ``backward()`` trains on them only.

        ``Σ_i w_i · losses[index_i] / denominator``, with weights of 1 and a denominator of k if not given. One loss per
        forward and backward pass; ``create_graph=True`` is refused.

        Args:
            losses: as :meth:`__call__` returned them.
            index: int64 ``[k]`` rows of the batch, in any order; a repeated one counts as often as it comes.
            weights: floating-point ``[k]``; they get no gradient.
            denominator: a number above 0, or a tensor of one, for instance of all accumulated batches' rows or tokens;
                it gets no gradient.

        Raises:
            ValueError: naming the argument, what came and what is taken.
            OnePassError: the gradient is not the whole batch's masked one (when that is compared).
        """
        found = self._pending.get(losses) if isinstance(losses, Tensor) else None
        if found is None:
            refuse("losses", describe(losses), "the losses that this step returned, not a copy or a function of them")
        forward: Forward | TwoPassForward = found[0]
        weights = _check_choice_of_rows(losses, index, weights, denominator)
        self._losses_made += 1
        if isinstance(forward, TwoPassForward):
            self._note("two_pass", losses, index)
            return forward.loss(losses, index, weights)
        if not forward.cuts or max(len(index), 2) >= len(losses):
            self._note("whole", losses, index)
            return whole_loss(losses, index, weights)
        loss = chosen_loss(losses, index, weights, forward)
        due = self._verify_every > 0 and self._losses_made % self._verify_every == 0
        wanted = due or not forward.is_verified(len(index))
        if wanted and not self._verify(forward, found[1], losses, index, weights, loss, due):
            self._note("whole", losses, index)
            return whole_loss(losses, index, weights)
        self._note(forward.name, losses, index)
        return loss

    def backward(self, losses: Tensor, index: Tensor, weights: Tensor | None = None) -> None:
        """``step.loss(losses, index, weights).backward()``: gradients of training on the chosen rows alone.

        ``losses`` ``[B]``, ``index`` int64 ``[k]`` and ``weights`` ``[k]`` as in :meth:`loss`.
        """
        torch.autograd.backward(self.loss(losses, index, weights))

    def report(self) -> OnePassReport:
        """The engine of the last step, why others were refused, its estimated cost, and what was verified."""
        engine, ratio = self._last if self._last is not None else (None, None)
        cost = None if engine is None or ratio is None else estimated_cost(engine, ratio)
        probes = sum(engine.probes for engine in self._engines.values())
        return OnePassReport(engine, dict(self._refused), ratio, cost, probes, self._verified, self._largest_error)

    # ----------------------------------------------------------------------------------------------------------- inside

    def _forward(
        self, batch: Batch, signature: Hashable, modules: list[nn.Module]
    ) -> tuple[Forward | TwoPassForward, Any]:
        """The whole batch's forward by the engine that serves it."""
        name = self._engine
        if name == "auto":
            name = "eager" if what_is_compiled(self._function) is None else "compile"
        if name != "two_pass" and signature not in self._refused_signatures:
            try:
                if isinstance(batch, PackedBatch):
                    raise OnePassError(
                        f"a packed batch ({CU_SEQLENS}) has no dimension of its own for examples: the {name} engine"
                        " cannot cut segments out of what was saved; engine='two_pass' trains on the chosen segments"
                    )
                return self._engines[name].forward(batch, signature, lambda error: self._refuse(name, signature, error))
            except (OnePassError, NotImplementedError) as error:
                self._refuse(name, signature, error)
        forward = TwoPassForward(self._function, batch, modules)
        return forward, forward.run()

    def _verify(
        self,
        forward: Forward,
        signature: Hashable,
        losses: Tensor,
        index: Tensor,
        weights: Tensor,
        loss: Tensor,
        due: bool,
    ) -> bool:
        """Compare with the masked backward. False: the first gradient differs, and ``"auto"`` goes on without."""
        whole = whole_loss(losses, index, weights)
        try:
            with forward.being_compared():
                error = gradient_error(loss, whole, modules_of(self._function), forward.dtypes | {losses.dtype})
        except (OnePassError, NotImplementedError) as reason:
            if due and forward.is_verified(len(index)):
                raise
            forward.stop_cutting()
            self._engines[forward.name].forget(signature)
            self._refuse(forward.name, signature, reason)
            return False
        if error is not None:
            self._verified += 1
            self._largest_error = max(self._largest_error, error)
            forward.note_verified(len(index))
        return True

    def _refuse(self, engine: str, signature: Hashable, reason: Exception) -> None:
        """Raise, or note the reason and warn, as ``engine`` says."""
        if self._engine == engine:
            raise reason if isinstance(reason, OnePassError) else OnePassError(str(reason))
        self._refused_signatures.add(signature)
        self._refused[engine] = str(reason)
        warnings.warn(
            f"OnePass teaches in two passes, for the {engine} engine cannot serve this: {reason}", stacklevel=4
        )

    def _note(self, engine: str, losses: Tensor, index: Tensor) -> None:
        self._last = engine, len(index) / max(len(losses), 1)


def _check_choice_of_rows(
    losses: Tensor, index: Tensor, weights: Tensor | None, denominator: float | Tensor | None
) -> Tensor:
    """Check a choice; returns the factors [k] of its losses."""
    check_tensor(
        "index", index, "int64 [k] rows of the batch", shape=(None,), dtypes=(torch.int64,), device=losses.device
    )
    count = len(index)
    if count and values_readable(index) and not (int(index.min()) >= 0 and int(index.max()) < len(losses)):
        refuse("index", f"rows {int(index.min())} to {int(index.max())}", f"rows in [0, B={len(losses)})")
    if weights is None:
        weights = losses.new_ones(count)
    else:
        takes = f"floating-point [k={count}]"
        check_tensor("weights", weights, takes, shape=(count,), dtypes=FLOATING, device=losses.device)
        weights = weights.detach().to(losses.dtype)
    if denominator is None:
        return weights / max(count, 1)
    takes = "a number above 0, or a tensor of one"
    if not isinstance(denominator, Tensor):
        if count == 0 and denominator == 0:  # the number of the chosen, of whom there are none
            return weights
        check_number("denominator", denominator, low=0, open_low=True)
        return weights / denominator
    check_tensor("denominator", denominator, takes, dtypes=(*FLOATING, *INTEGER))
    if denominator.numel() != 1 or (denominator.device != losses.device and denominator.dim() > 0):
        refuse("denominator", describe(denominator), f"{takes}, on {losses.device} like the losses")
    check_has_values("denominator", denominator)
    denominator = denominator.detach().reshape(())
    return weights / denominator
