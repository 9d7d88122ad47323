"""`diwa finetune`: improve one skill's policy in imagination, from recorded data alone."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, replace
from pathlib import Path

from diwa_core import __version__

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--world-model", required=True, help="checkpoint")
    parser.add_argument("--policy", required=True, help="checkpoint of the base policy; its skill is the one improved")
    parser.add_argument("--play", nargs="+", required=True, help="play stores for the success classifier")
    parser.add_argument("--validation", nargs="+", required=True, help="held-out play stores that calibrate it")
    parser.add_argument("--demos", required=True, help="play store of demonstrations: the start states")
    parser.add_argument("--out", required=True, help="folder; becomes OUT/policies/<skill> and OUT/classifiers/<skill>")
    parser.add_argument("--run-dir", required=True, help="metrics")
    parser.add_argument("--starts", type=int, default=40, help="demonstrations whose beginnings are the start bank")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--bc-scale", type=float)
    parser.add_argument("--windows", type=int, default=1200, help="windows of play the classifier learns from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)


def run(args: argparse.Namespace) -> int:
    """Classifier, start bank, denoising PPO, checkpoints."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    import torch

    from diwa_core.cli.policy import demonstrations
    from diwa_core.data.store import PlayStore
    from diwa_core.finetune.offline import demonstration_starts, finetune, imagined_success
    from diwa_core.finetune.ppo import PPOConfig
    from diwa_core.policy.store import load_policy, save_policy
    from diwa_core.reward.store import save_classifier
    from diwa_core.sim.skills import SKILLS
    from diwa_core.world_model.filter import load_world_model

    torch.set_num_threads(args.threads)
    model, world = load_world_model(args.world_model)
    policy, base = load_policy(args.policy, world_model_id=world.identity)
    skill = base.config["skill"]
    classifier, quality = fit_classifier(model, args, skill)
    logger.info("%s classifier: threshold %.2f, %s", skill, classifier.threshold, quality)
    lineage = {"code_version": __version__, "seed": args.seed, "play": [PlayStore.open(path).content_hash for path in args.play]}
    save_classifier(Path(args.out) / "classifiers" / skill, classifier, world.contract, skill, world.identity, lineage, quality)
    starts = demonstration_starts(model, demonstrations(PlayStore.open(args.demos), SKILLS.index(skill), args.starts), seed=args.seed)
    chosen = {"iterations": args.iterations, "bc_scale": args.bc_scale}
    config = replace(PPOConfig(), **{key: value for key, value in chosen.items() if value is not None})
    before = imagined_success(model, classifier, starts, policy)
    logger.info("%s: %d starts, imagined success of the base policy %.2f", skill, len(starts.h), before)

    def report(metrics: dict) -> None:
        if metrics["iteration"] % 5 == 0:
            logger.info("%s %s", skill, {key: round(value, 4) for key, value in metrics.items()})

    tuned = finetune(model, classifier, starts, policy, config, args.run_dir, args.seed, report=report)
    after = imagined_success(model, classifier, starts, tuned)
    lineage |= {"base": base.identity, "ppo": asdict(config), "episodes": base.lineage.get("episodes")}
    card = {"imagined_before": before, "imagined_after": after}
    identity = save_policy(Path(args.out) / "policies" / skill, tuned, world.contract, skill, world.identity, lineage, card, half=True)
    logger.info("%s: imagined success %.2f -> %.2f, identity %s", skill, before, after, identity[:16])
    return 0


def fit_classifier(model, args: argparse.Namespace, skill: str):
    """Train on play, calibrate on the first half of the held-out windows and measure on the other: (classifier, quality)."""
    from diwa_core.reward.train import Windows, calibrate, collect_windows, measure_quality, train_classifier
    from diwa_core.world_model.report import load_play

    play, held_out = load_play(model, args.play), load_play(model, args.validation)
    classifier = train_classifier(collect_windows(model, play, skill, args.windows, args.seed), args.seed)
    windows = collect_windows(model, held_out, skill, 400, args.seed)
    halves = [Windows(*(getattr(windows, name)[part::2] for name in ("start", "filtered", "imagined", "success"))) for part in (0, 1)]
    calibrate(classifier, halves[0])
    quality = {
        name: asdict(measure_quality(classifier, getattr(halves[1], name), halves[1].start, halves[1].success))
        for name in ("filtered", "imagined")
    }
    return classifier, {"threshold": classifier.threshold.item(), **quality}
