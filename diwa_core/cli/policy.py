"""`diwa policy`: clone base policies from demonstrations, on the features of a world model."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from diwa_core import __version__
from diwa_core.config import to_dict
from diwa_core.errors import DataError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--world-model", required=True, help="checkpoint")
    parser.add_argument("--demos", required=True, help="play store of demonstrations, one episode each, labelled with their skill")
    parser.add_argument("--out", required=True, help="folder; each skill becomes OUT/<skill>")
    parser.add_argument("--skills", nargs="*", help="default: every skill that has demonstrations")
    parser.add_argument("--per-skill", type=int, default=4, help="demonstrations used of each skill (the first ones)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256, help="width of the denoiser (the paper: 512)")
    parser.add_argument("--updates", type=int, help="default: that of BCConfig")
    parser.add_argument("--threads", type=int, default=1)


def run(args: argparse.Namespace) -> int:
    """Train one policy per skill and write its checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    import torch

    from diwa_core.cli.progress import stage_progress
    from diwa_core.data.store import PlayStore
    from diwa_core.policy.behaviour_cloning import BCConfig, train_policy
    from diwa_core.policy.demonstrations import demonstration_pairs
    from diwa_core.policy.diffusion import PolicyConfig
    from diwa_core.policy.store import save_policy
    from diwa_core.sim.skills import SKILLS, check_skill
    from diwa_core.world_model.filter import load_world_model

    torch.set_num_threads(args.threads)
    model, checkpoint = load_world_model(args.world_model)
    store = PlayStore.open(args.demos)
    config = BCConfig() if args.updates is None else BCConfig(updates=args.updates)
    with stage_progress() as progress:
        for skill in [check_skill(name) for name in args.skills or SKILLS]:
            episodes = demonstrations(store, SKILLS.index(skill), args.per_skill)
            if not episodes:
                if args.skills:
                    raise DataError(f"{args.demos}: expected demonstrations of '{skill}', found none. Collect some or leave the skill out.")
                continue
            features, chunks = demonstration_pairs(model, episodes)
            policy = train_policy(
                features,
                chunks,
                PolicyConfig(feature_size=model.feature_size, hidden=(args.hidden,) * 3),
                config,
                args.seed,
                progress=lambda update, loss, skill=skill: progress(skill, update / config.updates),
            )
            lineage = {
                "demonstrations": store.content_hash,
                "episodes": len(episodes),
                "pairs": len(features),
                "seed": args.seed,
                "training": to_dict(config),
                "code_version": __version__,
            }
            path = Path(args.out) / skill
            identity = save_policy(path, policy, store.contract, skill, checkpoint.identity, lineage, half=True)
            logger.info("%s: %d demonstrations, %d pairs -> %s, identity %s", skill, len(episodes), len(features), path, identity[:16])
    return 0


def demonstrations(store, skill: int, count: int | None) -> list[dict]:
    """The first `count` (None: all) episodes of a store of demonstrations labelled with skill number `skill`; -1: those without a label.

    Those that an operator marked as failures are none.
    """
    from diwa_core.data.store import FAILURE

    labels = store.load(("skill",))["skill"]
    fields = tuple(name for name in store.fields if name != "skill")
    shown = [episode for episode, mark in zip(store.episodes, store.marks, strict=True) if mark != FAILURE or skill < 0]
    chosen = [(start, end) for start, end in shown if labels[start:end].max() == skill][:count]
    return [{name: store.read(name, start, end) for name in fields} for start, end in chosen]
