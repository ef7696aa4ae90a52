"""Contenders: the right are timed, the wrong and the missing are named, and nobody hides another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import attent
from attent import reference
from attent.bench.attention import SCORED, ratios
from attent.bench.contenders import Contenders, Results, Workload, budgets, difference, installed, measure, table
from attent.bench.devices import Device
from benchmarks import attention, linear_cross_entropy, plot, select

CEILINGS = {"copy, bytes a second": 1e9, "matrix product, FLOPs a second": 1e10}


class Problem(NamedTuple):
    values: Tensor
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


def workload(contenders: Contenders, **options: Any) -> Workload:
    return Workload(
        key="sums",
        shape={"n": 3},
        problem=lambda device: Problem(torch.ones(3)),
        truth=lambda problem: {"sum": problem.values.double().sum(), "count": torch.tensor(3)},
        peer=lambda problem: {"sum": problem.values.sum()},
        contenders=contenders,
        baseline="right",
        flops=2e6,
        bytes=1e6,
        terms=3,
        **options,
    )


def contender(**results: Any) -> Any:
    return lambda problem: lambda: {name: torch.as_tensor(value) for name, value in results.items()}


def fails(problem: Problem) -> Any:
    raise OSError("the library is broken\nand says so at length")


def test_whoever_is_missing_fails_or_is_wrong_is_named_and_hides_nobody() -> None:
    contenders = Contenders()
    contenders.add("right")(contender(sum=3.0))
    contenders.add("not there", installed("no_such_module", "no-such-module"))(fails)
    contenders.add("broken")(fails)
    contenders.add("wrong rival")(contender(sum=3.001))
    contenders.add("attent, wrong")(contender(sum=float("nan")))
    contenders.add("attent, wrong index")(contender(sum=3.0, count=2))
    contenders.add("attent, no backend")(lambda problem: lambda: attent.select_top_k(problem.values, 1, backend="cuda"))
    contenders.add("attent")(contender(sum=3.0, count=3))
    row = measure(workload(contenders), Device("cpu"), CEILINGS, rounds=2)
    found = row["contenders"]
    assert found["not there"] == {"unavailable": "no-such-module is not installed"}
    assert found["broken"]["failed"] == "OSError: the library is broken … and says so at length"
    assert "fails, test_contenders.py:" in found["broken"]["trace"]
    assert found["wrong rival"]["outside budget"] == ["sum"] and found["wrong rival"]["seconds"]["median"] > 0
    assert found["attent, wrong"]["outside budget"] == ["sum"] and "seconds" not in found["attent, wrong"]
    assert found["attent, wrong index"]["outside budget"] == ["count"]
    assert found["attent, no backend"]["unavailable"] == attent.backends()["cuda"]
    assert found["attent"]["error / budget"] == {"sum": 0.0} and found["attent"]["ratio to the baseline"]["median"] > 0
    assert "ratio to the baseline" not in found["right"]
    # 1 ms to move the bytes, 0.2 ms for the FLOPs.
    assert row["bound seconds"] == 1e-3
    assert found["attent"]["share of the bound"] == 1e-3 / found["attent"]["seconds"]["median"]
    text = table("sums", row)
    assert "failed: OSError: the library is broken" in text
    assert "not timed: outside the error budget in sum (inf of its budget)" in text
    assert all(name in text for name in found)


def test_only_those_asked_for_run() -> None:
    contenders = Contenders()
    contenders.add("right")(contender(sum=3.0))
    contenders.add("broken")(fails)
    row = measure(workload(contenders), Device("cpu"), CEILINGS, rounds=1, names=("right",))
    assert list(row["contenders"]) == ["right"]


def test_the_budget_is_twice_pytorchs_error_and_the_rounding_of_the_largest_value() -> None:
    truth: Results = {"x": torch.tensor([1.0, -4.0]), "index": torch.tensor([1])}
    peer: Results = {"x": torch.tensor([1.25, -4.0], dtype=torch.bfloat16)}
    # bfloat16 rounds by 2^-8 at most, float32 by 2^-24; 9 terms.
    assert budgets(truth, peer, torch.bfloat16, terms=9) == {"x": 2 * 0.25 + 4 * (2**-8 + 3 * 2**-24)}


@pytest.mark.parametrize("value", [torch.tensor([1.0, float("nan")]), torch.tensor([1.0]), torch.tensor([[1.0, 2.0]])])
def test_nan_and_other_shapes_are_infinitely_wrong(value: Tensor) -> None:
    assert difference(value, torch.tensor([1.0, 2.0])) == float("inf")


def test_device_times_a_call_once() -> None:
    ran: list[int] = []
    wall, cpu = Device("cpu").timed(lambda: ran.append(1))
    assert ran == [1] and wall > 0 and cpu >= 0


# ------------------------------------------------------------------------------------------ each benchmark's own truth


@pytest.mark.parametrize("which", range(4))
def test_the_truth_of_the_loss_is_the_specification(which: int) -> None:
    row = linear_cross_entropy.workloads("tiny")[which]
    problem = row.problem(torch.device("cpu"))
    truth = row.truth(problem)
    doubled = [tensor.detach().double().requires_grad_(problem.train) for tensor in (problem.input, problem.weight)]
    loss, scores = reference.linear_cross_entropy(*doubled, problem.target, score=("logit", "head"))
    expected = {"loss": loss.detach(), **scores}
    if problem.train:
        loss.backward()
        expected = {"loss": loss.detach(), "input gradient": doubled[0].grad, "weight gradient": doubled[1].grad}
    for name, value in expected.items():
        torch.testing.assert_close(truth[name], value)  # both in float64


@pytest.mark.parametrize("which", range(3))
def test_the_truth_of_attention_is_the_specification(which: int) -> None:
    row = attention.workloads("tiny")[which]
    problem = row.problem(torch.device("cpu"))
    options: dict[str, Any] = {"score": "residual"}
    if problem.weight is not None:
        options = {"readout": attent.Readout(problem.weight.double(), problem.labels), "score": "logit"}
    else:
        options["target"] = problem.target.double()
    expected = reference.scored_attention(
        problem.query.double(), problem.key.double(), problem.value.double(), is_causal=problem.is_causal,
        top_k=problem.k, **options,
    )  # fmt: skip
    truth = row.truth(problem)
    torch.testing.assert_close(truth["output"], expected.output)
    torch.testing.assert_close(truth["scores"], expected.scores)
    assert expected.selection is not None
    torch.testing.assert_close(truth["scores of the chosen"], expected.selection.score)


@pytest.mark.parametrize(
    ("program", "rows"), [(linear_cross_entropy, "48×16"), (attention, "causal"), (select, "k 150")]
)
def test_the_tiny_scale_of_every_benchmark_measures_attent_and_pytorch(program: Any, rows: str, tmp_path: Path) -> None:
    json = str(tmp_path / "result.json")
    workloads = program.workloads("tiny")
    # In the interpreter a kernel takes half a second: one per benchmark is enough to see that it is measured.
    names = [contender.name for contender in workloads[0].contenders.all]
    names = [name for name in names if not name.startswith("attent triton") or name.endswith("triton + top-k")]
    result = program.main(["--scale", "tiny", "--rounds", "1", "--rows", rows, "--json", json, "--contenders", *names])
    assert len(result["rows"]) == len([workload for workload in workloads if rows in workload.key]) > 0
    for row in result["rows"].values():
        timed = {name for name, entry in row["contenders"].items() if "seconds" in entry}
        assert any(name.startswith("attent torch") for name in timed)
        assert row["baseline"] in timed
        assert [name for name, entry in row["contenders"].items() if "failed" in entry] == []
    if program is attention:
        assert set(row["ratios"]) == {
            "the fastest attention alone",
            "the fastest attention" + SCORED,
        }
        plot.main([json, str(tmp_path / "result.png")])
        assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_to_the_fastest_of_each_kind() -> None:
    def entry(median: float) -> dict[str, Any]:
        return {"seconds": {"median": median}}

    names = {
        "SDPA, cuDNN": 2.0,
        "SDPA, math": 8.0,
        "attent triton": 3.0,
        "FlexAttention" + SCORED: 6.0,
    }
    row = {"contenders": {name: entry(median) for name, median in names.items()} | {"FlexAttention": {"failed": "x"}}}
    assert ratios(row) == {
        "the fastest attention alone": {"which": "SDPA, cuDNN", "attent triton": 1.5},
        "the fastest attention" + SCORED: {
            "which": "FlexAttention" + SCORED,
            "attent triton": 0.5,
        },
    }


def test_a_scale_without_its_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        select.main(["--scale", "gpu"])
    assert "no CUDA device" in capsys.readouterr().err
