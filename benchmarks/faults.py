"""The fault matrix in figures: `python benchmarks/faults.py [--fault NAME ...] [--backend fake-fr3] [--markdown] [--json FILE]`.

Each fault of tests/fault_rig.py is put into the running graph; the table says how long until the arm was held, whether any command outside
the limits went out, what the controller showed and how it went on. Times are between the senders' own stamps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import rclpy
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fault_matrix import FAULTS, faults_of
from fault_rig import RIGS, Outcome, make_fault_checkpoints
from ros_support import private_environment

COLUMNS = ("fault", "backend", "noticed after ms", "held after ms", "commands outside", "state", "reason", "goes on by")


def row(outcome: Outcome) -> list[str]:
    """One line of the table."""
    noticed = "-" if outcome.noticed_ms is None else f"{outcome.noticed_ms:.0f}"
    held = "moves on" if outcome.held_ms is None else f"{outcome.held_ms:.0f}"
    outside = f"{outcome.outside} of {outcome.commands}"
    return [outcome.fault, outcome.backend, noticed, held, outside, outcome.state, outcome.reason, outcome.resumed_by]


def main() -> None:
    """Run the matrix and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", action="append", choices=[fault.name for fault in FAULTS], help="only this one; may be repeated")
    parser.add_argument("--backend", action="append", choices=list(RIGS), help="only this one (default: all)")
    parser.add_argument("--attempts", type=int, default=1, help="to bring the arm to motion, on a busy machine")
    parser.add_argument("--markdown", action="store_true", help="print the table as it is in docs/safety.md")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.update(private_environment())
    rclpy.init()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="diwa_faults_") as folder:
        checkpoints = make_fault_checkpoints(Path(folder) / "checkpoints")
        for backend in args.backend or RIGS:
            (logs := Path(folder) / f"logs_{backend}").mkdir()
            rig = RIGS[backend](checkpoints, logs)
            try:
                for fault in faults_of(backend):
                    if not args.fault or fault.name in args.fault:
                        outcomes.append(rig.run(fault, attempts=args.attempts))
                        print(" | ".join(row(outcomes[-1])), file=sys.stderr, flush=True)
            finally:
                rig.close()
    rclpy.try_shutdown()
    if args.markdown:
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        print("\n".join("| " + " | ".join(row(outcome)) + " |" for outcome in outcomes))
    else:
        table = Table(*COLUMNS)
        for outcome in outcomes:
            table.add_row(*row(outcome))
        Console().print(table)
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))


if __name__ == "__main__":
    main()
