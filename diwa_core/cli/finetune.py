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
    parser.add_argument("--more-models", nargs="*", default=[], help="world models with the same codes (`diwa world-model train --codes`)")
    parser.add_argument(
        "--drivers", type=int, nargs="+", default=[0], help="models that drive the dreams: 0 is --world-model, 1.. the others"
    )
    parser.add_argument(
        "--judges", type=int, nargs="+", help="models that choose the checkpoint (default: those that do not drive, or all)"
    )
    parser.add_argument("--policy", required=True, help="checkpoint of the base policy; its skill is the one improved")
    parser.add_argument("--classifier", required=True, help="success classifier of the skill (`diwa classifier train`)")
    parser.add_argument("--demos", required=True, help="play store of demonstrations: the start states")
    parser.add_argument("--starts", type=int, default=40, help="demonstrations whose beginnings are the start bank")
    parser.add_argument("--out", required=True, help="checkpoint to write")
    parser.add_argument("--run-dir", required=True, help="metrics and the state of a killed run")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--bc-scale", type=float)
    parser.add_argument("--actor-rate", type=float)
    parser.add_argument("--finetuned-steps", type=int, help="denoising steps that are fine-tuned")
    parser.add_argument("--batch", type=int, help="dreams in parallel")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)


def run(args: argparse.Namespace) -> int:
    """Start bank, denoising PPO, choice of the checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    import torch

    from diwa_core.cli.policy import demonstrations
    from diwa_core.cli.progress import stage_progress
    from diwa_core.data.store import PlayStore
    from diwa_core.finetune.offline import FinetuneConfig, Imagination, demonstration_starts, finetune
    from diwa_core.finetune.ppo import PPOConfig
    from diwa_core.policy.store import load_policy, save_policy
    from diwa_core.reward.store import load_classifier
    from diwa_core.sim.skills import SKILLS
    from diwa_core.world_model.filter import load_world_model

    torch.set_num_threads(args.threads)
    loaded = [load_world_model(path, device=args.device) for path in (args.world_model, *args.more_models)]
    models, world = [model for model, _ in loaded], loaded[0][1]
    policy, base = load_policy(args.policy, world_model_id=world.identity)
    skill = base.config["skill"]
    classifier, judge = load_classifier(args.classifier, world_model_id=world.identity)
    episodes = demonstrations(PlayStore.open(args.demos), SKILLS.index(skill), args.starts)
    starts = [demonstration_starts(model, episodes, seed=args.seed) for model in models]
    judges = args.judges or [i for i in range(len(models)) if i not in args.drivers] or args.drivers
    imagination = Imagination(models, classifier.to(args.device), starts, tuple(args.drivers), tuple(judges))
    options = ("iterations", "bc_scale", "actor_rate", "finetuned_steps", "batch")
    ppo = replace(PPOConfig(), **{name: getattr(args, name) for name in options if getattr(args, name) is not None})
    config = FinetuneConfig(ppo=ppo, seed=args.seed)
    with stage_progress() as progress:

        def report(metrics: dict) -> None:
            progress(skill, (metrics["iteration"] + 1) / ppo.iterations)
            if "judged" in metrics:
                logger.info("%s %s", skill, {key: round(value, 4) for key, value in metrics.items()})

        tuned, found = finetune(imagination, policy.to(args.device), config, args.run_dir, report)
    lineage = {
        "base": base.identity,
        "classifier": judge.identity,
        "world_models": [checkpoint.identity for _, checkpoint in loaded],
        "drivers": args.drivers,
        "judges": judges,
        "finetuning": asdict(config),
        "environment_steps": 0,
        "code_version": __version__,
    }
    card = {**found, "starts": f"beginnings of {len(episodes)} demonstrations, {len(starts[0].h)} latents"}
    identity = save_policy(args.out, tuned.cpu(), world.contract, skill, world.identity, lineage, card, half=True)
    logger.info("%s: %s -> %s, identity %s", skill, found, Path(args.out), identity[:16])
    return 0
