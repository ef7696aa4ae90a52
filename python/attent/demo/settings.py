"""What the command line sets for the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .._checks import check_choice, check_int, check_number, refuse
from .data import SUBSET

HARVEST, ONE_PASS = "harvest", "one-pass"
WAYS = (HARVEST, ONE_PASS)


def usual_epochs(data: str) -> int:
    """5 epochs of the shipped subset, for a comparison of a few minutes on two cores; 8 of a folder's images."""
    return 5 if data == SUBSET else 8


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    seeds: int = 3
    data: str = SUBSET
    epochs: int = usual_epochs(SUBSET)
    ratio: float = 0.3
    out: Path = Path("demo.png")
    json: Path | None = None
    #: The learner's operations are so small that a second thread gains little; waiting for a busy core costs far more.
    threads: int = 1
    way: str = HARVEST

    def check(self) -> None:
        """Refuse values that no run can use, before any time is spent."""
        check_int("--seeds", self.seeds, low=1)
        check_int("--epochs", self.epochs, low=2, why="a full one for the first scores, then those that attent reduces")
        check_number("--ratio", self.ratio, low=0, high=1, open_low=True)
        check_int("--threads", self.threads, low=1)
        check_choice("--way", self.way, WAYS)
        if self.out.suffix.lower() != ".png":
            refuse("--out", repr(str(self.out)), "a path that ends in .png")
        for argument, path in (("--out", self.out), ("--json", self.json)):
            if path is not None and not path.absolute().parent.is_dir():
                refuse(argument, repr(str(path)), "a path in a folder that exists")
