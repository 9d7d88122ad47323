"""`diwa evaluate`: success rates of policies in the simulator, over seeded starts, with Wilson intervals."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--world-model", required=True, help="checkpoint")
    parser.add_argument("--policies", required=True, help="folder with one checkpoint per skill")
    parser.add_argument("--skills", nargs="*", help="default: every skill that has a policy")
    parser.add_argument("--episodes", type=int, default=100, help="starts per skill")
    parser.add_argument("--split", default="evaluation", choices=("train", "validation", "evaluation"), help="list of start states")
    parser.add_argument("--seed", type=int, default=0, help="seed of the policy's noise; the starts stay the same, so runs are paired")
    parser.add_argument("--workers", type=int, help="default: one per core")
    parser.add_argument("--record", help="play store to write the episodes to (for the replay test)")
    parser.add_argument("--write-card", action="store_true", help="keep each rate in its policy's model card")
    parser.add_argument("--out", help="JSON file for the outcomes")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print one line per skill."""
    from rich.console import Console

    from diwa_core.cli.progress import stage_progress
    from diwa_core.errors import DataError
    from diwa_core.evaluate.evaluation import evaluate, plan_episodes
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

    with stage_progress() as progress:

        def count(plan, result) -> None:
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
        write_cards(args, rates)
    if args.out:
        rows = [
            {"skill": p.skill, "index": p.index, "seed": p.noise_seed, "success": r.success, "steps": r.steps}
            for p, r in zip(plans, results, strict=True)
        ]
        Path(args.out).write_text(json.dumps({"split": args.split, "seed": args.seed, "episodes": rows}, indent=1))
    if args.record:
        write_episodes(args.record, results, args)
    return 0


def write_cards(args: argparse.Namespace, rates: dict) -> None:
    """Put each success rate, and how it was measured, into the policy's model card."""
    from diwa_core.checkpoint import update_card

    for skill, rate in rates.items():
        figures = {"success": rate.value, "low": rate.low, "high": rate.high, "episodes": args.episodes, "seed": args.seed}
        update_card(Path(args.policies) / skill, {f"success_{args.split}": figures})


def format_rate(rate) -> str:
    """An Estimate as per cent with its 95 % interval."""
    return f"{100 * rate.value:5.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def write_episodes(path: str, results: list, args: argparse.Namespace) -> None:
    """Keep recorded episodes as a play store."""
    import numpy as np

    from diwa_core.contract import Contract
    from diwa_core.data.store import PlayStore
    from diwa_core.sim.skills import SKILLS

    store = PlayStore.create(path, Contract(), {"generator": "evaluation", "split": args.split, "seed": args.seed})
    for result in results:
        skill = np.full(len(result.frames["actions"]), SKILLS.index(result.skill), np.int8)
        store.append_episode({**result.frames, "skill": skill})
