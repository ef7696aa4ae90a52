"""Compares the gradient of chosen rows with that of the whole batch's masked backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import OnePassError
from .probe import graph_nodes
from .row_tensor import RowTensor

#: Relative error in norm that summing in another order may cause; the worst dtype that the forward saved counts.
GRADIENT_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
#: Gradients that are 0 in theory (a key's bias) hold rounding only: this share of the largest norm counts for them.
_SMALLEST = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.1}


def gradient_error(
    cut_loss: Tensor, whole_loss: Tensor, modules: list[nn.Module], dtypes: set[torch.dtype]
) -> float | None:
    """The largest relative error of any leaf's gradient; raises on too large a one. None: the truth is not finite.

    Both losses keep their graphs. Gradients are returned to nobody: ``.grad`` is not touched.
    """
    leaves = [node.variable for node in graph_nodes(cut_loss) if node.name() == "torch::autograd::AccumulateGrad"]
    if not leaves:  # made without gradient: there is nothing to compare
        return None
    devices = {leaf.device for leaf in leaves if leaf.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):  # a checkpointed region may draw again
        ours = torch.autograd.grad(cut_loss, leaves, retain_graph=True, allow_unused=True)
        truth = torch.autograd.grad(whole_loss, leaves, retain_graph=True, allow_unused=True)
    dtype = max(dtypes & GRADIENT_TOLERANCE.keys() or {torch.float64}, key=lambda dtype: GRADIENT_TOLERANCE[dtype])
    norms = [None if x is None else float(torch.linalg.vector_norm(x.double())) for x in truth]
    largest = max((norm for norm in norms if norm is not None), default=0.0)
    if not all(norm is None or norm < float("inf") for norm in norms):  # NaN too: a row not chosen spoils the truth
        return None
    names = {id(parameter): name for module in modules for name, parameter in module.named_parameters()}
    worst = 0.0
    for leaf, mine, true, norm in zip(leaves, ours, truth, norms, strict=True):
        name = names.get(id(leaf), "a leaf") + f" of shape {tuple(leaf.shape)}"
        if isinstance(mine, RowTensor):
            raise OnePassError(f"{name} gets a gradient per row: hand it to the step as an argument")
        if mine is None or true is None or norm is None:
            if (mine is None) != (true is None):
                raise OnePassError(f"{name}: the chosen rows' backward and the whole batch's do not both reach it")
            continue
        error = float(torch.linalg.vector_norm((mine - true).double()))
        error /= max(norm, _SMALLEST[dtype] * largest, torch.finfo(torch.float64).tiny)
        if not error <= GRADIENT_TOLERANCE[dtype]:
            raise OnePassError(
                f"the chosen rows' gradient of {name} differs from the whole batch's masked backward by {error:.1e}"
                f" (relative; {GRADIENT_TOLERANCE[dtype]:.0e} is what rounding explains): an operation mixes rows in a"
                " way that the probe did not see"
            )
        worst = max(worst, error)
    return worst
