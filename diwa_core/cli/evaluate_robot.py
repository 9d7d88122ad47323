"""`diwa evaluate robot`: the same blinded trials of several candidates in simulation and on a robot, and one report."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from diwa_core.cli.demo import ROOT, collect_signals
from diwa_core.errors import CheckpointError, ConfigError, SetupError

if TYPE_CHECKING:
    from diwa_core.evaluate.trial_judge import TrialJudge
    from diwa_core.evaluate.trial_run import Backend
    from diwa_core.evaluate.trials import TrialFolder

BACKENDS = ("simulation", "calvin", "robot")  # as trial_journal.BACKENDS, which needs numpy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the step."""
    parser.add_argument(
        "--candidates",
        nargs="+",
        required=True,
        metavar="[NAME=]FOLDER",
        help="folders with one policy per skill; differences are those to the first",
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "checkpoints", help="folder with world_model/, policies/ and classifiers/"
    )
    parser.add_argument("--on", nargs="+", choices=BACKENDS, default=["simulation", "robot"], help="where (default: simulation robot)")
    parser.add_argument(
        "--robot", default="fake-fr3", help="the robot's YAML: a name in config/ or a path (default: the simulated fake-fr3)"
    )
    parser.add_argument("--calvin-env", help="checkout of the official environment, for --on calvin")
    parser.add_argument("--skills", nargs="*", default=[], help="default: all that every candidate has")
    parser.add_argument("--starts", type=int, default=10, help="starts of each skill (default: 10)")
    parser.add_argument("--split", default="evaluation", help="list of the starts (default: evaluation)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the trials")
    parser.add_argument("--noise-seed", type=int, default=0, help="of the policies' noise")
    parser.add_argument("--max-steps", type=int, default=72, help="policy steps of a trial")
    parser.add_argument("--real-time", action="store_true", help="the simulation on the clock instead of lock-step")
    parser.add_argument("--unattended", action="store_true", help="the stand-in's oracle sets the marks; needs a robot that has one")
    parser.add_argument("--bags", default="", help="folder to record every trial on the robot into")
    parser.add_argument("--attach", action="store_true", help="use the graph that runs already (launch/evaluate.launch.py)")
    parser.add_argument("--open", action="store_true", help="run nothing: open the key and write the report from what there is")
    parser.add_argument("--timeout", type=float, default=30.0, help="longest wait for the graph to answer anything, seconds")
    parser.add_argument("--mark-timeout", type=float, default=600.0, help="longest wait for the operator, seconds")
    parser.add_argument("--out", type=Path, default=Path("reports/robot"), help="folder of plan, key, journal, pictures and report.html")


def run(args: argparse.Namespace) -> int:
    """Plan, run what is missing, report. Stopped at any moment, the same command goes on."""
    from diwa_core.evaluate.trial_journal import ROBOT
    from diwa_core.evaluate.trial_judge import TrialJudge
    from diwa_core.evaluate.trial_run import run_trials
    from diwa_core.evaluate.trials import TrialFolder, make_plan

    world_model = args.checkpoint / "world_model"
    if not (args.checkpoint / "policies").is_dir():
        raise CheckpointError(f"{args.checkpoint}: expected policies/<skill>/ for the graph to begin with, found none.")
    if args.attach and len(set(args.on) - {"calvin"}) > 1:
        raise ConfigError(f"--attach: expected one of simulation and robot, which runs; found --on {' '.join(args.on)}.")
    plan, key = make_plan(
        read_candidates(args.candidates), world_model, args.skills, args.starts, args.split, args.seed, args.noise_seed, args.max_steps
    )
    folder = TrialFolder(args.out)
    folder.begin(plan, key)
    if args.open:
        return report(folder)
    judge = TrialJudge(world_model, args.checkpoint / "classifiers", plan.skills)
    for name in dict.fromkeys(args.on):
        robot = args.robot if name == ROBOT else ""
        try:
            with ExitStack() as stack:
                ran = run_trials(folder, name, robot, make_opener(args, name, judge, folder, stack), judge, tell)
        except KeyboardInterrupt:
            tell(f"{name}: stopped; finished trials are kept, and the same command goes on")
            raise
        tell(f"{name}: {ran} trials run, all {len(plan.trials)} finished")
    if ROBOT in args.on:
        return report(folder)
    tell("The report opens the key, so it waits for the robot's trials. --open writes it without them.")
    return 0


def report(folder: TrialFolder) -> int:
    """Open the key."""
    from diwa_core.evaluate.trial_report import write_trial_report

    tell(f"the key is opened; report in {write_trial_report(folder, shlex.join(['diwa', *sys.argv[1:]]))}")
    return 0


def tell(text: str) -> None:
    """One line for the operator."""
    print(text, flush=True)


def read_candidates(words: list[str]) -> dict[str, Path]:
    """NAME=FOLDER or FOLDER, which is then its own name. Raises ConfigError on a name that is there twice."""
    candidates: dict[str, Path] = {}
    for word in words:
        name, separator, folder = word.partition("=")
        path = Path(folder if separator else name)
        name = name if separator else path.name
        if not name or name in candidates:
            raise ConfigError(f"--candidates: expected a name for each folder, found '{name}' twice or none. Write NAME=FOLDER.")
        candidates[name] = path
    return candidates


def make_opener(args: argparse.Namespace, name: str, judge: TrialJudge, folder: TrialFolder, stack: ExitStack) -> Callable[[], Backend]:
    """What brings a backend up, once there is something to run on it; `stack` takes it down."""
    if name == "calvin":
        return lambda: open_calvin(args, stack)
    try:
        from diwa_ros.trial_graph import trial_graph
        from diwa_ros.trials import RobotTrials, SimulationTrials, open_graph
    except ImportError as error:
        raise SetupError(f"the ROS nodes are not installed ({error}). Mend: make setup, or source the workspace.") from error

    def open_backend() -> Backend:
        stops = stack.enter_context(collect_signals())
        log_folder = Path("runs") / "logs" / time.strftime(f"evaluate-{name}-%Y%m%d-%H%M%S")
        robot = args.robot if name == "robot" else ""
        processes = trial_graph(args.checkpoint.absolute(), robot, args.real_time, args.bags if robot else "")
        tell(f"{name}: {'joining' if args.attach else 'starting'} the graph; logs in {log_folder} (they name the candidates)")
        client = stack.enter_context(open_graph(processes, judge.contract, log_folder, stops, args.attach, args.timeout))
        if not robot:
            return SimulationTrials(client)
        operator = stack.enter_context(Terminal())
        return RobotTrials(client, robot, operator, folder.path / "overlay", args.unattended, bool(args.bags), args.mark_timeout)

    return open_backend


def open_calvin(args: argparse.Namespace, stack: ExitStack) -> Backend:
    """The official environment, in this process. Raises SetupError when it is not there."""
    from diwa_core.evaluate.trial_run import TableBackend
    from diwa_core.sim.calvin_adapter import CalvinTable

    if not args.calvin_env:
        raise ConfigError(
            "--on calvin: expected --calvin-env with a checkout of the official environment, found none (docs/evaluation.md)."
        )
    table = CalvinTable(args.calvin_env)
    stack.callback(table.close)
    return TableBackend(table, args.checkpoint / "world_model")


class Terminal:
    """The operator at the terminal; without one the keys stay silent and marks come as messages. Use it as a context manager."""

    def __enter__(self) -> Terminal:
        from diwa_core.cli.record import keyboard

        self.context = keyboard()
        self.keys = self.context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(*error)

    def tell(self, text: str) -> None:
        """Show a line."""
        tell(text)
