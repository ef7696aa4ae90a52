"""The search over a teacher's settings: its runs, its seeds and part, its weights and its table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.studies import policies
from benchmarks.studies.arms import ARMS, FULL, Run
from benchmarks.studies.clock import Clock
from benchmarks.studies.record import Results, read
from benchmarks.studies.study import TUNING_SEED
from benchmarks.studies.sweep import Sweep

from .study_learners import BATCH, COSTS, Known, known_costs, known_study

N = 64
PASS = N // BATCH
#: Every second example has a loss ten times as high.
LEVELS = torch.where(torch.arange(N) % 2 == 0, 1.0, 10.0)


def test_policies_run_beside_full_data_with_seeds_and_a_part_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = known_study(LEVELS)
    sweep = Sweep(study, tmp_path)
    monkeypatch.setattr(Sweep, "_costs", lambda self: known_costs())
    monkeypatch.setattr(Sweep, "best", lambda self, arm: (BATCH, 1e-3))
    monkeypatch.setattr(policies, "measure", lambda study: known_costs())
    chosen = {name: policies.POLICIES[name] for name in ("harvest's defaults", "reweight inverse", "score loss")}
    monkeypatch.setattr(policies, "POLICIES", chosen)
    for name, policy in chosen.items():
        monkeypatch.setitem(ARMS, name, ARMS["harvest"])  # so that what is registered is taken back
        policies.register(name, policy)
    policies.Search(study, tmp_path).run()
    runs = [r for r in read(tmp_path / policies.FOLDER / "known.jsonl") if r["kind"] == "run"]
    assert len(runs) == 4 * len(policies.SEEDS) * len(policies.BUDGETS)
    assert TUNING_SEED not in policies.SEEDS and set(range(study.seeds)).isdisjoint(policies.SEEDS)
    assert all(run["value"] > 100.0 for run in runs)  # what Known says of its validation part
    found = policies.found(tmp_path / policies.FOLDER / "known.jsonl")
    assert found is not None and set(found.gains) == set(chosen)
    assert not sweep.results.of("anything") and not (tmp_path / "known.jsonl").exists()
    # Nothing runs twice, and a policy whose settings change runs anew.
    policies.Search(study, tmp_path).run()
    assert len([r for r in read(tmp_path / policies.FOLDER / "known.jsonl") if r["kind"] == "run"]) == len(runs)


def test_a_policy_with_inverse_weights_trains_on_weighted_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARMS, "weighted", ARMS["harvest"])
    policies.register("weighted", policies.Policy({"reweight": "inverse", "floor": 0.0}, (0.3, 0.3)))
    study = replace(known_study(LEVELS), make=lambda seed: policies.Taught(Known(LEVELS), policies.Policy()))
    learner = study.make(0)
    plan = ARMS["weighted"].plan(study, N, BATCH, COSTS, 5.0 * PASS)
    run = Run(study, learner, BATCH, 0, plan, Clock("cpu"))
    ratios = torch.tensor([float(loss.detach() / LEVELS[ids].mean()) for loss, ids in ARMS["weighted"].teach(run)])
    full = PASS  # the warm-up
    assert ratios[:full].allclose(torch.ones(full)) and not ratios.allclose(torch.ones(len(ratios)))
    assert float(ratios[full:].min()) < 1  # what scores high weighs less


def test_the_table_of_policies_is_in_margins_and_turned_so_that_more_is_better(tmp_path: Path) -> None:
    path = tmp_path / policies.FOLDER / "vit.jsonl"
    results = Results(path)
    results.append({"kind": "about", "key": "k", "study": "vit", "margin": 0.5, "sign": -1})
    for seed in policies.SEEDS:
        for budget in policies.BUDGETS:
            for name, value in ((FULL, 3.0), ("floor 0", 2.0)):
                results.append(
                    {"kind": "run", "of": "k", "policy": name, "seed": seed, "budget": budget, "value": value}
                )
    assert policies.table(tmp_path, ["vit", "gpt"])[2:] == ["| floor 0 | +2.00 ± 0.00 | +2.00 | +2.00 |"]
