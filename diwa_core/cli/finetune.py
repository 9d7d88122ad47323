"""`diwa finetune`: improve one skill's policy in imagination, from recorded data alone."""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path

from diwa_core import __version__
from diwa_core.errors import DataError

logger = logging.getLogger(__name__)
LATER_FRAMES = 12  # how far into a demonstration a start to learn on may lie


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--world-model", required=True, help="checkpoint")
    parser.add_argument("--more-models", nargs="*", default=[], help="world models with the same codes (`diwa world-model train --codes`)")
    parser.add_argument(
        "--drivers", type=int, nargs="+", default=[0], help="models that drive the dreams: 0 is --world-model, 1.. the others"
    )
    parser.add_argument(
        "--judges", type=int, nargs="+", help="models that choose the checkpoint (default: those that do not drive, or all)"
    )
    parser.add_argument("--policy", required=True, help="checkpoint of the base policy; its skill is the one improved")
    parser.add_argument("--classifier", required=True, help="success classifier of the skill (`diwa classifier train`)")
    parser.add_argument(
        "--demos",
        required=True,
        help="store of demonstrations: the skill's own that were not cloned begin in the starts to judge on, all others in the starts to "
        "learn on, unless the skill is already done there",
    )
    parser.add_argument(
        "--learn", type=int, help="how many of the skill's own demonstrations are starts to learn on (default: as many as were cloned)"
    )
    parser.add_argument("--play", nargs="*", default=[], help="play stores: their episodes begin in starts to learn on, too")
    parser.add_argument(
        "--threshold", type=float, help="probability from which a dreamt frame is a success, instead of the classifier's own"
    )
    parser.add_argument("--misplaced-mm", type=float, default=0.0, help="deviation of where the arm is in dreams from where it seems to be")
    parser.add_argument("--out", required=True, help="checkpoint to write")
    parser.add_argument("--run-dir", required=True, help="metrics and the state of a killed run")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--max-minutes", type=float, help="begin no iteration later than this and take the best candidate until then")
    parser.add_argument("--bc-scale", type=float)
    parser.add_argument("--actor-rate", type=float)
    parser.add_argument("--finetuned-steps", type=int, help="denoising steps that are fine-tuned")
    parser.add_argument("--batch", type=int, help="dreams in parallel")
    parser.add_argument("--judge-episodes", type=int, help="dreams that judge a candidate")
    parser.add_argument("--report-episodes", type=int, help="fresh dreams that measure the base policy and the chosen candidate")
    parser.add_argument("--autocast", action="store_true", help="learn in bfloat16, policy and dreams: faster; judging does not")
    parser.add_argument(
        "--keep-candidates", action="store_true", help="keep every judged candidate in RUN_DIR/candidates, for `diwa evaluate --candidates`"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)


def run(args: argparse.Namespace) -> int:
    """Start bank, denoising PPO, choice of the checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    import torch

    from diwa_core.cli.progress import stage_progress
    from diwa_core.evaluate.recording import spent_steps
    from diwa_core.finetune.candidates import candidate_path
    from diwa_core.finetune.offline import FinetuneConfig, Imagination, finetune
    from diwa_core.finetune.ppo import PPOConfig
    from diwa_core.policy.store import load_policy, save_policy
    from diwa_core.reward.store import load_classifier
    from diwa_core.world_model.filter import load_world_model

    began, limit_s = time.monotonic(), float("inf") if args.max_minutes is None else 60 * args.max_minutes
    torch.set_num_threads(args.threads)
    loaded = [load_world_model(path, device=args.device) for path in (args.world_model, *args.more_models)]
    models, world = [model for model, _ in loaded], loaded[0][1]
    policy, base = load_policy(args.policy, world_model_id=world.identity)
    skill = base.config["skill"]
    classifier, judge = load_classifier(args.classifier, world_model_id=world.identity, skill=skill)
    classifier = classifier.to(args.device)
    if args.threshold is not None:
        classifier.threshold.fill_(args.threshold)
    starts, judge_starts = start_banks(models, classifier, args, skill, base.lineage["episodes"] if args.learn is None else args.learn)
    judges = args.judges or [i for i in range(len(models)) if i not in args.drivers] or args.drivers
    misplaced_m = args.misplaced_mm / 1000
    imagination = Imagination(models, classifier, starts, judge_starts, tuple(args.drivers), tuple(judges), misplaced_m)

    def given(*names: str) -> dict:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    ppo = replace(PPOConfig(), **given("iterations", "bc_scale", "actor_rate", "finetuned_steps", "batch"))
    config = FinetuneConfig(ppo=ppo, seed=args.seed, autocast=args.autocast, **given("judge_episodes", "report_episodes"))
    made_from = {
        "base": base.identity,
        "classifier": judge.identity,
        "world_models": [checkpoint.identity for _, checkpoint in loaded],
        "drivers": args.drivers,
        "judges": judges,
        "threshold": classifier.threshold.item(),
        "misplaced_mm": args.misplaced_mm,
    }
    lineage = {
        **made_from,
        "finetuning": asdict(config),
        "environment_steps": sum(spent_steps([], *(checkpoint.lineage for _, checkpoint in loaded)).values()),  # on refits
        "code_version": __version__,
    }

    def save(path: Path, tuned, card: dict) -> str:
        return save_policy(path, tuned, world.contract, skill, world.identity, lineage, card, half=True)

    def keep(candidate, judgement: dict) -> None:
        if args.keep_candidates:
            save(candidate_path(args.run_dir, judgement["iteration"]), candidate, judgement)

    with stage_progress() as progress:

        def report(metrics: dict) -> None:
            progress(skill, (metrics["iteration"] + 1) / ppo.iterations)
            if "judged" in metrics:
                logger.info("%s %s", skill, {key: round(value, 4) for key, value in metrics.items()})

        is_over = lambda: time.monotonic() - began > limit_s  # noqa: E731
        tuned, found = finetune(imagination, policy.to(args.device), config, args.run_dir, report, is_over, keep, made_from)
    card = {**found, "starts": "beginnings of demonstrations that were not cloned"}
    card["start_counts"] = {"judged": len(judge_starts[0].h), "learned": len(starts[0].h)}
    identity = save(Path(args.out), tuned.cpu(), card)
    logger.info("%s: %s -> %s, identity %s", skill, found, Path(args.out), identity[:16])
    return 0


def start_banks(models, classifier, args: argparse.Namespace, skill: str, cloned: int):
    """Banks of each model to learn on and to judge on: (starts, judge_starts)."""
    from diwa_core.cli.policy import demonstrations
    from diwa_core.data.attempts import NO_SKILL
    from diwa_core.data.store import PlayStore
    from diwa_core.finetune.offline import beginning_windows, demonstration_windows, filter_starts, worth_trying
    from diwa_core.sim.skills import SKILLS

    store, warmup = PlayStore.open(args.demos), models[0].config.warmup_frames
    own = demonstrations(store, SKILLS.index(skill), None)
    others = [episode for number in range(len(SKILLS)) if number != SKILLS.index(skill) for episode in demonstrations(store, number, None)]
    others += demonstrations(store, NO_SKILL, None)  # beginnings of unlabelled play
    if len(own) <= cloned:
        raise DataError(
            f"{args.demos}: expected more than {cloned} demonstrations of '{skill}', so that some are left to judge on, found {len(own)}. "
            "Record some and mark them as successes, or lower --learn."
        )
    judge_starts = [filter_starts(model, demonstration_windows(own[cloned:], warmup, spread=0)) for model in models]
    windows = demonstration_windows([*own[:cloned], *others], warmup, LATER_FRAMES, args.seed)
    for path in args.play:
        windows += beginning_windows(PlayStore.open(path), warmup)
    starts = [filter_starts(model, windows) for model in models]
    ends = [{name: values[-warmup:] for name, values in episode.items()} for episode in own]
    ready = worth_trying(models[0], classifier, starts[0], judge_starts[0], filter_starts(models[0], ends))
    logger.info("%s: %d starts to learn on, of %d recorded; %d to judge on", skill, ready.sum(), len(ready), len(judge_starts[0].h))
    return [bank[ready] for bank in starts], judge_starts
