"""``TeachingTrainer``: transformers' Trainer, which trains each epoch on what its teacher chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import is_datasets_available

from ..._checks import check_tensor, describe, refuse
from ...checkpoint import read_state, write_state
from ...report.log import TeachingLog
from ...sampler import TeachingSampler, batches_of, share_of
from ...teacher import Teacher
from .arguments import TeachingArguments
from .checkpoints import newest_whole_checkpoint
from .coverage import Coverage, class_names, show_example
from .examples import CU_SEQLENS, ID, NumberedCollator, NumberedDataset
from .heads import find_head
from .scored_loss import FusedLoss, LossBeside, ScoredLoss
from .trl_head import LossBesideFusedHead, has_fused_head

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # whichever Trainer comes after the mixin

STATE = "teacher.pt"

if not hasattr(Trainer, "_run_epoch"):
    raise ImportError("attent.integrations.transformers needs transformers 5 or newer, whose Trainer has _run_epoch")


class TeachingMixin(_Trainer):
    """Teaching for a subclass of transformers' Trainer: ``class Mine(TeachingMixin, TheirTrainer): pass``.

    The sampler is the teacher's; steps, learning rate schedule, progress and ``epoch`` follow its epochs, which differ
    in size; scores are harvested from the training loss; the teacher's state is in every checkpoint (``teacher.pt``),
    and resuming goes on within the epoch, with the same examples in the same order. The user's data set, collator,
    ``compute_loss``, callbacks and loggers stay; column removal too. Evaluation is not touched.

    Args:
        teaching: the teacher's options; None: the defaults.
        head: the dotted name of the layer that the logits come from; None: found by the model's class (causal language
            models, sequence and image classifiers, PEFT around them).
        score_func: for any other model or loss: ``score_func(outputs, inputs) -> scores [B]``, from what the model
            returned for a batch (``inputs`` with its labels); takes the place of ``head``.
        groups: int64 ``[N]``, a class or source for each training example, as in :class:`attent.Teacher`.
        *args, **kwargs: the trainer's own.

    Raises:
        ValueError: what the trainer or model does not allow to be taught, with what to pass instead: at construction,
            or in the first step, when the model's logits turn out to be made otherwise than its class promises.

    Source: AtteNT (arXiv 2602.20461) for the teaching; the sampler, loss and checkpoints are the Trainer's extension
    points.
    """

    data_collator: Any
    label_smoother: Any

    def __init__(
        self,
        *args: Any,
        teaching: TeachingArguments | None = None,
        head: str | None = None,
        score_func: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
        groups: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        if teaching is not None and not isinstance(teaching, TeachingArguments):
            refuse("teaching", describe(teaching), "a TeachingArguments")
        self.teaching = TeachingArguments() if teaching is None else teaching
        self._head_name, self._score_func, self._groups = head, score_func, groups
        super().__init__(*args, **kwargs)
        self._check_arguments()
        self.teacher = self._make_teacher()
        self._log: TeachingLog | None = None
        self._coverage = Coverage(len(self.train_dataset))
        self._score_mean: list[Tensor] = []  # of the batches since the last log
        self._scored_loss = None if score_func is not None else self._make_scored_loss()

    # ------------------------------------------------------------------------------------------------ what is taught

    def _check_arguments(self) -> None:
        args, dataset = self.args, self.train_dataset
        if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            got = "None" if dataset is None else type(dataset).__name__
            refuse("train_dataset", got, "a data set with len: for streams choose within pools, with attent.OnePass")
        if args.max_steps > 0:
            refuse("max_steps", args.max_steps, "-1: the number of steps follows from num_train_epochs and the ratio")
        if args.num_train_epochs != int(args.num_train_epochs) or args.num_train_epochs < 1:
            refuse("num_train_epochs", args.num_train_epochs, "a whole number, 1 or more: the teacher plans epochs")
        if args.ignore_data_skip:
            refuse("ignore_data_skip", True, "False: resuming is exact, and skips ids without loading their data")
        if args.n_gpu > 1:
            refuse("args.n_gpu", args.n_gpu, "one device per process: start with torchrun or accelerate launch")
        if args.accelerator_config.split_batches or args.accelerator_config.dispatch_batches:
            refuse("accelerator_config", "split_batches or dispatch_batches", "both off")
        if args.train_sampling_strategy != "random":
            refuse(
                "train_sampling_strategy", repr(args.train_sampling_strategy), "'random': the teacher's is the order"
            )
        if self._score_func is None and self.compute_loss_func is not None:
            refuse("score_func", None, "scores of your own loss, as compute_loss_func is your own")
        if self._score_func is not None and self.teaching.reweight != "none":
            refuse("reweight", repr(self.teaching.reweight), "'none' with score_func, which does not see the loss")

    def _make_teacher(self) -> Teacher:
        return Teacher(
            len(self.train_dataset),
            total_epochs=int(self.args.num_train_epochs),
            groups=self._groups,
            **self.teaching.teacher_options(self.args.seed),  # type: ignore[arg-type]
        )

    def _bare_model(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _make_scored_loss(self) -> ScoredLoss:
        head = find_head(self.accelerator.unwrap_model(self.model), self._head_name)
        base = self._bare_model()
        smoothing = float(self.args.label_smoothing_factor)
        if has_fused_head(base):
            for name, value, own in (("loss_type", getattr(self.args, "loss_type", "nll"), "nll"),
                                     ("label_smoothing_factor", smoothing, 0.0)):  # fmt: skip
                if value != own:
                    refuse(name, repr(value), f"{own!r} in TRL's trainers, or score_func=... for scores of such a loss")
            return LossBesideFusedHead(head, self.teaching, 0.0)
        fused = head.language and not self.teaching.keep_logits
        if fused and base.loss_function is not ForCausalLMLoss:
            refuse(
                "keep_logits", False, f"True, as the loss_function of this {type(base).__name__} is not the common one"
            )
        return (FusedLoss if fused else LossBeside)(head, self.teaching, smoothing)

    # ---------------------------------------------------------------------------------------------- data and its plan

    def get_train_dataloader(self) -> Any:
        """The trainer's loader over the teacher's lessons; a new training starts a new teacher."""
        self.teacher = self._make_teacher()
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> TeachingSampler:
        # Every process goes through the whole lesson, and accelerate deals its batches out.
        return self.teacher.sampler(num_replicas=1, rank=0, drop_last=self.args.dataloader_drop_last)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_training", False):
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        collate = own = self.data_collator
        if is_datasets_available() and _is_hugging_face(dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        else:
            collate = self._get_collator_with_removed_columns(collate, description=description)
        self.data_collator = NumberedCollator(collate)
        try:
            return super()._get_dataloader(NumberedDataset(dataset), description, *args, **kwargs)
        finally:
            self.data_collator = own

    def _batches(self) -> list[int]:
        """Batches of each epoch on this process."""
        ranks, drop_last = self.accelerator.num_processes, self.args.dataloader_drop_last
        sizes = self.teacher.epoch_sizes()
        return [batches_of(share_of(size, ranks, drop_last), self._train_batch_size, drop_last) for size in sizes]

    def _steps(self) -> list[int]:
        """Optimizer steps of each epoch; an incomplete window at its end steps too."""
        return [-(-batches // self.args.gradient_accumulation_steps) for batches in self._batches()]

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """The trainer's figures of the run, from the teacher's plan."""
        batches, steps = self._batches(), self._steps()
        if min(batches) == 0:
            got = f"{min(self.teacher.epoch_sizes())} examples in an epoch"
            refuse("ratio", got, f"enough for a batch of {self._train_batch_size} on each process")
        sizes = self.teacher.epoch_sizes()
        total_batch = self.get_total_train_batch_size(args)
        # In the trainer's order; steps and batches of an epoch are each epoch's own: see _run_epoch.
        return len(sizes), max(steps), max(sizes), sum(sizes), total_batch, max(batches), sum(steps)

    def _run_epoch(self, **kwargs: Any) -> None:
        epoch = kwargs["epoch"]
        kwargs.update(steps_in_epoch=self._batches()[epoch], num_update_steps_per_epoch=self._steps()[epoch])
        super()._run_epoch(**kwargs)
        self.teacher._merge()
        if self.teaching.teaching_log:
            coverage = self._coverage.merged()
            if self._log is not None:
                self._log.lesson(self.state.global_step, **coverage)

    # --------------------------------------------------------------------------------------------------------- steps

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The trainer's own loss; in training its examples are scored and recorded."""

        def own(inputs: Any, outputs_too: bool) -> Any:
            return super(TeachingMixin, self).compute_loss(
                model, inputs, return_outputs=outputs_too, num_items_in_batch=num_items_in_batch, **kwargs
            )

        if not model.training:
            return own(inputs, return_outputs)
        if ID not in inputs:
            refuse(
                "inputs", f"a batch without {ID!r}", "batches of get_train_dataloader(), if you override it, of super's"
            )
        inputs = dict(inputs)
        ids, cu_seqlens = inputs.pop(ID), inputs.pop(CU_SEQLENS, None)
        if self._score_func is not None:
            loss, outputs = own(dict(inputs), True)
            scores = self._score_func(outputs, inputs)
            check_tensor("score_func", scores, f"one that returns scores [B={len(ids)}]", shape=ids.shape)
        else:
            weight = self.teacher.weights(ids) if self.teaching.reweight == "inverse" else None
            assert self._scored_loss is not None
            smoother = self.label_smoother
            if isinstance(self._scored_loss, FusedLoss):
                self.label_smoother = None  # its smoothing is in our loss; the trainer's would look for logits
            try:
                loss, outputs, scores = self._scored_loss(
                    lambda outputs_too: own(dict(inputs), outputs_too),
                    self._bare_model(),
                    inputs,
                    len(ids),
                    cu_seqlens,
                    weight,
                    return_outputs,
                )
            finally:
                self.label_smoother = smoother
        self.teacher.record(ids, scores)
        if self.teaching.teaching_log:
            self._coverage.note(ids, inputs)
        self._score_mean.append(scores.detach().float().mean())  # read back when logged, as the loss is
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own loggers get the teacher's figures beside the loss."""
        if "loss" in logs and self._score_mean:
            logs["teaching/score_mean"] = float(torch.stack(self._score_mean).nanmean())
            epoch = self.teacher._harvest.epoch if self.teacher._harvest is not None else 0  # the one that runs
            logs["teaching/keep_ratio"] = self.teacher.epoch_sizes()[epoch] / len(self.train_dataset)
            logs["teaching/seconds"] = self.teacher._teaching_seconds
            if self.teacher._lessons is not None and self.teacher._lessons.turnover:
                logs["teaching/turnover"] = self.teacher._lessons.turnover[-1]
            self._score_mean = []
        if self._log is not None:
            for name, value in logs.items():
                if name == "loss" or name.startswith("eval_"):
                    self._log.metric(name, value, self.state.global_step)
        super().log(logs, *args, **kwargs)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; ``resume_from_checkpoint=True`` takes the newest checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole_checkpoint(self.args.output_dir, STATE) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state = self.teacher.state_dict()  # on every process: it merges what all of them recorded
        if self.args.should_save and not self.args.save_only_model:
            # First, so that by the time older checkpoints are removed this one is complete.
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            write_state(state, folder / STATE)
        super()._save_checkpoint(model, trial)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        stands = (0, 0) if resume_from_checkpoint is None else self._resume_teacher(resume_from_checkpoint)
        self._coverage = Coverage(len(self.train_dataset))
        if self.teaching.teaching_log and self.is_world_process_zero():
            self._log = TeachingLog(
                self._get_output_dir(trial=trial),
                self.teacher,
                step=self.state.global_step,
                group_names=class_names(self._bare_model()),
                show=lambda i: show_example(self.train_dataset[i], self.processing_class),
            )
        return stands

    def _resume_teacher(self, resume_from_checkpoint: Any) -> tuple[int, int]:
        """The epoch and the batch in it to go on at."""
        state = read_state(self.teacher, Path(resume_from_checkpoint) / STATE)
        epoch, left, steps = 0, self.state.global_step, self._steps()
        while epoch < len(steps) and left >= steps[epoch]:
            left -= steps[epoch]
            epoch += 1
        batches = left * self.args.gradient_accumulation_steps
        position = batches * self._train_batch_size * self.accelerator.num_processes
        saved = state["position"]
        if left > 0 and (saved["epoch"], saved["position"]) != (epoch, position):
            refuse(
                "resume_from_checkpoint",
                f"one that stands at example {saved['position']} of epoch {saved['epoch']}, which here is not step "
                f"{self.state.global_step}",
                "the same global batch: per_device_train_batch_size × processes × gradient_accumulation_steps",
            )
        # The trainer skips the batches of the epoch that were trained on, so the sampler gives it all of them.
        for sampler in list(self.teacher._harvest.samplers) if self.teacher._harvest is not None else []:
            sampler.load_state_dict({"epoch": epoch, "position": 0})
        return epoch, batches


class TeachingTrainer(TeachingMixin, Trainer):
    """transformers' Trainer with a teacher: see :class:`TeachingMixin`.

    >>> from attent.integrations.transformers import TeachingArguments, TeachingTrainer
    >>> teaching = TeachingArguments(ratio=0.5, score="head")       # TeachingTrainer(model, args, …, teaching=teaching)
    """


def _is_hugging_face(dataset: object) -> bool:
    import datasets

    return isinstance(dataset, datasets.Dataset)
