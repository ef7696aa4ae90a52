"""Runs a function on several ranks of a gloo process group, each a process of its own on this machine."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 60


def on_ranks(world: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """``function(rank, *arguments)`` on ``world`` ranks; what each returns, by rank. A rank that fails fails the
    caller.

    ``folder``: an empty folder where the ranks meet. Processes are forked, which takes milliseconds where importing
    torch anew takes seconds; like loader workers, they use one thread.
    """
    context = multiprocessing.get_context("fork")
    folder.mkdir(exist_ok=True)
    meeting = folder / f"meeting_{len(list(folder.iterdir()))}"
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        context.Process(target=_run, args=(rank, world, meeting, function, arguments, pipes[rank][1]))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        answers = []
        for rank, (receive, _) in enumerate(pipes):
            assert receive.poll(TIMEOUT_SECONDS), f"rank {rank} of {world} gave no answer in {TIMEOUT_SECONDS} s"
            answers.append(receive.recv())
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    for rank, (result, error) in enumerate(answers):
        assert error is None, f"rank {rank} of {world}:\n{error}"
        answers[rank] = result
    return answers


def _run(
    rank: int, world: int, meeting: Path, function: Callable[..., Any], arguments: tuple[Any, ...], send: Connection
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
        )
        send.send((function(rank, *arguments), None))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        send.send((None, traceback.format_exc()))
