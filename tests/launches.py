"""Triton's interpreter in tests: launches counted, programs run in another order, and less time lost in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def counted_launches(backwards: bool = False) -> Iterator[list[str]]:
    """The names of the kernels launched in this context, in order. ``backwards``: the last program runs first."""
    from triton.runtime import interpreter

    launched: list[str] = []
    run = interpreter.GridExecutor.__call__
    set_program = interpreter.interpreter_builder.set_grid_idx

    def count(executor: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(executor.fn.__name__)
        return run(executor, *args, **kwargs)

    def set_mirrored(x: int, y: int, z: int) -> None:
        size = interpreter.interpreter_builder.grid_dim
        set_program(size[0] - 1 - x, size[1] - 1 - y, size[2] - 1 - z)

    mirror = mock.patch.object(
        interpreter.interpreter_builder, "set_grid_idx", set_mirrored if backwards else set_program
    )
    with mock.patch.object(interpreter.GridExecutor, "__call__", count), mirror:
        yield launched


def patch_language_once_per_launch() -> None:
    """Make the interpreter's device functions start faster: half of the time of small kernels went there.

    At every call of every device function it looks through the whole of triton.language for what to replace by its own,
    although what it replaced for an earlier call within the same launch is still in place.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # Triton 3.5 undoes nothing, and so has nothing to return
        return
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[tuple[str, ...]] = set()

    def patch_once(fn: Any) -> Any:
        modules = tuple(sorted(m.__name__ for m in (tl, tl.core) if any(v is m for v in fn.__globals__.values())))
        if modules in done:
            return interpreter._LangPatchScope()
        done.add(modules)
        return patch(fn)

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return run(executor, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch
