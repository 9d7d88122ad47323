"""`diwa loop`: demonstrate, record, retrain and swap on the running graph in simulation, then measure before and after; one HTML report."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diwa_core.cli.demo import ROOT, collect_signals
from diwa_core.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from diwa_core.evaluate.comparison import Comparison
    from diwa_ros.loop import LoopRecord


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--skill", default="move_slider_left")
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "checkpoints", help="folder with world_model/, policies/ and classifiers/ to begin from"
    )
    parser.add_argument("--demonstrations", type=int, default=24, help="successful ones to record")
    parser.add_argument("--noise", type=float, default=0.6, help="of the demonstrator: 0 precise to 1 careless")
    parser.add_argument("--play-ticks", type=int, default=300, help="ticks of play to record as well")
    parser.add_argument("--stores", nargs="*", default=[], help="older play stores to learn from, too")
    parser.add_argument("--held-out", nargs="*", default=[], help="play stores to measure a new classifier on")
    parser.add_argument(
        "--refit", nargs="*", default=[], help="of world_model, classifier, policy (default: none; the policy is fine-tuned)"
    )
    parser.add_argument("--iterations", type=int, default=0, help="of the fine-tuning (default: config/retrain.yaml)")
    parser.add_argument("--minutes", type=float, default=8.0, help="budget of the retraining")
    parser.add_argument("--recipe", default="", help="YAML with the options of the retraining (default: config/retrain.yaml)")
    parser.add_argument("--episodes", type=int, default=100, help="starts on which before and after are measured")
    parser.add_argument("--workers", type=int, help="processes that measure (default: one per core)")
    parser.add_argument("--fair-share", action="store_true", help="retrain at ordinary priority, where other work would leave it nothing")
    parser.add_argument("--lockstep", action="store_true", help="the simulation waits for every command, instead of 30 Hz on the clock")
    parser.add_argument("--out", type=Path, default=Path("reports/loop"), help="folder of report.html, comparison.json and loop.json")
    parser.add_argument("--folder", type=Path, default=Path("runs/loop"), help="folder of bags, runs and logs")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when the loop was closed, whatever the report says about the gain."""
    from diwa_core.sim.skills import check_skill

    check_skill(args.skill)
    if args.demonstrations < 3 or args.episodes < 1 or args.play_ticks < 0:
        raise ConfigError("expected --demonstrations of at least 3, --episodes of at least 1 and --play-ticks of at least 0.")
    try:
        from diwa_ros.loop import LoopPlan, run_loop
    except ImportError as error:
        raise SetupError(f"the ROS nodes are not installed ({error}). Mend: make setup, or source the workspace.") from error
    from rich.console import Console

    console, began = Console(soft_wrap=True, highlight=False, markup=False), time.monotonic()
    name = time.strftime(f"{args.skill}-%Y%m%d-%H%M%S")
    plan = LoopPlan(
        args.skill,
        args.checkpoint,
        name,
        args.demonstrations,
        args.noise,
        args.play_ticks,
        tuple(args.stores),
        tuple(args.held_out),
        tuple(args.refit),
        args.iterations,
        args.minutes,
        args.recipe,
        not args.lockstep,
        not args.fair_share,
        args.folder.absolute(),
    )
    with collect_signals() as stops:
        console.print(f"diwa loop: starting the graph in simulation; bags, runs and logs in {args.folder}; Ctrl-C stops")
        record = run_loop(plan, lambda text: console.print(f"{time.monotonic() - began:5.0f} s  {text}"), stops)
    console.print(f"{time.monotonic() - began:5.0f} s  measuring before and after on {args.episodes} starts")
    comparison = compare(args, record)
    page = write_report(args, record, comparison, time.monotonic() - began)
    row = comparison.skills[0]
    console.print(f"diwa loop: {row.base} -> {row.finetuned}, gain {row.gain}, {time.monotonic() - began:.0f} s; report in {page}")
    return 0


def compare(args: argparse.Namespace, record: LoopRecord) -> Comparison:
    """Base beside the new policy on the same starts with the same noise."""
    from diwa_core.evaluate.comparison import compare_policies
    from diwa_core.evaluate.evaluation import evaluate

    report = json.loads(Path(record.report).read_text())
    made = Path(record.checkpoint).parent
    base = (
        made.parent / "policies" if "policy" in report["refitted"] and "world_model" in report["refitted"] else args.checkpoint / "policies"
    )
    comparison = compare_policies(
        [(base, made)],
        args.out / "episodes.jsonl",
        lambda plans, note: evaluate(report["world_model"], plans, args.workers, note),
        [args.skill],
        args.episodes,
    )
    comparison.write(args.out / "comparison.json")
    return comparison


def write_report(args: argparse.Namespace, record: LoopRecord, comparison: Comparison, seconds: float) -> Path:
    """The page of the comparison, with what the loop did and learned from in it, and loop.json."""
    from diwa_core.config import to_dict
    from diwa_core.evaluate.comparison_report import write_comparison_report

    retrained = json.loads(Path(record.report).read_text())
    values = {**to_dict(record), "retrained": retrained, "total_seconds": seconds, "real_time": not args.lockstep}
    (args.out / "loop.json").write_text(json.dumps(values, indent=1))
    sections = [data_section(record, retrained), robot_section(record, args.lockstep, seconds)]
    return write_comparison_report(args.out / "report.html", comparison, shlex.join(["diwa", *sys.argv[1:]]), sections)


def data_section(record: LoopRecord, retrained: dict[str, Any]) -> str:
    """What was learned from."""
    from diwa_core.evaluate.page import make_table

    rows = [["Bag", escape(record.bag)], ["Demonstrations", f"{record.successes} successes in {record.attempts} attempts"]]
    rows += [[f"Frames of {escape(Path(path).name)}", f"{count:,}"] for path, count in retrained["frames"].items()]
    rows += [[f"Successful attempts: {escape(skill)}", str(count)] for skill, count in retrained["attempts"].items()]
    rows += [
        ["Refitted", escape(", ".join(retrained["refitted"])) or "nothing: the policy was fine-tuned in the world model that was there"],
        ["World model", f"<code>{retrained['world_model_identity'][:16]}</code>"],
        ["New policy", f"<code>{retrained['identity'][:16]}</code>, from <code>{retrained['base'][:16]}</code>"],
    ]
    return "<h2>Data used</h2>\n" + make_table(["", ""], rows)


def robot_section(record: LoopRecord, lockstep: bool, seconds: float) -> str:
    """What the robot did meanwhile."""
    from diwa_core.evaluate.page import make_table

    def show(ticks: Any) -> str:
        return "no clock: lock-step" if lockstep else f"{ticks.missed} of {ticks.total} ticks missed"

    worked = f"{record.worked} episodes with the base policy, {record.worked_well} succeeded, {record.lost} given up"
    rows = [
        [
            "While retraining",
            f"{worked}; {show(record.while_retraining)}",
        ],
        ["While swapping", f"answered after {record.swap_ms:.0f} ms with the arm moving; {show(record.while_swapping)}"],
        *[[f"Time to {step}", f"{spent:.0f} s"] for step, spent in record.seconds.items()],
        ["Time of the whole loop", f"{seconds:.0f} s"],
    ]
    return "<h2>The robot meanwhile</h2>\n" + make_table(["", ""], rows)
