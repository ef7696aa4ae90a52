"""Random numbers in a compiled learner: drawn in the forward and saved, never drawn again in the backward.

A backward that draws again would draw for the chosen rows what belongs to others. A checkpointed region, or a
partitioner that saves memory, would do that; operations that are marked here are saved instead.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from .errors import OnePassError
from .rules import attention_dropout

_REPLAYS = ("run_and_save_rng_state", "run_with_rng_state", "graphsafe_run_with_rng_state")


def pin_random(graph: fx.Graph) -> None:
    """Mark every random result of a joint graph as one that the forward saves."""
    for node in graph.nodes:
        if _draws(node):
            for marked in [node, *(user for user in node.users if user.target is operator.getitem)]:
                marked.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def refuse_random(graph: fx.Graph) -> None:
    """Refuse a backward graph that draws random numbers."""
    names = sorted({str(inner_operation(node)[0]) for node in graph.nodes if _draws(node)})
    if names:
        raise OnePassError(
            f"{', '.join(names)} draws random numbers in the backward: on chosen rows they would be those of other rows"
        )


def drop_random_states(graph: fx.Graph) -> None:
    """Take out the saving and setting of random states around operations that draw nothing, here all that have it.

    A state that the forward gives out for the backward is an empty tensor then.
    """
    for node in list(graph.nodes):
        target, args = inner_operation(node)
        if target is node.target:
            continue
        with graph.inserting_before(node):
            plain = graph.call_function(target, args, dict(node.kwargs))
            if "save" in str(node.target):
                state = graph.call_function(torch.ops.aten.empty.memory_format, ([0],))
                for user in list(node.users):
                    user.replace_all_uses_with(plain if user.args[1] == 1 else state)
                    graph.erase_node(user)
            else:
                node.replace_all_uses_with(plain)
        graph.erase_node(node)


def inner_operation(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """An operation and its arguments, taken out of what saves or sets the random state around it."""
    target, args = node.target, node.args
    if str(target) in _REPLAYS:
        for i, argument in enumerate(args):
            if isinstance(argument, torch._ops.OpOverload):
                return argument, args[i + 1 :]
    return target, args


def _draws(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    target, args = inner_operation(node)
    if not isinstance(target, torch._ops.OpOverload):
        return "rng_prims" in str(target) or str(target) in _REPLAYS
    dropout = attention_dropout(target, args, node.kwargs)
    if dropout is not None:  # checkpointing wraps attention without dropout too, as if it could draw
        replays = any(argument.name == "philox_seed" for argument in target._schema.arguments)
        return dropout > 0 and (replays or torch.Tag.nondeterministic_seeded in target.tags)
    return torch.Tag.nondeterministic_seeded in target.tags or "rng_prims" in str(target)
