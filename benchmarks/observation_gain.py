"""What believing every frame at once costs: success of the same policies for several observation gains of the running world model.

A policy that was fine-tuned in dreams knows features as smooth as the model's own predictions. Gain 1 shows it every quirk of every
picture, gain 0 nothing after the first frame.
`python benchmarks/observation_gain.py [--gains 1 0.3 0.1 0] [--policies checkpoints/finetuned] [--skills open_drawer] [--episodes 40]`
"""

from __future__ import annotations

import argparse

import torch

from diwa_core.cli.evaluate import format_rate
from diwa_core.evaluate.evaluation import noise_seed
from diwa_core.evaluate.rollout import run_episode
from diwa_core.evaluate.statistics import success_rate
from diwa_core.policy.store import load_policy
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.skills import start_state
from diwa_core.world_model.filter import LatentFilter


def main() -> None:
    """Print one line per skill and gain; starts of the validation split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-model", default="checkpoints/world_model")
    parser.add_argument("--policies", default="checkpoints/finetuned")
    parser.add_argument("--skills", nargs="+", default=["open_drawer"])
    parser.add_argument("--gains", type=float, nargs="+", default=[1.0, 0.3, 0.1, 0.0])
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the policy's noise")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table, latent_filter = PlayTable(), LatentFilter.load(arguments.world_model)
    print(f"{arguments.policies}, {arguments.episodes} validation starts, noise seed {arguments.seed}")
    for skill in arguments.skills:
        policy, _ = load_policy(f"{arguments.policies}/{skill}", world_model_id=latent_filter.identity)
        starts = [start_state(skill, index, 0, "validation") for index in range(arguments.episodes)]
        for gain in arguments.gains:
            latent_filter.model.rssm.latent.gain = gain
            seeds = [noise_seed(arguments.seed, index) for index in range(arguments.episodes)]
            results = [run_episode(table, latent_filter, policy, skill, *pair) for pair in zip(starts, seeds, strict=True)]
            print(f"{skill:20s} gain {gain:4.2f}  {format_rate(success_rate(sum(r.success for r in results), len(results)))}", flush=True)


if __name__ == "__main__":
    main()
