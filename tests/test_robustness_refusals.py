"""What is passed for an argument is taken, or refused by a ValueError that says which, what came and what is taken.

Sparse and nested tensors, tensors without values, wrong dtypes and shapes, and things that are no tensors, for every
argument of what scores, records, chooses and weighs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attent


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(2)], layout=torch.strided)


#: four rows or none: what no floating argument of shape [4] takes
NO_FLOATS: dict[str, Callable[[], Any]] = {
    "a string": lambda: "x",
    "a number": lambda: 3,
    "a list": lambda: [1.0, 2.0],
    "an array": lambda: torch.ones(4).numpy(),
    "bool": lambda: torch.ones(4, dtype=torch.bool),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
    "integers": lambda: torch.arange(4),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "no dimension": lambda: torch.tensor(1.0),
    "two dimensions": lambda: torch.ones(4, 2),
    "meta": lambda: torch.empty(4, device="meta"),
    "sparse": lambda: torch.ones(4).to_sparse(),
    "nested": nested,
}
#: the same of integers in [0, 4)
NO_INTEGERS: dict[str, Callable[[], Any]] = {
    **{name: NO_FLOATS[name] for name in ("a string", "a number", "bool", "complex", "no dimension", "nested")},
    "floats": lambda: torch.ones(4),
    "int8": lambda: torch.ones(4, dtype=torch.int8),
    "uint64": lambda: torch.ones(4, dtype=torch.uint64),
    "two dimensions": lambda: torch.zeros(4, 2, dtype=torch.long),
    "meta": lambda: torch.empty(4, dtype=torch.long, device="meta"),
    "sparse": lambda: torch.arange(4).to_sparse(),
    "below 0": lambda: torch.tensor([-1, 0, 1, 2]),
    "far beyond": lambda: torch.tensor([0, 1, 2, 1 << 40]),
    "the lowest": lambda: torch.tensor([0, 1, 2, -(1 << 63)]),
}
NO_NUMBERS: dict[str, Callable[[], Any]] = {
    "a string": lambda: "x",
    "NaN": lambda: float("nan"),
    "infinite": lambda: float("inf"),
    "bool": lambda: True,
    "a list": lambda: [1],
    "an array": lambda: torch.ones(4).numpy(),
    "a dict": dict,
    "0": lambda: 0,
    "below 0": lambda: -2.0,
    "too many": lambda: torch.ones(4),
    "complex": lambda: torch.tensor(1j),
    "meta": lambda: torch.empty((), device="meta"),
    "nested": nested,
}
IDS, FOUR = torch.arange(4), torch.ones(4)


def rows() -> Tensor:
    return torch.ones(4, 3, requires_grad=True)


def teacher(**options: Any) -> attent.Teacher:
    return attent.Teacher(4, total_epochs=8, **options)


def stream(**options: Any) -> attent.Teacher:
    return attent.Teacher(4, total_steps=8, warmup=0, **options)


def graded(outputs: Any, index: Any = None) -> Tensor:
    x = rows()
    return attent.gradient_scores(x.square().sum(1), [x, outputs], index)


def one_pass(**options: Any) -> Tensor:
    x = rows()
    step = attent.OnePass(lambda x: x.square().sum(1), engine="eager")
    losses = step(x)
    return step.loss(**{"losses": losses, "index": IDS[:2], **options})


def packed(lengths: Any = (1, 2, 3, 4)) -> list[list[int]]:
    return list(teacher().sampler().packed(lengths, 10))


def of_selection(inclusion: Any) -> Tensor:
    return stream(reweight="inverse").weights(attent.selection.Selection(IDS, FOUR, inclusion))


HEAD = attent.ScoringHead(torch.nn.Linear(3, 5))
CLASSIFIER = attent.AttentiveClassifier(8, 2, 5)
TOKENS, LOGITS = torch.ones(4, 3, 8), torch.ones(4, 5)
FLOATS, INTEGERS, NUMBERS = (NO_FLOATS, NO_INTEGERS, NO_NUMBERS)

#: what is called with a bad argument -> the name that the error begins with, and the bad ones
CALLS: dict[str, tuple[Callable[[Any], object], str, dict[str, Callable[[], Any]]]] = {
    "gradient_scores, losses": (lambda v: attent.gradient_scores(v, rows()), "losses", FLOATS),
    "gradient_scores, outputs": (graded, "outputs", FLOATS),
    "gradient_scores, example_index": (lambda v: attent.gradient_scores((x := rows()).sum(1), x, v),
                                       "example_index", INTEGERS),
    "example_scores, prediction": (lambda v: attent.example_scores(v, IDS), "prediction",
                                   {k: v for k, v in FLOATS.items() if k != "two dimensions"}),
    "example_scores, target": (lambda v: attent.example_scores(LOGITS, v), "target", INTEGERS),
    "example_scores, squared": (lambda v: attent.example_scores(FOUR, v, loss="squared"), "target", FLOATS),
    "example_scores, features": (lambda v: attent.example_scores(LOGITS, IDS, score="head", features=v), "features",
                                 {k: v for k, v in FLOATS.items() if k != "two dimensions"}),
    "example_scores, linear_weight": (lambda v: attent.example_scores(LOGITS, IDS, score="hidden", linear_weight=v),
                                      "linear_weight", FLOATS),
    "example_scores, cu_seqlens": (lambda v: attent.example_scores(LOGITS, IDS, cu_seqlens=v), "cu_seqlens", INTEGERS),
    "record, example_ids": (lambda v: teacher().record(v, FOUR), "example_ids", INTEGERS),
    "record, scores": (lambda v: teacher().record(IDS, v), "scores", FLOATS),
    "choose, scores": (lambda v: stream().choose(v), "scores", FLOATS),
    "choose, k": (lambda v: stream().choose(FOUR, v), "k", {k: v for k, v in NUMBERS.items() if k != "0"}),
    "choose, example_ids": (lambda v: stream().choose(FOUR, example_ids=v), "example_ids", INTEGERS),
    "choose, process_group": (lambda v: stream().choose(FOUR, process_group=v), "process_group", NUMBERS),
    "weights, example_ids": (lambda v: teacher(reweight="inverse").weights(v), "example_ids", INTEGERS),
    "weights, of a selection": (of_selection, "example_ids", FLOATS),
    "packed, lengths": (packed, "lengths", INTEGERS),
    "packed, max_tokens": (lambda v: teacher().sampler().packed([1] * 4, v), "max_tokens", NUMBERS),
    "OnePass.loss, losses": (lambda v: one_pass(losses=v), "losses", FLOATS),
    "OnePass.loss, index": (lambda v: one_pass(index=v), "index", INTEGERS),
    "OnePass.loss, weights": (lambda v: one_pass(index=IDS, weights=v), "weights", FLOATS),
    "OnePass.loss, denominator": (lambda v: one_pass(denominator=v), "denominator", NUMBERS),
    "ScoringHead, linear": (lambda v: attent.ScoringHead(v), "linear", FLOATS),
    "ScoringHead, hidden": (lambda v: HEAD(v, IDS), "hidden", FLOATS),
    "ScoringHead, hidden alone": (lambda v: HEAD(v), "hidden", FLOATS),
    "ScoringHead, target": (lambda v: HEAD(torch.ones(4, 3), v), "target", INTEGERS),
    "ScoringHead, example_weight": (lambda v: HEAD(torch.ones(4, 3), IDS, example_weight=v), "example_weight", FLOATS),
    "AttentiveClassifier, tokens": (CLASSIFIER, "tokens", FLOATS),
    "AttentiveClassifier, target": (lambda v: CLASSIFIER(TOKENS, v), "readout.target", INTEGERS),
    "AttentiveClassifier, key_lengths": (lambda v: CLASSIFIER(TOKENS, key_lengths=v), "key_lengths", INTEGERS),
    "AttentiveClassifier, backend": (lambda v: CLASSIFIER(TOKENS, IDS, backend=v), "backend", NUMBERS),
    "indexed": (lambda v: attent.indexed(v), "dataset", {"a number": lambda: 3, "NaN": lambda: float("nan")}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("call", CALLS)
def test_bad_arguments_are_refused_by_name(call: str) -> None:
    run, argument, bad = CALLS[call]
    for name, make in bad.items():
        try:
            run(make())
        except ValueError as error:
            said = str(error)
            assert said.startswith(f"{argument}: got ") and "; takes " in said, (name, said)
        else:
            pytest.fail(f"{name} was taken")


# ----------------------------------------------------------------------------------- what was taken before, one by one


def test_choose_refuses_scores_without_values() -> None:
    with pytest.raises(ValueError, match=r"^scores: got a float32 tensor of shape \(4,\) on meta; takes a tensor with"):
        stream().choose(torch.empty(4, device="meta"))


def test_recording_sparse_scores_is_refused_at_once_and_not_when_the_next_lesson_is_drawn() -> None:
    with pytest.raises(ValueError, match=r"^scores: got a float32 sparse_coo tensor on cpu; takes .*, a dense tensor$"):
        teacher().record(IDS, FOUR.to_sparse())


def test_what_is_no_process_group_is_not_taken_for_one_of_one_rank() -> None:
    with pytest.raises(ValueError, match=r"^process_group: got 'tensor parallel'; takes a torch.distributed Process"):
        stream().choose(FOUR, process_group="tensor parallel")  # type: ignore[arg-type]


def test_ids_outside_the_data_set_have_no_weight_in_warm_up_either() -> None:
    with pytest.raises(ValueError, match=r"^example_ids: got 4; takes ids in \[0, num_examples=4\)"):
        teacher().weights(torch.tensor([0, 4]))


def test_a_denominator_of_zero_is_refused_unless_nothing_was_chosen() -> None:
    with pytest.raises(ValueError, match=r"^denominator: got 0; takes a number in \(0, inf\]"):
        one_pass(denominator=0)
    assert float(one_pass(index=IDS[:0], denominator=0).detach()) == 0.0


def test_weights_of_a_selection_carry_no_gradient() -> None:
    inclusion = torch.full((4,), 0.5, requires_grad=True)
    assert not of_selection(inclusion).requires_grad


def test_a_head_names_its_own_argument_when_the_width_is_wrong() -> None:
    for target in (None, IDS):
        with pytest.raises(ValueError, match=r"^hidden: got a float32 tensor of shape \(4, 2\) on cpu; takes .*=3\]$"):
            HEAD(torch.ones(4, 2), target)


def test_lengths_that_are_no_int64_are_refused() -> None:
    for wrong in ([1, 2, 3, 1 << 70], [True] * 4, {1: 1, 2: 2, 3: 3, 4: 4}, None):
        with pytest.raises(ValueError, match=r"^lengths: got "):
            packed(wrong)
