"""The command line: ``attent demo``, ``attent doctor`` and ``attent report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .demo.data import SUBSET
from .demo.settings import WAYS, Settings, usual_epochs

USAGE_ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 with a message on stderr if an argument is wrong."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        if args.command == "demo":
            from .demo.run import demo

            epochs = usual_epochs(args.data) if args.epochs is None else args.epochs
            settings = Settings(args.seeds, args.data, epochs, args.ratio, args.out, args.json, args.threads, args.way)
            demo(settings)
        elif args.command == "report":
            from .report import report

            png = args.png
            if png is True:
                png = args.run if Path(args.run).is_dir() else Path(args.run).parent
            print(report(args.run, args.out, args.compare, png=png))
        else:
            from .doctor import doctor

            doctor(args.ratio, args.epochs, args.warmup, args.anneal, as_json=args.json)
    except ValueError as error:
        print(f"attent {args.command}: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attent", description="Teach attention learners.")
    parser.add_argument("--version", action="version", version=f"attent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_doctor(commands)
    _add_report(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    usual = Settings()
    demo = commands.add_parser(
        "demo",
        help="train a small vision transformer with and without attent and compare",
        description="Train a small vision transformer on real images, on the CPU, in three arms: full data, full data "
        "for the seconds that attent takes, and attent. Print a table and the paired differences with their 95 % "
        "intervals; draw a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--seeds", type=int, default=usual.seeds, metavar="N", help="use seeds 0 to N-1 in every arm")
    demo.add_argument(
        "--data",
        default=usual.data,
        help="'subset': 12,000 images of Fashion-MNIST that come with attent; 'fashion-mnist:FOLDER': all images of a "
        "folder with the four gzipped idx files",
    )
    few, more = usual_epochs(SUBSET), usual_epochs("fashion-mnist:")
    epochs = f"epochs of the full-data arm; None: {few} of the subset, {more} of a folder"
    demo.add_argument("--epochs", type=int, metavar="E", help=epochs)
    demo.add_argument("--ratio", type=float, default=usual.ratio, metavar="R", help="attent's keep ratio")
    demo.add_argument("--out", type=Path, default=usual.out, metavar="PNG", help="where the picture goes")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write every run, interval and setting to FILE")
    demo.add_argument(
        "--way",
        choices=WAYS,
        default=usual.way,
        help="how attent teaches: 'harvest' trains on chosen images of later epochs; 'one-pass' runs the forward on "
        "pools of images and the backward on those chosen from them",
    )
    demo.add_argument("--threads", type=int, default=usual.threads, metavar="N", help="torch's threads")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what runs here and why, and what teaching costs and saves",
        description="Print versions, devices, backends with their reasons, and what ways of teaching cost and save.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    doctor.add_argument("--ratio", type=float, default=0.5, metavar="R", help="keep ratio")
    doctor.add_argument("--epochs", type=int, default=10, metavar="E", help="epochs of the training")
    doctor.add_argument("--warmup", type=int, default=1, metavar="W", help="full epochs at the beginning")
    doctor.add_argument("--anneal", type=float, default=0.125, metavar="A", help="share of full epochs at the end")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="a page about a run: what was chosen, what it cost, what it saved",
        description="Write one self-contained HTML page from the teaching.jsonl that a run left, and print its path.",
    )
    report.add_argument("run", metavar="RUN", help="the run's folder, or its teaching.jsonl")
    report.add_argument("--out", type=Path, metavar="HTML", help="where the page goes (default: RUN/teaching.html)")
    report.add_argument(
        "--png",
        nargs="?",
        type=Path,
        const=True,
        metavar="FOLDER",
        help="write each chart as a PNG file too, into FOLDER (default: RUN); needs matplotlib",
    )
    report.add_argument("--compare", nargs="*", default=[], metavar="RUN", help="runs whose metrics are drawn along")


if __name__ == "__main__":
    sys.exit(main())
