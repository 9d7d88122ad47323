"""`diwa dppo`: the online baseline, improve one skill's policy in the simulator and count the environment steps it takes."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, replace
from pathlib import Path

from diwa_core import __version__

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--world-model", required=True, help="checkpoint; only its filter is used, nothing is imagined")
    parser.add_argument("--policy", required=True, help="checkpoint of the base policy; its skill is the one improved")
    parser.add_argument("--out", required=True, help="folder; becomes OUT/policies/<skill>")
    parser.add_argument("--run-dir", required=True, help="metrics and state; a killed run continues from it")
    parser.add_argument("--env-steps", type=int, default=200_000, help="budget of simulator steps, warm-ups included")
    parser.add_argument(
        "--match", type=float, metavar="RATE", help="stop when success on validation starts reaches this rate (0 to 1), and note the steps"
    )
    parser.add_argument("--iterations", type=int, help="stop after so many, whatever is left of the budget")
    parser.add_argument("--batch", type=int, default=24, help="play tables in parallel")
    parser.add_argument("--chunks", type=int, help="chunks per table and iteration")
    parser.add_argument("--bc-scale", type=float)
    parser.add_argument("--actor-rate", type=float)
    parser.add_argument("--evaluate-every", type=int, default=10, help="iterations between evaluations on validation starts; 0: never")
    parser.add_argument("--episodes", type=int, default=50, help="of one evaluation")
    parser.add_argument("--workers", type=int, default=2, help="simulator processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)


def run(args: argparse.Namespace) -> int:
    """Denoising PPO in the simulator, then the checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    import torch

    from diwa_core.config import to_dict
    from diwa_core.finetune.online import OnlineBudget, SimulatorEnv, finetune_online, validation_success
    from diwa_core.finetune.ppo import DenoisingPPO, PPOConfig
    from diwa_core.policy.store import load_policy, save_policy
    from diwa_core.run_folder import guard_run
    from diwa_core.world_model.filter import load_world_model

    torch.set_num_threads(args.threads)
    model, world = load_world_model(args.world_model)
    policy, base = load_policy(args.policy, world_model_id=world.identity)
    skill = base.config["skill"]
    budget = OnlineBudget(args.env_steps, args.iterations, args.evaluate_every, args.episodes, args.match)
    chosen = {name: getattr(args, name) for name in ("batch", "chunks", "bc_scale", "actor_rate")}
    config = replace(PPOConfig(), **{name: value for name, value in chosen.items() if value is not None})
    ppo = {name: value for name, value in to_dict(config).items() if name != "iterations"}  # the budget decides, and may grow
    guard_run(args.run_dir, {"world_model": world.identity, "base": base.identity, "seed": args.seed, "ppo": ppo})
    lineage = {"code_version": __version__, "method": "dppo", "seed": args.seed, "base": base.identity, "ppo": ppo}
    lineage["episodes"] = base.lineage.get("episodes")

    def save(path: Path, tuned, card: dict | None = None) -> str:
        return save_policy(path, tuned, world.contract, skill, world.identity, lineage, card, half=True)

    def validate(tuned) -> dict[str, float]:
        candidate = Path(args.run_dir) / "policy"
        save(candidate, tuned)
        return validation_success(args.world_model, candidate, skill, args.episodes, args.workers)

    def report(row: dict) -> None:
        logger.info("%s %s", skill, {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})

    with SimulatorEnv(model, skill, config.batch, args.workers, args.seed, policy.config.horizon) as env:
        learner = DenoisingPPO(policy, env, config, args.seed)
        last = finetune_online(learner, args.run_dir, budget, validate, report)
    card = {"env_steps": last["env_steps"], "budget": asdict(budget), "validation": last.get("validation"), "matched": last.get("matched")}
    lineage |= {"env_steps": last["env_steps"], "iterations": learner.iteration}
    identity = save(Path(args.out) / "policies" / skill, learner.policy, card)
    measured = last.get("validation")
    rate = f", success {measured['value']:.2f} on {measured['episodes']} validation starts" if measured else ""
    reached = "" if args.match is None else f", {'reached' if 'matched' in last else 'did not reach'} {args.match:.2f}"
    logger.info("%s: %d environment steps%s%s, identity %s", skill, last["env_steps"], rate, reached, identity[:16])
    return 0
