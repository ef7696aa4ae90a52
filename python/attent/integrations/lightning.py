"""A teacher in Lightning's Trainer: a callback that records, saves, resumes and logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from .._checks import check_tensor, describe, refuse
from ..sampler import TeachingSampler
from ..teacher import Teacher


class TeachingCallback(Callback):
    """Takes the scores that ``training_step`` returns to the teacher, and the teacher into every checkpoint.

    Three things are the user's: the loader, the scores, and two settings of the Trainer::

        def train_dataloader(self):
            sampler = self.teaching.sampler(batch_size=64)                           # this callback's; per process
            return DataLoader(attent.indexed(dataset), batch_sampler=sampler)

        def training_step(self, batch, batch_idx):
            ids, x, y = batch
            loss, scores = self.head(self.body(x), y)                                # an attent.ScoringHead
            return {"loss": loss, "scores": scores}

        Trainer(max_epochs=teacher_epochs, callbacks=[teaching], use_distributed_sampler=False,
                reload_dataloaders_every_n_epochs=1)

    Ids are the batch's ``"example_id"`` or its first part, as :func:`attent.indexed` puts them; a ``training_step``
    with other batches returns them as ``"example_id"``. Learning rate schedules go over ``teacher.total_steps(…)``.
    Resuming with ``fit(ckpt_path=…)`` goes on after the last batch of the checkpoint, in the same lesson.

    Args:
        teacher: made with ``num_examples`` and ``total_epochs``.
        log: log the keep ratio, the teacher's seconds and the turnover through the module's loggers, once an epoch.

    Raises:
        ValueError: when fitting starts, if the Trainer would replace the sampler, keep the first epoch's length or run
            another number of epochs; in a step, if ``training_step`` returned no scores.

    >>> from attent.integrations.lightning import TeachingCallback
    >>> callback = TeachingCallback(attent.Teacher(100, total_epochs=4))
    """

    def __init__(self, teacher: Teacher, *, log: bool = True) -> None:
        if not isinstance(teacher, Teacher):
            refuse("teacher", describe(teacher), "an attent.Teacher")
        teacher._need_epochs("TeachingCallback")
        self.teacher, self.log_figures = teacher, log
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember whose epochs count."""
        self._trainer = trainer

    def sampler(self, **options: Any) -> TeachingSampler:
        """:meth:`attent.Teacher.sampler` for the epoch that Lightning is in; call it in ``train_dataloader``.

        A checkpoint of an epoch's last step holds the end of that epoch. Lightning then begins the next one, and so
        does this sampler.
        """
        sampler = self.teacher.sampler(**options)
        epochs = len(self.teacher.epoch_sizes())
        if self._trainer is not None and sampler.epoch < self._trainer.current_epoch < epochs:
            sampler.set_epoch(self._trainer.current_epoch)
        return sampler

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse settings under which epochs would not be the teacher's."""
        epochs = len(self.teacher.epoch_sizes())
        if trainer.max_epochs != epochs:
            refuse("max_epochs", trainer.max_epochs, f"{epochs}, the teacher's total_epochs")
        if trainer.reload_dataloaders_every_n_epochs != 1:
            got = trainer.reload_dataloaders_every_n_epochs
            refuse(
                "reload_dataloaders_every_n_epochs", got, "1: epochs differ in length, and the first's would be kept"
            )
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            refuse("use_distributed_sampler", True, "False: the teacher's sampler knows its ranks")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a checkpoint of an epoch's last step, tell Lightning that it was the last.

        It would compare the batches done with the length of the next epoch, taking all for equally long, and leave as
        many out of a longer one.
        """
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if trainer.fit_loop.restarted_mid_epoch and progress.is_last_batch:
            done, current = max(self.teacher.epoch_sizes()), progress.current  # at least the batches of any epoch
            current.ready = current.started = current.processed = done
            current.completed = done - 1  # the checkpoint was written before this was counted; Lightning does it now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the batch's scores."""
        scores = outputs.get("scores") if isinstance(outputs, Mapping) else None
        if not isinstance(scores, Tensor):
            refuse("training_step", f"one that returns {describe(outputs)}", "{'loss': loss, 'scores': scores [B]}")
        ids = outputs.get("example_id")
        if ids is None:
            ids = batch.get("example_id") if isinstance(batch, Mapping) else batch[0]
        check_tensor(
            "example_id", ids, "int64 [B], in the batch as attent.indexed puts it, or in what training_step returns"
        )
        self.teacher.record(ids, scores)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the epoch was."""
        if not self.log_figures:
            return
        harvest = self.teacher._harvest
        assert harvest is not None and self.teacher.num_examples is not None
        figures = {
            "teaching/keep_ratio": self.teacher.epoch_sizes()[harvest.epoch] / self.teacher.num_examples,
            "teaching/seconds": self.teacher._teaching_seconds,
        }
        if self.teacher._lessons is not None and self.teacher._lessons.turnover:
            figures["teaching/turnover"] = self.teacher._lessons.turnover[-1]
        pl_module.log_dict(figures, rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        """The teacher's state, for the checkpoint; Lightning asks on every rank."""
        return self.teacher.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stands."""
        self.teacher.load_state_dict(state_dict)
