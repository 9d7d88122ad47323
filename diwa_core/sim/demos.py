"""Demonstrations: noisy, human-like experts from wide training starts; only successes are kept.

`python -m diwa_core.sim.demos --out data/demos --per-skill 20 --seed 3 --workers 2`
An episode begins with a hold on all WARM_UP_FRAMES frames but the last, on which a policy first acts (docs/architecture.md), and ends
with the first frame on which the skill has succeeded.
"""

from __future__ import annotations

import argparse

import numpy as np
from tqdm import tqdm

from diwa_core.contract import Contract, hold_action
from diwa_core.data.store import PlayStore
from diwa_core.errors import DataError
from diwa_core.sim.experts import Expert, Style
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.record import EpisodeRecorder, make_in_order
from diwa_core.sim.skills import SKILLS, SkillOracle, check_skill, start_state

WARM_UP_FRAMES = 4  # frames filtered until a policy acts, on the last of them
MAX_STEPS = 64
DEFAULT_NOISE = 0.6
_ATTEMPTS = 50


def demonstrate(skill: str, number: int, seed: int, noise: float) -> dict[str, np.ndarray]:
    """Demonstration `number` of a skill as arrays [T, ...]; failed attempts are repeated from other starts.

    noise: 0 precise to 1 careless. Raises DataError if no attempt succeeds within MAX_STEPS.
    """
    table = PlayTable()
    try:
        for attempt in range(_ATTEMPTS):
            stream = number * _ATTEMPTS + attempt
            table.reset(options={"state": start_state(skill, stream, seed, "train")})
            episode = _attempt(table, skill, np.random.default_rng([seed, SKILLS.index(skill), stream]), noise)
            if episode is not None:
                return episode
    finally:
        table.close()
    raise DataError(f"{skill}: expected a success in {_ATTEMPTS} attempts of {MAX_STEPS} steps, found none. Use less noise than {noise}.")


def _attempt(table: PlayTable, skill: str, rng: np.random.Generator, noise: float) -> dict[str, np.ndarray] | None:
    """One episode, or None if it fails."""
    recorder, label = EpisodeRecorder(table), SKILLS.index(skill)
    oracle = SkillOracle(skill, recorder.scene_obs)
    for _ in range(WARM_UP_FRAMES - 1):
        recorder.step(hold_action(recorder.robot_obs[14]), label)
    expert = Expert(skill, rng, Style.human(rng, noise))
    expert.start(recorder.robot_obs, recorder.scene_obs)
    for _ in range(MAX_STEPS):
        recorder.step(expert.act(recorder.robot_obs, recorder.target_pose), label)
        if oracle.success(recorder.scene_obs):
            recorder.step(expert.act(recorder.robot_obs, recorder.target_pose), label)
            return recorder.arrays()
        if expert.done:
            return None
    return None


def collect_demonstrations(skill: str, count: int, seed: int, noise: float = DEFAULT_NOISE, workers: int = 1) -> list[dict]:
    """`count` successful episodes of one skill; a longer list begins with a shorter one."""
    jobs = [(check_skill(skill), number, seed, noise) for number in range(count)]
    return list(make_in_order(demonstrate, jobs, workers))


def generate_demonstrations(path: str, per_skill: int, seed: int, noise: float = DEFAULT_NOISE, workers: int = 2) -> PlayStore:
    """Write a store with `per_skill` demonstrations of all eight skills, skill after skill; the same for any number of workers."""
    settings = {"generator": "demonstrations", "seed": seed, "per_skill": per_skill, "noise": noise, "warm_up_frames": WARM_UP_FRAMES}
    store = PlayStore.create(path, Contract(), settings)
    jobs = [(skill, number, seed, noise) for skill in SKILLS for number in range(per_skill)]
    for episode in tqdm(make_in_order(demonstrate, jobs, workers), total=len(jobs), unit="episode", desc="demonstrations"):
        store.append_episode(episode)
    return store


def main() -> None:
    """Command line of the generator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--per-skill", type=int, default=20)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--noise", type=float, default=DEFAULT_NOISE)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    generate_demonstrations(arguments.out, arguments.per_skill, arguments.seed, arguments.noise, arguments.workers)


if __name__ == "__main__":
    main()
