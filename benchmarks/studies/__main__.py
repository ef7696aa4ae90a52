"""The command line of the studies."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

from ..provenance import RESULTS
from .catalogue import SCALES, Missing, Sources, load, names
from .sweep import Sweep


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies", description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="small", help="small: a CPU; gpu: not yet run on one")
    parser.add_argument("--study", action="append", help="one or more of them (default: all)")
    parser.add_argument("--share", default="1/1", help="K/N: every N-th study from the K-th on; one process each")
    parser.add_argument("--resume", action="store_true", help="keep what has landed (default: start the files anew)")
    parser.add_argument("--images", default="subset", help="as attent demo's --data (default: the shipped subset)")
    parser.add_argument("--texts", help="a folder or tar archive of .txt files, for the studies on language")
    parser.add_argument("--encoder", help="a folder with all-MiniLM-L6-v2 (default: the package that ships it)")
    parser.add_argument("--out", type=Path, default=RESULTS / "studies", help="folder of the results")
    asked = parser.parse_args(arguments)
    known = names(asked.scale)
    for name in asked.study or ():
        if name not in known:
            parser.error(f"--study: got {name!r}; takes {', '.join(known)}")
    share = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", asked.share)
    if share is None or int(share[1]) > int(share[2]):
        parser.error(f"--share: got {asked.share!r}; takes K/N with 1 <= K <= N, such as 1/2 and 2/2")
    torch.set_num_threads(1)
    left_out = False
    for name in (asked.study or known)[int(share[1]) - 1 :: int(share[2])]:
        try:
            study = load(asked.scale, name, Sources(asked.images, asked.texts, asked.encoder))
        except Missing as reason:
            print(f"{name}: left out: {reason}", file=sys.stderr)
            left_out = True
            continue
        sweep = Sweep(study, asked.out / asked.scale)
        if not asked.resume:
            sweep.results.clear()
        sweep.run()
    return int(left_out)


if __name__ == "__main__":
    sys.exit(main())
