"""TeachingTrainer on several processes, and killed for real."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from attent.report.log import read_log  # noqa: E402
from tests.ranks import on_ranks  # noqa: E402
from tests.transformers_learners import Trace, Traced, arguments, language_model, texts  # noqa: E402

pytestmark = pytest.mark.slow

Seen = dict[int, list[int]]


def as_rank(rank: int, world: int) -> None:
    """Tell accelerate which rank this process is of."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # what the forked process did before
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # asked for, not used: the group exists


def train(rank: int, world: int, folder: Path, crash_after: int | None, resume: str | None) -> tuple[Seen, list[float]]:
    """What each step of this rank was trained on, and the last parameters; a global batch of 4."""
    as_rank(rank, world)
    torch.manual_seed(3)
    data = texts(22)
    args = arguments(
        folder, per_device_train_batch_size=4 // world, save_strategy="steps", save_steps=1, ddp_backend="gloo"
    )
    trainer = Traced(language_model(), args, train_dataset=data, callbacks=[Trace(crash_after)])
    assert trainer.accelerator.num_processes == world
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]
    return trainer.seen, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()


def on_two(tmp_path: Path, name: str, *options: Any) -> list[tuple[Seen, list[float]]]:
    return on_ranks(2, train, tmp_path / f"meet-{name}", 2, tmp_path / name, *options)


def union(ranks: list[tuple[Seen, list[float]]], step: int) -> set[int]:
    parts = [seen[step] for seen, _ in ranks]
    assert len(set(parts[0]) & set(parts[1])) == 0 or step == 5  # 22 = 5·4 + 2: a step that accelerate fills up
    return set(parts[0]) | set(parts[1])


def test_two_ranks_share_one_lesson_and_a_crash_changes_nothing(tmp_path: Path) -> None:
    # 22 examples: 6 steps, then 11 each: 3 steps and 3, then 6.
    whole = on_two(tmp_path, "whole", None, None)
    assert [sorted(seen) for seen, _ in whole] == [list(range(18)), list(range(18))]
    assert set().union(*(union(whole, step) for step in range(6))) == set(range(22))
    assert len(set().union(*(union(whole, step) for step in range(6, 9)))) == 11
    assert whole[0][1] == whole[1][1]

    killed = on_two(tmp_path, "killed", 8, None)
    assert max(killed[0][0]) == 7
    checkpoint = str(tmp_path / "killed" / "checkpoint-7")  # the checkpoint before: within the first reduced epoch
    alone = on_ranks(1, train, tmp_path / "meet-alone", 1, tmp_path / "alone", None, checkpoint)
    rest = [set(alone[0][0][step]) for step in (7, 8)]  # elastic: two ranks, then one; the same rest of the lesson
    assert rest[0] == union(whole, 7)
    assert rest[1] < union(whole, 8) and len(rest[1]) == 3  # 11 = 4 + 4 + 3; two ranks fill the last step up to 4
    resumed = on_two(tmp_path, "killed", None, checkpoint)
    for (seen, parameters), (seen_whole, parameters_whole) in zip(resumed, whole, strict=True):
        assert seen == {step: ids for step, ids in seen_whole.items() if step >= 7}
        assert parameters == parameters_whole
    lessons = [event for event in read_log(tmp_path / "killed") if event["event"] == "lesson"]
    assert [lesson["asked"] for lesson in lessons] == [22, 11, 11, 22]
    assert [lesson["trained_on"] for lesson in lessons] == [22, 11, 11, 22]


KILLED = """
import os, sys
from pathlib import Path
from tests.transformers_learners import Traced, arguments, language_model, texts
import torch, transformers
folder, die_at = Path(sys.argv[1]), int(sys.argv[2])
class Die(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == die_at:
            os.kill(os.getpid(), 9)
torch.manual_seed(3)
data = texts(20)
args = arguments(folder, save_strategy="steps", save_steps=2, save_total_limit=2, dataloader_num_workers=1,
                 dataloader_prefetch_factor=4)
trainer = Traced(language_model(), args, train_dataset=data, callbacks=[Die()])
trainer.train(resume_from_checkpoint=None if die_at > 0 else True)
print(sorted(trainer.seen.items()))
"""


def test_a_process_killed_while_workers_fetch_ahead_goes_on_bit_identically(tmp_path: Path) -> None:
    def run(folder: Path, die_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(folder), str(die_at)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=100)

    killed = run(tmp_path / "killed", 7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed, whole = run(tmp_path / "killed", 0), run(tmp_path / "whole", 99)
    assert resumed.returncode == 0 and whole.returncode == 0, resumed.stderr
    seen, seen_whole = (dict(eval(run.stdout.strip().splitlines()[-1])) for run in (resumed, whole))
    assert min(seen) == 6 and seen == {step: ids for step, ids in seen_whole.items() if step >= 6}
