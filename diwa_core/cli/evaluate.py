"""`diwa evaluate`: success rates of policies in the simulator over seeded starts, and base beside fine-tuned, with intervals.

`diwa evaluate robot` is the evaluation beside a robot: diwa_core.cli.evaluate_robot.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    from diwa_core.cli import evaluate_robot

    steps = parser.add_subparsers(metavar="robot", help="the same trials in simulation and on a robot, blinded: diwa evaluate robot --help")
    robot = steps.add_parser("robot", description=evaluate_robot.__doc__)
    evaluate_robot.add_arguments(robot)
    robot.set_defaults(step=evaluate_robot.run)
    parser.add_argument("--world-model", help="checkpoint")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--policies", help="folder with one checkpoint per skill")
    asked.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar=("BASE", "FINETUNED"),
        help="compare two such folders on the same starts with the same noise; again for each further training seed",
    )
    asked.add_argument(
        "--candidates",
        nargs="+",
        metavar="RUN_DIR",
        help="all candidates of `diwa finetune --keep-candidates` runs: how close the choice without the simulator came to the best",
    )
    parser.add_argument("--skills", nargs="*", default=[], help="default: every skill that has a (fine-tuned) policy")
    parser.add_argument("--episodes", type=int, default=100, help="starts per skill")
    parser.add_argument(
        "--split",
        choices=("train", "validation", "evaluation"),
        help="list of start states (default: evaluation; with --candidates always validation)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the policy's noise; the starts stay the same, so runs are paired")
    parser.add_argument("--workers", type=int, help="default: one per core")
    parser.add_argument("--record", help="play store to write the episodes to: for the replay test, or to refit the world model")
    parser.add_argument("--write-card", action="store_true", help="keep each rate in its policy's model card")
    parser.add_argument(
        "--out",
        help="JSON file for the outcomes; with --pair a folder (default reports/diwa) for comparison.json, report.html and episodes.jsonl, "
        "which keeps finished episodes: the same command goes on where it was stopped; with --candidates (default reports/choice) likewise",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print one line per skill."""
    from diwa_core.errors import ConfigError

    if "step" in args:
        return args.step(args)
    if not args.world_model or not (args.policies or args.pair or args.candidates):
        raise ConfigError(
            "diwa evaluate: expected --world-model and one of --policies, --pair and --candidates, or the step `robot`; found less. "
            "diwa evaluate --help lists them."
        )
    if args.episodes < 1:
        raise ConfigError(f"--episodes: expected at least 1, found {args.episodes}.")
    if args.candidates:
        return run_candidates(args)
    args.split = args.split or "evaluation"
    if not args.pair:
        return run_single(args)
    if args.record:
        raise ConfigError("--record: expected with --policies, found with --pair. Record one side in a run of its own.")
    return run_pairs(args)


def run_pairs(args: argparse.Namespace) -> int:
    """Base beside fine-tuned: JSON, page and one line per skill."""
    import shlex
    import sys

    from rich.console import Console

    from diwa_core.cli.progress import stage_progress
    from diwa_core.evaluate.comparison import compare_policies
    from diwa_core.evaluate.comparison_report import list_doubts, show_steps, write_comparison_report
    from diwa_core.evaluate.evaluation import evaluate

    folder = Path(args.out or "reports/diwa")
    with stage_progress() as progress:
        comparison = compare_policies(
            args.pair,
            folder / "episodes.jsonl",
            lambda plans, report: evaluate(args.world_model, plans, args.workers, report),
            args.skills,
            args.episodes,
            args.split,
            args.seed,
            progress=lambda done, total: progress("episodes", done / total),
        )
    comparison.write(folder / "comparison.json")
    command = shlex.join(["diwa", *sys.argv[1:]])
    page = write_comparison_report(folder / "report.html", comparison, command)
    console = Console(soft_wrap=True, highlight=False)
    for name, row in [*((row.skill, row) for row in comparison.skills), ("mean", comparison)]:
        gain = f"{100 * row.gain.value:+5.1f} [{100 * row.gain.low:+.1f}, {100 * row.gain.high:+.1f}]"
        steps = f", {show_steps(row.environment_steps)} environment steps" if name != "mean" else ""
        console.print(f"{name:20s} {format_rate(row.base)} -> {format_rate(row.finetuned)}, gain {gain}{steps}", markup=False)
    for doubt in list_doubts(comparison):
        console.print(doubt)
    console.print(f"{folder / 'comparison.json'} holds the figures, {page} shows them.")
    if args.write_card:
        for row in comparison.skills:
            for side in (side for seed in row.seeds for side in (seed.base, seed.finetuned)):
                write_card(args, side.policy, side.success)
    return 0


def run_candidates(args: argparse.Namespace) -> int:
    """The quality of the choice: JSON and one line per run."""
    from dataclasses import asdict

    from diwa_core.cli.progress import stage_progress
    from diwa_core.errors import ConfigError
    from diwa_core.evaluate.evaluation import evaluate
    from diwa_core.finetune.candidates import format_choice, measure_choice

    if args.split not in (None, "validation") or args.record or args.write_card or args.skills:
        raise ConfigError("--candidates: expected validation starts and neither --record, --write-card nor --skills. Leave them out.")
    folder = Path(args.out or "reports/choice")
    with stage_progress() as progress:
        results = measure_choice(
            args.candidates,
            folder / "episodes.jsonl",
            lambda plans, report: evaluate(args.world_model, plans, args.workers, report),
            args.episodes,
            noise_seed=args.seed,
            progress=lambda done, total: progress("episodes", done / total),
        )
    rows = {"split": "validation", "starts": args.episodes, "noise_seed": args.seed, "runs": [asdict(result) for result in results]}
    (folder / "choice.json").write_text(json.dumps(rows, indent=1))
    print(format_choice(results))
    print(f"{args.episodes} validation starts; {folder / 'choice.json'} holds the figures.")
    return 0


def run_single(args: argparse.Namespace) -> int:
    """One folder of policies."""
    from rich.console import Console

    from diwa_core.cli.progress import stage_progress
    from diwa_core.errors import DataError
    from diwa_core.evaluate.evaluation import evaluate, plan_episodes
    from diwa_core.evaluate.recording import append_rollout, count_steps, create_rollout_store
    from diwa_core.evaluate.statistics import pool_mean, success_rate
    from diwa_core.sim.skills import SKILLS, check_skill

    skills = [check_skill(name) for name in args.skills or SKILLS if args.skills or (Path(args.policies) / name).exists()]
    if not skills:
        raise DataError(f"{args.policies}: expected folders named after skills ({', '.join(SKILLS)}), found none.")
    plans = [
        plan
        for skill in skills
        for plan in plan_episodes(skill, Path(args.policies) / skill, args.episodes, args.split, args.seed, bool(args.record))
    ]
    done = [0]
    store = create_rollout_store(args.record, args.split, args.seed) if args.record else None

    with stage_progress() as progress:

        def count(plan, result) -> None:
            if store is not None:  # an empty store is false
                append_rollout(store, result)
            done[0] += 1
            progress("episodes", done[0] / len(plans))

        results = evaluate(args.world_model, plans, args.workers, count)
    outcomes = {skill: [r.success for r in results if r.skill == skill] for skill in skills}
    console = Console()
    rates = {skill: success_rate(sum(success), len(success)) for skill, success in outcomes.items()}
    for skill, rate in rates.items():
        steps = [r.steps for r in results if r.skill == skill and r.success]
        mean_steps = f"{sum(steps) / len(steps):.0f}" if steps else "-"
        count = f"{sum(outcomes[skill])}/{len(outcomes[skill])}"
        console.print(f"{skill:20s} {format_rate(rate)}  {count}, mean steps of successes {mean_steps}")
    console.print(f"{'mean':20s} {format_rate(pool_mean(rates))}  split {args.split}, noise seed {args.seed}")
    if args.write_card:
        for skill, success in outcomes.items():
            write_card(args, Path(args.policies) / skill, success)
    if args.out:
        rows = [
            {"skill": p.skill, "index": p.index, "seed": p.noise_seed, "success": r.success, "steps": r.steps}
            for p, r in zip(plans, results, strict=True)
        ]
        Path(args.out).write_text(json.dumps({"split": args.split, "seed": args.seed, "episodes": rows}, indent=1))
    if store is not None:
        console.print(f"{len(plans)} episodes, {count_steps(store)} environment steps in {args.record}")
    return 0


def write_card(args: argparse.Namespace, policy: str | Path, success: list[bool]) -> None:
    """Put a success rate, and how it was measured, into the policy's model card."""
    from diwa_core.checkpoint import update_card
    from diwa_core.evaluate.statistics import success_rate

    rate = success_rate(sum(success), len(success))
    figures = {"success": rate.value, "low": rate.low, "high": rate.high, "episodes": args.episodes, "seed": args.seed}
    update_card(policy, {f"success_{args.split}": figures})


def format_rate(rate) -> str:
    """An Estimate as per cent with its 95 % interval."""
    return f"{100 * rate.value:5.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
