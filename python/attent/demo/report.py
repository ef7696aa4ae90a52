"""Everything that the demo set and measured, as plain values for ``--json``."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..doctor import usable_cores, versions
from .arms import ATTENT, LEARNING_RATES, WARMUP_SHARE, WEIGHT_DECAY, Run
from .data import CLASSES, Images
from .settings import Settings
from .table import BATCH_SIZE_RULE, arm_results, differences, most_and_least_chosen, visits_of_attent


def report(settings: Settings, images: Images, runs: list[Run], total_seconds: float) -> dict[str, Any]:
    """Everything that was set and measured, for ``--json``; what one seed cannot give is null."""
    results, found = arm_results(runs), differences(runs)
    visits = visits_of_attent(runs)
    most, least = most_and_least_chosen(visits)

    def listed(ids: Tensor) -> list[dict[str, object]]:
        return [{"id": i, "class": CLASSES[int(images.train_labels[i])], "times": int(visits[i])} for i in ids.tolist()]

    return {
        "versions": versions(),
        "machine": {"cores": usable_cores(), "torch_threads": torch.get_num_threads()},
        "settings": {
            **{name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()},
            "learning_rates": {str(size): rate for size, rate in LEARNING_RATES.items()},
            "weight_decay": WEIGHT_DECAY,
            "warmup_share_of_steps": WARMUP_SHARE,
            "batch_size_rule": BATCH_SIZE_RULE,
        },
        "data": {
            "name": images.name,
            "train_examples": len(images.train_images),
            "test_examples": len(images.test_images),
        },
        "total_seconds": total_seconds,
        "runs": [
            {
                "arm": run.arm,
                "seed": run.seed,
                "batch_size": run.batch_size,
                "steps": run.steps,
                "examples": run.examples,
                "seconds": run.seconds,
                "teaching_seconds": run.teaching_seconds,
                "unchosen_seconds": run.unchosen_seconds,
                "accuracy": run.accuracy,
                "curve": run.curve,
            }
            for run in runs
        ],
        "arms": [{name: _finite(value) for name, value in asdict(result).items()} for result in results],
        "differences": [
            {
                "first": ATTENT,
                "second": arm,
                "mean": difference.mean,
                "low": _finite(difference.low),
                "high": _finite(difference.high),
                "pairs": difference.pairs,
                "sentence": difference.sentence(ATTENT, arm),
            }
            for arm, difference in found.items()
        ],
        "most_chosen": listed(most),
        "least_chosen": listed(least),
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
