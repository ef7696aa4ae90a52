"""A teacher in Lightning's Trainer."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attent

lightning = pytest.importorskip("lightning.pytorch")

from attent.integrations.lightning import TeachingCallback  # noqa: E402

N, EPOCHS, BATCH = 24, 4, 4


class Crash(Exception):
    pass


class Learner(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, teacher: attent.Teacher, crash_after: int | None = None) -> None:
        super().__init__()
        self.teacher, self.teaching, self.crash_after = teacher, TeachingCallback(teacher), crash_after
        generator = torch.Generator().manual_seed(1)
        self.data = TensorDataset(torch.randn(N, 5, generator=generator), torch.arange(N) % 3)
        self.head = attent.ScoringHead(nn.Linear(5, 3))
        self.seen: dict[int, list[int]] = {}

    def train_dataloader(self) -> Any:
        return DataLoader(attent.indexed(self.data), batch_sampler=self.teaching.sampler(batch_size=BATCH))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Any:
        ids, x, y = batch
        if self.global_step == self.crash_after:
            raise Crash
        self.seen[self.global_step] = ids.tolist()
        loss, scores = self.head(x, y)
        return {"loss": loss, "scores": scores}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        total = self.teacher.total_steps(BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    folder: Path, crash_after: int | None = None, resume: bool = False, each_epoch: bool = False, **options: Any
) -> tuple[Any, Learner]:
    torch.manual_seed(0)
    teacher = attent.Teacher(N, total_epochs=EPOCHS, ratio=0.4, seed=2)
    learner = Learner(teacher, crash_after)
    when = {"every_n_epochs": 1, "save_on_train_epoch_end": True} if each_epoch else {"every_n_train_steps": 1}
    saving = lightning.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **when)
    usual = {"max_epochs": EPOCHS, "reload_dataloaders_every_n_epochs": 1, "use_distributed_sampler": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[learner.teaching, saving], **{**usual, "logger": False, **options},
    )  # fmt: skip
    with warnings.catch_warnings(), contextlib.suppress(Crash):
        warnings.simplefilter("ignore")  # Lightning's advice about workers and resuming
        trainer.fit(learner, ckpt_path=str(folder / f"step={max_step(folder)}.ckpt") if resume else None)
    return trainer, learner


def max_step(folder: Path) -> int:
    return max(int(file.stem.partition("=")[2]) for file in folder.glob("step=*.ckpt"))


def test_epochs_steps_and_learning_rate_follow_the_lessons(tmp_path: Path) -> None:
    trainer, learner = fit(tmp_path)
    assert learner.teacher.epoch_sizes() == [24, 10, 10, 24]
    assert trainer.global_step == learner.teacher.total_steps(BATCH) == 6 + 2 + 2 + 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert sorted(i for step in range(6) for i in learner.seen[step]) == list(range(N))
    summary = learner.teacher.summary()
    assert summary["lessons"] == 2 and summary["examples_trained_on"] == 4 * 16
    assert trainer.callback_metrics["teaching/keep_ratio"] == 1.0


def test_the_teachers_figures_reach_the_trainers_loggers_once_an_epoch(tmp_path: Path) -> None:
    class Recording(lightning.loggers.Logger):  # type: ignore[misc]
        name, version = "recording", 0

        def __init__(self) -> None:
            super().__init__()
            self.logged: list[dict[str, float]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.logged.append({name: value for name, value in metrics.items() if name.startswith("teaching/")})

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    recording = Recording()
    _, learner = fit(tmp_path, logger=recording)
    logged = [metrics for metrics in recording.logged if metrics]
    ratios = [metrics["teaching/keep_ratio"] for metrics in logged]
    assert ratios == pytest.approx([size / N for size in learner.teacher.epoch_sizes()])  # float32 on the way
    assert all(metrics["teaching/seconds"] > 0 for metrics in logged)
    turnover = learner.teacher.summary()["turnover"]
    assert [metrics.get("teaching/turnover") for metrics in logged[2:]] == pytest.approx([turnover[0]] * 2)


# Steps: 6, 2, 2, 6. Saved within the warm-up; at the last step of an epoch, where the next is as long, and longer, and
# shorter; within a reduced epoch; within the last. Then after an epoch's end.
@pytest.mark.parametrize(
    ("crash_after", "each_epoch"),
    [(3, False), (8, False), (10, False), (6, False), (9, False), (12, False), (8, True), (10, True), (6, True)],
)
def test_after_a_crash_the_lesson_goes_on_bit_identically(tmp_path: Path, crash_after: int, each_epoch: bool) -> None:
    _, whole = fit(tmp_path / "whole")
    fit(tmp_path / "killed", crash_after=crash_after, each_epoch=each_epoch)
    assert max_step(tmp_path / "killed") == crash_after
    trainer, resumed = fit(tmp_path / "killed", resume=True)
    assert resumed.seen == {step: ids for step, ids in whole.seen.items() if step >= crash_after}
    assert torch.equal(resumed.head.weight, whole.head.weight)
    assert trainer.global_step == 16


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"max_epochs": 3}, "max_epochs"),
        ({"reload_dataloaders_every_n_epochs": 0}, "reload_dataloaders_every_n_epochs"),
    ],
)
def test_settings_under_which_epochs_would_not_be_the_teachers_are_refused(
    tmp_path: Path, options: dict[str, Any], argument: str
) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        fit(tmp_path, **options)


def test_a_step_without_scores_is_refused(tmp_path: Path) -> None:
    class Silent(Learner):
        def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Any:
            return self.head(*batch[1:])[0]

    learner = Silent(attent.Teacher(N, total_epochs=EPOCHS))
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[learner.teaching], reload_dataloaders_every_n_epochs=1, enable_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"^training_step: got one that returns"):
        warnings.simplefilter("ignore")
        trainer.fit(learner)
