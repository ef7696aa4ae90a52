"""The teacher's options beside ``TrainingArguments``: a dataclass that ``HfArgumentParser`` takes too."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ..._checks import check_choice, refuse
from ...ops.linear_cross_entropy import PER_EXAMPLE, SCORES


@dataclass
class TeachingArguments:
    """What :class:`attent.Teacher` is made with, and how examples are scored.

    All but the last five are the Teacher's own, with its defaults; the total of epochs is ``num_train_epochs``. In
    Python, ``ratio`` and ``interval`` may be schedules of :mod:`attent.schedules`, and ``warmup`` a float, a share of
    the run.

    Args:
        teaching_seed: the Teacher's ``seed``; None: ``TrainingArguments.seed``.
        score: ``"logit"`` (costs next to nothing), ``"head"`` (recommended for language models; its cost is in
            :func:`attent.linear_cross_entropy`), ``"hidden"`` or ``"loss"``.
        per_example: ``"rms"`` (neutral to length), ``"mean"`` or ``"sum"``.
        keep_logits: for language models: the model computes its logits and its own loss as ever, and scores are
            computed beside them. For trainers that read logits while training, and for models that do not use
            transformers' common loss. TRL's trainers bring a fused head of their own: there it changes nothing.
        teaching_log: write ``teaching.jsonl`` into ``output_dir``, which ``attent report`` draws.

    >>> from attent.integrations.transformers import TeachingArguments
    >>> TeachingArguments(ratio=0.7, score="head").teacher_options(seed=42)["ratio"]
    0.7
    """

    ratio: float = field(default=0.5, metadata={"help": "keep ratio of reduced epochs, in (0, 1]"})
    temperature: float = field(default=1.0, metadata={"help": "0: the highest scores; 1: in proportion to them"})
    floor: float = field(default=0.2, metadata={"help": "share of the chosen that is drawn uniformly"})
    warmup: int = field(default=1, metadata={"help": "full epochs at the start"})
    anneal: float = field(default=0.125, metadata={"help": "share of the run at its end that is full"})
    reweight: str = field(default="none", metadata={"help": "'none' or 'inverse' (inclusion probabilities)"})
    demote_after: int | None = field(default=None, metadata={"help": "visits without a new lowest score; None: off"})
    interval: int = field(default=1, metadata={"help": "epochs that a lesson is held for"})
    teaching_seed: int | None = field(default=None, metadata={"help": "None: the trainer's seed"})
    score: str = field(default="logit", metadata={"help": "'logit', 'head', 'hidden' or 'loss'"})
    per_example: str = field(default="rms", metadata={"help": "'rms', 'mean' or 'sum'"})
    keep_logits: bool = field(default=False, metadata={"help": "leave the language model's logits and loss alone"})
    teaching_log: bool = field(default=True, metadata={"help": "write teaching.jsonl for `attent report`"})

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)
        check_choice("per_example", self.per_example, PER_EXAMPLE)
        for name in ("keep_logits", "teaching_log"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, repr(getattr(self, name)), "True or False")

    def teacher_options(self, seed: int) -> dict[str, object]:
        """Keyword arguments for :class:`attent.Teacher`, ``total_epochs`` and ``groups`` excepted."""
        own = ("teaching_seed", "score", "per_example", "keep_logits", "teaching_log")
        options = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in own}
        return {**options, "seed": seed if self.teaching_seed is None else self.teaching_seed}
