"""The suite's part "correct": the public API on the device, option by option, against the specification in float64.

Budgets are those of :mod:`.contenders`, where plain PyTorch is attent's own ``"torch"`` backend on the same inputs.
Choices must be exactly the reference's of the kernel's own scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attent
from attent import reference
from attent.bench.contenders import Results, budgets, compare, running, said

HEADS, KEY_HEADS = 4, 2


class Sizes(NamedTuple):
    """Several tiles of every configuration, the last one ragged."""

    queries: int = 200
    keys: int = 300
    width: int = 64  # of a head
    wide: int = 256
    many_keys: int = 2000  # for one query: enough to be split
    long: tuple[int, int] = (2000, 1500)  # queries and keys: more tiles than an H200 has processors
    tokens: int = 70  # of each of EXAMPLES
    hidden: int = 96
    classes: int = 1031


#: For the interpreter, whose tiles are small.
TINY = Sizes(queries=20, keys=30, width=16, wide=32, many_keys=150, long=(50, 60), tokens=10, hidden=12, classes=37)
EXAMPLES = 5


class Case(NamedTuple):
    """One option of one op in one dtype. ``run`` takes a backend's name; ``truth`` what that returned."""

    dtype: torch.dtype
    run: Callable[[str], Results]
    truth: Callable[[Results], Results]
    terms: int


def check(case: Case, form: str) -> dict[str, Any]:
    """Errors over their budgets, and what is outside, how far and where; or the backend's refusal.

    ``form``: a backend, or ``contenders.PORTABLE``.
    """
    try:
        with running(form) as backend:
            found = case.run(backend)
    except ValueError as error:
        if "unavailable" in said(error):
            return said(error)
        raise
    truth = case.truth(found)
    allowed = budgets(truth, case.run("torch"), case.dtype, case.terms)
    shares, wrong = compare({name: found[name] for name in truth}, truth, allowed)
    result: dict[str, Any] = {"error / budget": shares}
    return result | {"outside budget": list(wrong), "wrong": wrong} if wrong else result


#: Its name and how it is made: with tensors, which all but one of many processes can do without.
Named = tuple[str, Callable[[], Case]]


def cases(device: torch.device, dtype: torch.dtype, train: bool, sizes: Sizes) -> Iterator[Named]:
    """Of attention, loss and, where nothing is trained, the choice by a loss's scores."""
    about = f"{str(dtype)[6:]}, {'forward and backward' if train else 'forward'}"
    for name, options in attention_options(device, sizes).items():
        yield f"attention, {name}, {about}", partial(attention, options, dtype, train, device, sizes)
    for name, options in loss_options(device, sizes).items():
        yield f"loss, {name}, {about}", partial(loss, options, dtype, train, device, sizes)
    if not train:
        for name, options in choice_options(device, sizes).items():
            yield f"score and select, {name}, {str(dtype)[6:]}", partial(choice, options, dtype, device, sizes)


def selections(device: torch.device) -> Iterator[Named]:
    for name, options in selection_options(device).items():
        yield f"selection, {name}", partial(selection, options, device)


def normal(device: torch.device, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)  # the same numbers on every device
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


def widened(value: Any) -> Any:
    """Floating tensors in float64, also within a readout."""
    if isinstance(value, attent.Readout):
        return attent.Readout(*(widened(part) for part in value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def split_infinite(name: str, value: Tensor) -> Results:
    """A tensor with its infinities apart, which have no difference."""
    infinite = value.isinf()
    return {name: value.masked_fill(infinite, 0), f"{name} is infinite": infinite}


# ------------------------------------------------------------------------------------------------------------ attention


def attention_options(device: torch.device, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """What is asked for beside a target; keys with capitals describe the tensors."""
    TQ, TK, D = sizes.queries, sizes.keys, sizes.width
    lengths = torch.tensor([TQ, 0, TQ // 5], device=device)
    starts = torch.tensor([0, TQ // 3, TQ // 3, TQ // 3 + 1, TQ], dtype=torch.int32, device=device)
    key_starts = torch.tensor([0, TK // 3, TK // 2, TK // 2, TK], dtype=torch.int32, device=device)
    hard, drawn = {"top_k": 2}, {"top_k": 2, "temperature": 1.0, "floor": 0.5, "seed": 3}
    return {
        "causal, hard choice": {"is_causal": True, **hard},
        "full, drawn choice": drawn,
        "readout mean, logit": {"pool": "mean", "score": "logit", **hard},
        "readout first, head": {"pool": "first", "score": "head", **drawn},
        "readout last, logit": {"pool": "last", "score": "logit", **hard},
        "readout last, nothing returned": {"pool": "last", "score": "head", "return_output": False},
        "one query, split keys": {"Tq": 1, "Tk": sizes.many_keys, "pool": "mean", "score": "head", **hard},
        "16 queries, causal": {"Tq": 16, "is_causal": True, **hard},
        "grouped heads": {"Hkv": KEY_HEADS, "enable_gqa": True, "is_causal": True},
        "window": {"window": (TQ // 6, 5), **hard},
        "causal window": {"window": (TQ // 5, -1), "is_causal": True},
        "softcap": {"softcap": 2.0, "is_causal": True},
        "scale": {"scale": -0.3},
        "lengths": {"query_lengths": lengths, "key_lengths": lengths.flip(0), "is_causal": True, **hard},
        "packed": {"cu_seqlens_q": starts, "cu_seqlens_k": key_starts, "is_causal": True, "top_k": 3},
        "packed, readout": {"cu_seqlens_q": starts, "cu_seqlens_k": key_starts, "pool": "mean", "score": "logit"},
        "narrow value": {"Dv": D // 2 + 8},
        "heads twice as wide, causal": {"D": 2 * D, "Dv": 2 * D, "is_causal": True, **hard},
        "heads twice as wide, readout": {"D": 2 * D, "Dv": 2 * D, "pool": "mean", "score": "head", **drawn},
        "heads half again as wide": {"D": D * 3 // 2, "Dv": D * 3 // 2, "window": (TQ // 6, 5)},
        "wide heads": {"D": sizes.wide, "Dv": sizes.wide, "Tq": TQ // 2},
        # Blocks that stay take several tiles of queries, each of many tiles of keys.
        "long, causal": {"D": 2 * D, "Dv": 2 * D, "Tq": sizes.long[0], "Tk": sizes.long[1], "is_causal": True},
        "long, readout": {"Tq": sizes.long[0], "Tk": sizes.long[1], "pool": "mean", "score": "logit", **hard},
        "odd strides": {"strided": True, "is_causal": True},
        "mean of the loss": {"per_example": "mean", "score": "loss"},
    }


def attention(options: dict[str, Any], dtype: torch.dtype, train: bool, device: torch.device, sizes: Sizes) -> Case:
    options = dict(options)
    Tq, Tk = options.pop("Tq", sizes.queries), options.pop("Tk", sizes.keys)
    width, value_width = options.pop("D", sizes.width), options.pop("Dv", sizes.width)
    key_heads, strided, pool = options.pop("Hkv", HEADS), options.pop("strided", False), options.pop("pool", None)
    packed = "cu_seqlens_q" in options
    draw = normal(device, 1)

    def tensor(heads: int, tokens: int, columns: int) -> Tensor:
        if packed:
            return draw(tokens, heads, columns).to(dtype)
        if strided:  # [T, H, B, 2 D] in memory, every second column
            return draw(tokens, heads, 3, 2 * columns).to(dtype)[..., ::2].permute(2, 1, 0, 3)
        return draw(3, tokens, heads, columns).to(dtype).transpose(1, 2)

    inputs = {
        "query": tensor(HEADS, Tq, width),
        "key": tensor(key_heads, Tk, width),
        "value": tensor(key_heads, Tk, value_width),
    }
    like_output = tensor(HEADS, Tq, value_width)
    cotangent = tensor(HEADS, Tq, value_width)
    batch = len(options["cu_seqlens_q"]) - 1 if packed else 3
    if pool is None:
        options = {"score": "residual", "target": like_output} | options
    else:
        labels = torch.arange(batch, device=device) * 3
        options["readout"] = attent.Readout(draw(33, HEADS * value_width).to(dtype), labels, draw(33).to(dtype), pool)

    def outcome(results: attent.ScoredAttention, leaves: dict[str, Tensor]) -> Results:
        found = {"losses": results.losses, "scores": results.scores}
        found |= {part: getattr(results, part) for part in ("output", "logits", "pooled")}
        found = {part: value for part, value in found.items() if value is not None}
        if train:
            total = results.losses.sum()
            if results.output is not None:
                total = total + (results.output * cotangent.to(results.output.dtype)).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()))
            found |= {f"gradient of {leaf}": g for leaf, g in zip(leaves, gradients, strict=True)}
        found = {part: value.detach() for part, value in found.items()}
        if results.logsumexp is not None:
            found |= split_infinite("logsumexp", results.logsumexp)
        if results.selection is not None:
            found |= {"chosen": results.selection.index, "inclusion": results.selection.inclusion}
        return found

    def call(function: Callable[..., Any], cast: Callable[[Any], Any], extra: dict[str, Any]) -> Results:
        leaves = {leaf: cast(value).detach().requires_grad_(train) for leaf, value in inputs.items()}
        return outcome(function(**leaves, **{key: cast(value) for key, value in options.items()}, **extra), leaves)

    def truth(found: Results) -> Results:
        returned = options.pop("return_output", True)  # the reference returns it always
        right = call(reference.scored_attention, widened, {})
        if not returned:
            options["return_output"] = False
            right = {part: value for part, value in right.items() if part in found}
        if "chosen" in found:
            chosen = reference.select_top_k(
                found["scores"], options["top_k"], valid=right_valid(), **drawing(options)
            )  # fmt: skip
            right |= {"chosen": chosen.index, "inclusion": chosen.inclusion.double()}
        return right

    def right_valid() -> Tensor:
        if packed:
            return options["cu_seqlens_q"].diff() > 0
        lengths = options.get("query_lengths")
        return torch.ones(batch, dtype=torch.bool, device=device) if lengths is None else lengths > 0

    return Case(
        dtype,
        lambda backend: call(attent.scored_attention, lambda value: value, {"backend": backend}),
        truth,
        max(Tk, HEADS * value_width * Tq),
    )


def drawing(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("temperature", "floor", "seed") if name in options}


# ----------------------------------------------------------------------------------------------------------------- loss

SCORES = ("loss", "logit", "hidden", "head")


def loss_options(device: torch.device, sizes: Sizes) -> dict[str, dict[str, Any]]:
    draw, CLASSES, T = normal(device, 2), sizes.classes, sizes.tokens
    starts = torch.tensor([0, 3, 3, 2 * T - 9, 2 * T - 8, EXAMPLES * T], dtype=torch.int32, device=device)
    return {
        "scores": {},
        "no score": {"score": None},
        "confident": {"confident": True},
        "rows": {"rows": True},
        "rows, int32 labels": {"rows": True, "labels": torch.int32},
        "odd strides": {"strided": True, "score": ("loss", "logit")},
        "two scores": {"score": ("loss", "logit")},  # without "hidden" and "head": one launch
        "shift": {"shift": True, "per_example": "mean"},
        "packed": {"cu_seqlens": starts, "shift": True},
        "ignored": {"ignored": True, "per_example": "sum"},
        "weights of examples": {"example_weight": torch.tensor([0.0, 1, 2, 0.5, 0], device=device)},
        "bias": {"linear_bias": draw(CLASSES)},
        "softcap": {"softcap": 5.0},
        "smoothing": {"label_smoothing": 0.1},
        "class weights": {"weight": draw(CLASSES).abs()},
        "probabilities": {"soft": True},
        "sum": {"reduction": "sum"},
        "none": {"reduction": "none"},
        "examples' means": {"reduction": "example"},
        "all": {
            "linear_bias": draw(CLASSES), "softcap": 5.0, "label_smoothing": 0.1, "weight": draw(CLASSES).abs(),
            "ignored": True, "cu_seqlens": starts, "shift": True,
        },
    }  # fmt: skip


def choice_options(device: torch.device, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Of score_and_select. Examples of few tokens have scores that differ by far more than any kernel may err."""
    drawn = {"temperature": 1.0, "floor": 0.4, "seed": 3}
    of_losses = loss_options(device, sizes)
    return {
        "hard": {"k": 3},
        "drawn": {"k": 3, **drawn},
        "rows, head, drawn": {"k": 20, "rows": True, "score": "head", **drawn},
        "loss, shift": {"k": 2, "score": "loss", "shift": True},
        "packed, ignored, hard": {"k": 4, "cu_seqlens": of_losses["packed"]["cu_seqlens"], "ignored": True},
        "all, drawn": {"k": 4, **of_losses["all"], **drawn},
        "hidden": {"k": 2, "score": "hidden"},
        "head": {"k": 2, "score": "head"},
    }


def choice(options: dict[str, Any], dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Case:
    inputs, target, options = loss_problem(options, dtype, device, sizes)

    def call(function: Callable[..., Any], cast: Callable[[Any], Any], extra: dict[str, Any]) -> Results:
        tensors = {leaf: cast(value) for leaf, value in inputs.items()}
        chosen = function(**tensors, target=target, **{key: cast(value) for key, value in options.items()}, **extra)
        # Of two whose scores differ by less than a kernel may err either may come first.
        order = chosen.index.argsort()
        return {"chosen": chosen.index[order], "score": chosen.score, "inclusion": chosen.inclusion[order]}

    return Case(
        dtype,
        lambda backend: call(attent.score_and_select, lambda value: value, {"backend": backend}),
        lambda found: call(reference.score_and_select, widened, {}),
        sizes.classes,
    )


def loss_problem(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device, sizes: Sizes
) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """The leaves, the target and the options of the function itself."""
    B, T, WIDTH, CLASSES = EXAMPLES, sizes.tokens, sizes.hidden, sizes.classes
    options = dict(options)
    confident, rows, ignored, soft, strided = (
        options.pop(key, False) for key in ("confident", "rows", "ignored", "soft", "strided")
    )
    draw = normal(device, 3)
    shape = (B * T,) if rows or "cu_seqlens" in options else (B, T)
    weight = draw(CLASSES, WIDTH) * (3 / WIDTH**0.5)
    target = torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(4)).to(device)
    hidden = draw(*shape, WIDTH)
    if confident:
        hidden = weight[target] * (25 / 9)  # logits of 25, p_y about 1 − 1e-8
    if ignored:
        target = target.masked_fill(draw(*shape) > 0.5, -100)
        target.view(B, T)[1] = -100
    if soft:
        target = draw(*shape, CLASSES).softmax(-1)
    target = target.to(options.pop("labels", target.dtype))
    inputs = {"input": hidden.to(dtype), "linear_weight": weight.to(dtype)}
    if strided:  # every second column of the hidden states; the weight column by column
        inputs["input"] = inputs["input"].repeat_interleave(2, -1)[..., ::2]
        inputs["linear_weight"] = inputs["linear_weight"].t().contiguous().t()
    if "linear_bias" in options:
        inputs["linear_bias"] = options.pop("linear_bias").to(dtype)
    return inputs, target, options


def loss(options: dict[str, Any], dtype: torch.dtype, train: bool, device: torch.device, sizes: Sizes) -> Case:
    inputs, target, options = loss_problem({"score": SCORES} | options, dtype, device, sizes)

    def call(function: Callable[..., Any], cast: Callable[[Any], Any], extra: dict[str, Any]) -> Results:
        leaves = {leaf: cast(value).detach().requires_grad_(train) for leaf, value in inputs.items()}
        result = function(
            **leaves, target=cast(target), **{key: cast(value) for key, value in options.items()}, **extra
        )
        value, scores = (result, {}) if options["score"] is None else result
        found = {"loss": value, **scores}
        if train:
            gradients = torch.autograd.grad((value * upstream(value)).sum(), list(leaves.values()))
            found |= {f"gradient of {leaf}": g for leaf, g in zip(leaves, gradients, strict=True)}
        return {part: value.detach() for part, value in found.items()}

    def upstream(value: Tensor) -> Tensor:
        """Unequal factors where there are several losses."""
        return torch.linspace(0.5, 2.0, value.numel(), device=device, dtype=value.dtype).view(value.shape)

    return Case(
        dtype,
        lambda backend: call(attent.linear_cross_entropy, lambda value: value, {"backend": backend}),
        lambda found: call(reference.linear_cross_entropy, widened, {}),
        sizes.classes,
    )


# ------------------------------------------------------------------------------------------------------------ selection


def selection_options(device: torch.device) -> dict[str, dict[str, Any]]:
    valid = torch.arange(3000, device=device) % 3 > 0
    return {
        "hard, small": {"n": 100, "k": 30},
        "hard": {"n": 3000, "k": 1200},
        "nothing": {"n": 10, "k": 0},
        "all": {"n": 1000, "k": 1000},
        "drawn, the most in one launch": {"n": 16_384, "k": 5000, "temperature": 1.0, "floor": 0.2, "seed": 4},
        "hard, many blocks": {"n": 70_000, "k": 30_000},
        "hard, float16": {"n": 3000, "k": 1200, "dtype": torch.float16},
        "many ties": {"n": 3000, "k": 1500, "ties": True},
        "not finite": {"n": 300, "k": 200, "special": True},
        "drawn": {"n": 3000, "k": 1000, "temperature": 1.0, "seed": 5},
        "drawn with a floor": {"n": 3000, "k": 1000, "temperature": 0.5, "floor": 0.2, "seed": 6},
        "a floor alone": {"n": 3000, "k": 1000, "floor": 0.3, "seed": 7},
        "valid ones": {"n": 3000, "k": 1500, "valid": valid, "temperature": 1.0, "floor": 0.1, "seed": 8},
        "more than are valid": {"n": 3000, "k": 2500, "valid": valid},
        "by index": {"n": 3000, "k": 1000, "sorted": False},
    }


def selection(options: dict[str, Any], device: torch.device) -> Case:
    options = dict(options)
    n, k = options.pop("n"), options.pop("k")
    scores = normal(device, 9)(n).exp().to(options.pop("dtype", torch.float32))
    if options.pop("ties", False):
        scores = scores.round()
    if options.pop("special", False):
        scores[::7], scores[1::7], scores[2::7] = float("nan"), float("inf"), 0.0
        scores[3::7] *= -0.0

    def found(chosen: attent.Selection) -> Results:
        return {"index": chosen.index, "score": chosen.score.nan_to_num(), "inclusion": chosen.inclusion}

    def truth(of: Results) -> Results:
        right = found(reference.select_top_k(scores, k, **options))
        return {part: value.double() if value.is_floating_point() else value for part, value in right.items()}

    # φ = log(score)/temperature and κ are up to 2^4 in size: 16 roundings of a number near 1, √256.
    return Case(
        torch.float32,
        lambda backend: found(attent.select_top_k(scores, k, backend=backend, **options)),
        truth,
        256,
    )
