"""Demonstrations: noisy, human-like experts from wide training starts; only successes are kept.

`python -m diwa_core.sim.demos --out data/demos --per-skill 20 --seed 3 --workers 2`
An episode begins with a hold on all WARM_UP_FRAMES frames but the last, on which a policy first acts (docs/architecture.md), and ends
with the first frame on which the skill has succeeded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from diwa_core.contract import hold_action
from diwa_core.data.store import PlayStore
from diwa_core.errors import DataError, DiwaError
from diwa_core.sim.experts import Expert, Style
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.record import EpisodeRecorder, make_in_order, write_episodes
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
    recorder = EpisodeRecorder(table)
    return recorder.arrays() if demonstrate_on(recorder, skill, rng, noise) else None


def demonstrate_on(recorder: EpisodeRecorder, skill: str, rng: np.random.Generator, noise: float) -> bool:
    """One attempt on `recorder`, which may be a running graph (`diwa_ros.scripted_play`); whether it succeeded."""
    label, oracle = SKILLS.index(skill), SkillOracle(skill, recorder.scene_obs)
    for _ in range(WARM_UP_FRAMES - 1):
        recorder.step(hold_action(recorder.robot_obs[14]), label)
    expert = Expert(skill, rng, Style.human(rng, noise))
    expert.start(recorder.robot_obs, recorder.scene_obs)
    for _ in range(MAX_STEPS):
        recorder.step(expert.act(recorder.robot_obs, recorder.target_pose), label)
        if oracle.success(recorder.scene_obs):
            recorder.step(expert.act(recorder.robot_obs, recorder.target_pose), label)
            return True
        if expert.done:
            return False
    return False


def collect_demonstrations(skill: str, count: int, seed: int, noise: float = DEFAULT_NOISE, workers: int = 1) -> list[dict]:
    """`count` successful episodes of one skill; a longer list begins with a shorter one."""
    jobs = [(check_skill(skill), number, seed, noise) for number in range(count)]
    return list(make_in_order(demonstrate, jobs, workers))


def generate_demonstrations(
    path: str,
    per_skill: int,
    seed: int,
    noise: float = DEFAULT_NOISE,
    workers: int = 2,
    skills: tuple[str, ...] = SKILLS,
    report: Callable[[str, float], None] = lambda stage, done: None,
) -> PlayStore:
    """Write a store with `per_skill` demonstrations of each skill, skill after skill, or the missing part of one that was cut off.

    The same for any number of workers. Raises DataError if `path` holds anything else.
    """
    settings = {"generator": "demonstrations", "seed": seed, "per_skill": per_skill, "noise": noise, "warm_up_frames": WARM_UP_FRAMES}
    if tuple(skills) != SKILLS:
        settings["skills"] = [check_skill(skill) for skill in skills]
    jobs = [(skill, number, seed, noise) for skill in skills for number in range(per_skill)]
    return write_episodes(path, settings, demonstrate, jobs, workers, report)


def main() -> None:
    """Command line of the generator; stopped, the same command goes on."""
    from diwa_core.cli.progress import stage_progress

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--per-skill", type=int, default=20)
    parser.add_argument("--skills", nargs="+", default=SKILLS, choices=SKILLS, metavar="SKILL", help="default: all eight")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--noise", type=float, default=DEFAULT_NOISE)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    try:
        with stage_progress() as progress:
            generate_demonstrations(args.out, args.per_skill, args.seed, args.noise, args.workers, tuple(args.skills), progress)
    except DiwaError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
