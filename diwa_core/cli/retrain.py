"""`diwa retrain`: bags or stores in, a better policy of one skill out; what the fine-tuning node runs as its worker."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from diwa_core import tether
from diwa_core.cli.pipeline import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNFINISHED, noted_signals

STATUS, RESULT = "status.json", "report.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--skill", required=True)
    parser.add_argument("--bags", nargs="*", default=[], help="rosbag2 folders, imported first")
    parser.add_argument("--stores", nargs="*", default=[], help="play stores to learn from as well")
    parser.add_argument("--held-out", nargs="*", default=[], help="play stores to measure on; needed by the refit of a classifier")
    parser.add_argument("--checkpoints", default="checkpoints", help="folder with world_model/, policies/ and classifiers/ to begin from")
    parser.add_argument("--base", default="", help="policy to begin from (default: policies/<skill> of --checkpoints)")
    parser.add_argument("--refit", nargs="*", default=[], help="of world_model, classifier, policy; a world model takes the others along")
    parser.add_argument("--iterations", type=int, default=0, help="of the fine-tuning (default: config/retrain.yaml)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-minutes", type=float, help="then fine-tuning takes the best it has; exit code 3 if it had not begun")
    parser.add_argument("--background", action="store_true", help="run only when nothing else wants the processor")
    parser.add_argument("--recipe", default="", help="YAML with the options of the stages (default: config/retrain.yaml)")
    parser.add_argument("--out", required=True, help="folder of the run")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 with report.json in --out, 1 after a failed stage, 3 when the time was up, 130 after Ctrl-C."""
    from rich.console import Console

    from diwa_core.pipeline.retrain import Request, Status, retrain
    from diwa_core.pipeline.runner import StageFailed
    from diwa_core.pipeline.stage import write_whole

    if args.background:
        os.environ[tether.BACKGROUND] = "1"  # the stages' processes are sessions of their own
        tether.step_aside()
    names = ("skill", "checkpoints", "base", "iterations", "seed", "recipe")
    lists = ("bags", "stores", "held_out", "refit")
    request = Request(**{name: getattr(args, name) for name in names}, **{name: tuple(getattr(args, name)) for name in lists})
    out, console = Path(args.out), Console(soft_wrap=True, highlight=False, markup=False)

    def show(status: Status) -> None:
        write_whole(out / STATUS, json.dumps(asdict(status)))

    with noted_signals() as signals:
        try:
            report = retrain(request, out, console.print, lambda: bool(signals), args.max_minutes, show)
        except StageFailed as failure:
            console.print(f"diwa retrain: {failure}\nWhat was done is kept: once it is mended, the same `diwa retrain` goes on.")
            return EXIT_FAILED
    if report is None:
        console.print(f"diwa retrain: {'stopped' if signals else 'the time is up'}. What was done is kept, and the same command goes on.")
        return EXIT_INTERRUPTED if signals else EXIT_UNFINISHED
    console.print(f"diwa retrain: {report['checkpoint']}, identity {report['identity'][:16]}; imagined {report['imagined']}")
    return 0
