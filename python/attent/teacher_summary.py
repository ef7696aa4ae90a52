"""What teaching did and what it cost, in figures that say how they were come by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .distributed import rank_and_world

if TYPE_CHECKING:
    from .teacher import Teacher


class TeachingSummary(dict[str, Any]):
    """A dict of what teaching did and cost; ``print`` shows it as a table.

    * ``keep_ratio_asked``: examples planned / offered, over the passes begun (pools: chosen so far)
    * ``keep_ratio_achieved``: examples trained on / offered; lower while a pass runs, and where batches drop tails
    * ``examples_trained_on``, ``examples_offered``: counts over all ranks; in a full run they would be equal
    * ``passes``, ``lessons``: passes begun; reduced lessons drawn
    * ``never_seen_ids``: int64: ids whose score was never recorded
    * ``always_chosen_ids``: int64: ids in every reduced lesson so far
    * ``demoted_ids``: int64: ids that ``demote_after`` leaves to the floor now
    * ``turnover``: for each reduced lesson after the first: share of it that was not in the one before
    * ``nonfinite_scores``: scores recorded that were NaN or infinite
    * ``teaching_seconds``: host seconds of this rank in record, merge, draw, choose
    * ``training_seconds``: wall-clock seconds of this rank's passes, first draw to last record, teaching included; None
      where no pass recorded a score, as on a stream
    * ``saved_seconds``: seconds of the same passes on full data − training_seconds; None if unknown
    * ``saved_seconds_are``: ``"measured"`` (full_seconds was given), ``"estimated"`` or ``"unknown"``

    Keys that need ids are absent without ``num_examples``.

    >>> summary = attent.Teacher(10, total_epochs=2).summary()
    >>> summary["keep_ratio_asked"], summary["saved_seconds_are"]
    (1.0, 'unknown')
    """

    def __str__(self) -> str:
        lines = []
        for key, value in self.items():
            if isinstance(value, torch.Tensor):
                first = ", ".join(str(number) for number in value[:5].tolist())
                value = f"{value.numel()}" + (
                    f" ({first}{', …' if value.numel() > 5 else ''})" if value.numel() else ""
                )
            elif isinstance(value, list):
                value = " ".join(f"{number:.2f}" for number in value[-8:])
            elif isinstance(value, float):
                value = f"{value:.4g}"
            lines.append(f"{key:<22} {value}")
        return "\n".join(lines)


def summarise(teacher: Teacher, full_seconds: float | None) -> TeachingSummary:
    """The summary of a teacher's merged state."""
    counts, harvest, lessons = teacher._counts, teacher._harvest, teacher._lessons
    offered = counts["offered"] + counts["pool_offered"] + teacher._pool_since_merge[0]
    chosen = counts["pool_chosen"] + teacher._pool_since_merge[1]
    trained_on = chosen + (0 if harvest is None else harvest.trained_on)
    summary = TeachingSummary(
        keep_ratio_asked=(counts["asked"] + chosen) / offered if offered else 1.0,
        keep_ratio_achieved=trained_on / offered if offered else 1.0,
        examples_trained_on=trained_on,
        examples_offered=offered,
        passes=counts["passes"],
    )
    saved: float | None = None
    training_seconds: float | None = None
    if harvest is not None and lessons is not None:
        store = harvest.store
        summary["lessons"] = lessons.drawn
        summary["turnover"] = list(lessons.turnover)
        summary["never_seen_ids"] = (store.visits == 0).nonzero().squeeze(1)
        always = (store.times_chosen == lessons.drawn) & (lessons.drawn > 0)
        summary["always_chosen_ids"] = always.nonzero().squeeze(1)
        summary["demoted_ids"] = lessons.demoted().nonzero().squeeze(1)
        summary["nonfinite_scores"] = store.nonfinite
        if harvest.rows_recorded > 0 and counts["offered"] > 0:
            training_seconds = harvest.seconds()
            learning = max(training_seconds - teacher._teaching_seconds, 0.0)
            per_example = learning / harvest.rows_recorded
            saved = per_example * counts["offered"] / rank_and_world()[1] - training_seconds
    label = "unknown" if saved is None else "estimated"
    if full_seconds is not None and training_seconds is not None:
        saved, label = full_seconds - training_seconds, "measured"
    summary["teaching_seconds"] = teacher._teaching_seconds
    summary["training_seconds"] = training_seconds
    summary["saved_seconds"] = saved
    summary["saved_seconds_are"] = label
    return summary
