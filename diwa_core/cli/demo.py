"""`diwa demo`: the graph in simulation, the skills on it, base beside fine-tuned, a live table, and one HTML report."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diwa_core.errors import CheckpointError, ConfigError, SetupError

ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--episodes", type=int, default=3, help="episodes of each policy, on the first starts of the evaluation list")
    parser.add_argument("--skills", nargs="+", default=[], help="default: every skill that has a policy")
    parser.add_argument("--seed", type=int, default=0, help="seed of the policies' noise")
    parser.add_argument("--max-steps", type=int, default=72, help="policy steps after which an episode has failed")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=ROOT / "checkpoints",
        help="folder with world_model/, policies/<skill>/ and, to be run beside them on the same starts, finetuned/<skill>/",
    )
    parser.add_argument("--out", type=Path, default=Path("reports/demo.html"), help="the report")
    parser.add_argument("--real-time", action="store_true", help="30 Hz on the clock instead of lock-step: late commands are missed ticks")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when every episode ran, whatever its outcome."""
    if args.episodes < 1 or args.max_steps < 1 or args.seed < 0:
        raise ConfigError("expected --episodes and --max-steps of at least 1 and --seed of at least 0.")
    if not (args.checkpoint / "world_model").exists() or not (args.checkpoint / "policies").is_dir():
        raise CheckpointError(
            f"{args.checkpoint}: expected world_model/ and policies/<skill>/, found neither or only one. "
            "Give --checkpoint, or train some: the README says how."
        )
    try:
        from diwa_ros.demo import DemoPlan, run_demo
    except ImportError as error:
        raise SetupError(f"the ROS nodes are not installed ({error}). Mend: make setup, or source the workspace.") from error
    from rich.console import Console

    from diwa_core.cli.demo_report import make_report
    from diwa_core.cli.demo_view import make_view
    from diwa_core.world_model.filter import load_world_model

    model, checkpoint = load_world_model(args.checkpoint / "world_model")
    log_folder = Path("runs") / "logs" / time.strftime("demo-%Y%m%d-%H%M%S")
    plan = DemoPlan(args.checkpoint, tuple(args.skills), args.episodes, args.seed, args.max_steps, args.real_time, log_folder)
    console = Console(soft_wrap=True, highlight=False)
    with collect_signals() as stops, make_view(console, plan) as view:
        console.print(f"diwa demo: starting the graph in simulation; logs in {log_folder}; Ctrl-C stops")
        record = run_demo(plan, checkpoint.contract, view, stops)
    make_report(args.out, record, plan, shlex.join(["diwa", *sys.argv[1:]]), model, checkpoint)
    console.print(f"diwa demo: report in {args.out}: open it in a browser.")
    console.print("Look at the last columns of the strips: the closer the prediction is to the camera, the further the model can dream.")
    return 0


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Yields the list of signals that asked to stop; inside, they interrupt nothing by themselves."""
    stops: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in previous:
        signal.signal(number, lambda received, frame: stops.append(received))
    try:
        yield stops
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
