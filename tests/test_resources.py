"""Every op's Triton kernels compile for GPUs that need not be there: nothing spills, all fits, tickets are ordered."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import resource_cases
from benchmarks.ahead_of_time import CAPABILITIES, SHARED_LIMIT, Compiled, unordered_tickets
from benchmarks.provenance import RESULTS
from benchmarks.resource_cases import Case, cases, with_triton

ROOT = Path(__file__).resolve().parent.parent


def compiled(**changes: object) -> Compiled:
    return Compiled("kernel", 90, 4, 2, "st.global\nbar.sync 0;\natom.add wgmma.mma_async", 128, 0, 1024)._replace(
        **changes
    )


# ----------------------------------------------------------------------------------------------------- the check itself


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (compiled(), None),
        (compiled(stack=8), "a stack of 8 bytes"),
        (compiled(shared=SHARED_LIMIT[90] + 1), "of shared memory"),
        (compiled(ptx="st.global\natom.add wgmma.mma_async"), "with no barrier"),
        (compiled(ptx="mma.sync"), "no warpgroup products"),
        (compiled(ptx="mma.sync", capability=80), None),
        (compiled(seconds=31.0), "31 s of processor time to compile"),
        (compiled(kernel="another"), "kernel is not launched"),
    ],
)
def test_the_check_names_what_is_wrong(kernel: Compiled, complaint: str | None) -> None:
    from benchmarks.resources import problems

    found = list(problems(Case("op", "name", lambda: None, wgmma=("kernel",)), [kernel]))
    assert (found == []) if complaint is None else (len(found) == 1 and complaint in found[0])


def test_a_barrier_counts_only_between_the_last_store_and_the_ticket() -> None:
    assert unordered_tickets("bar.sync 0;\nst.global.b32 [%rd1], %r1;\natom.global.add.u32 %r2, [%rd2], 1;") != []
    assert (
        unordered_tickets("st.global.b32 [%rd1], %r1;\nbarrier.cta.sync 0;\natom.global.add.u32 %r2, [%rd2], 1;") == []
    )


def test_every_op_with_a_triton_backend_has_cases_and_a_decisive_one() -> None:
    by_op = {op: [case for case in cases() if case.op == op] for op in with_triton()}
    assert "scored_attention" in by_op
    for op, found in by_op.items():
        assert found, f"{op} has a Triton backend and no case in benchmarks/resource_cases.py"
    decided = {case.op for case in cases() if case.decisive}
    assert decided >= set(by_op) - {"linear_cross_entropy_backward"}  # the same kernels as the forward's


# --------------------------------------------------------------------------------------------------------- compilations


def compilations() -> Iterator[Any]:
    """Every decisive case for every architecture."""
    for case in cases():
        for capability in CAPABILITIES if case.decisive else ():
            yield pytest.param(case, capability, id=f"{case.op}: {case.name}, sm_{capability}")


@pytest.mark.aot
@pytest.mark.parametrize(("case", "capability"), list(compilations()))
def test_kernels_fit_spill_nothing_and_order_their_tickets(case: Case, capability: int) -> None:
    from benchmarks.resources import compile_case, problems

    kernels = compile_case(case, capability)
    assert kernels
    assert list(problems(case, kernels)) == []


@pytest.mark.aot
def test_a_ticket_is_ordered_and_the_mutant_without_its_barrier_is_noticed(tmp_path: Path) -> None:
    """The mutant runs in a process of its own, since compiled kernels are cached.

    It is looked for in the smallest kernel that takes a ticket. In a larger one the compiler may have put a barrier
    there for another reason, the reuse of shared memory, and would hide what is missing.
    """
    from .ticket_kernel import unordered

    assert [unordered(capability) for capability in CAPABILITIES] == [[], [], []]
    for package in ("attent_kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    tickets = tmp_path / "attent_kernels" / "tickets.py"
    mutant, barriers = re.subn(r"^    tl\.debug_barrier\(\)\n", "", tickets.read_text(), flags=re.MULTILINE)
    assert barriers == 1
    tickets.write_text(mutant)
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.ticket_kernel", "90"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "python")])},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "atom" in outcome.stdout


def test_cases_are_of_ops_that_exist() -> None:
    from attent.ops import dispatch

    assert set(resource_cases.CASES) <= set(dispatch._implementations)


def test_the_committed_table_has_every_case_and_nothing_wrong() -> None:
    """The whole table takes half an hour of processor time: it is compiled by hand when kernels or tiles change."""
    table = json.loads(max((RESULTS / "resources").glob("*.json")).read_text("utf-8"))
    assert table["wrong"] == [] and table["capabilities"] == list(CAPABILITIES)
    compiled = {(row["op"], row["case"]) for row in table["kernels"]}
    assert {(case.op, case.name) for case in resource_cases.cases()} == compiled
