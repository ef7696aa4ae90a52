"""Which of a run's checkpoints to resume from, where the newest may have been cut off by what ended the run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from ...checkpoint import read_file

_PREFIX, _TRAINER_STATE = "checkpoint-", "trainer_state.json"


def newest_whole_checkpoint(run: str | Path, state_file: str) -> str | None:
    """The newest ``checkpoint-<step>`` folder that the trainer finished writing; None if there is none.

    The trainer writes its own state last, after model, optimizer and schedule, and older checkpoints are removed after
    that: so one whole checkpoint is there as soon as one was saved. A newer one that is not is named in a warning.
    """
    folders = [folder for folder in Path(run).glob(f"{_PREFIX}*") if folder.name.removeprefix(_PREFIX).isdigit()]
    for folder in sorted(folders, key=lambda folder: -int(folder.name.removeprefix(_PREFIX))):
        try:
            json.loads((folder / _TRAINER_STATE).read_text(encoding="utf-8"))
            read_file(folder / state_file)
        except (OSError, ValueError) as error:
            message = f"{folder} is not whole, so an older checkpoint is resumed from ({error})"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            continue
        return str(folder)
    return None
