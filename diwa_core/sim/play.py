"""Play: experts of random skills, aborted attempts, near misses, random reaching and pauses, chained without resets.

`python -m diwa_core.sim.play --frames 120000 --out data/play --seed 1 --workers 2`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from diwa_core.data.store import PlayStore
from diwa_core.errors import DiwaError
from diwa_core.sim.experts import AT_SWITCH, DOWN, Expert, Mover, Style, Waypoint
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.record import EpisodeRecorder, write_episodes
from diwa_core.sim.skills import DRAWER, SKILLS, SLIDER, SWITCH, draw_state, has_room

REACH_LOWER, REACH_UPPER = np.array([-0.30, -0.45, 0.44]), np.array([0.34, -0.02, 0.72])
MAX_SEGMENT_STEPS = 90
_WEIGHTS = {"drawer": 1.25, "slider": 1.5, "lightbulb": 1.25}  # so that each kind of event happens about equally often


@dataclass(frozen=True)
class PlaySettings:
    """Shares of the kinds of segments (the rest is skill attempts) and the length of an episode in frames."""

    episode_frames: int = 2000
    reach_share: float = 0.08
    wiggle_share: float = 0.08
    pause_share: float = 0.03
    abort_share: float = 0.18  # of the skill attempts
    impossible_share: float = 0.06  # of the skill attempts: skills that are already done
    undo_share: float = 0.35  # of the skill attempts: the counterpart of the last one
    button_weight: float = 1.1  # how often the button is tried, beside the other skills
    strength_power: float = 1.8  # 1: careless attempts are as frequent as careful ones; more: rarer
    misjudged_share: float = 0.0  # of the skill attempts: all of the plan is off, so fingers slip past handles
    misjudged_m: float = 0.02


def play_episode(seed: int, number: int, settings: PlaySettings) -> dict[str, np.ndarray]:
    """Play episode `number` of a seed as arrays [T, ...]; depends on nothing else."""
    rng = np.random.default_rng([seed, number])
    table = PlayTable()
    table.reset(options={"state": draw_state(None, rng)})
    recorder = EpisodeRecorder(table)
    play_on(recorder, rng, settings)
    table.close()
    return {name: values[: settings.episode_frames] for name, values in recorder.arrays().items()}


def play_on(recorder: EpisodeRecorder, rng: np.random.Generator, settings: PlaySettings) -> None:
    """Play until `recorder` holds `settings.episode_frames` frames; it may be a running graph (`diwa_ros.scripted_play`)."""
    last: int | None = None
    while len(recorder) < settings.episode_frames:
        kind = rng.random()
        if kind < settings.pause_share:
            _pause(recorder, rng)
        elif kind < settings.pause_share + settings.reach_share:
            _follow(recorder, rng, _random_reach(rng))
        elif kind < settings.pause_share + settings.reach_share + settings.wiggle_share:
            _follow(recorder, rng, _wiggle(recorder.scene_obs, rng))
        else:
            last = _attempt_skill(recorder, rng, settings, last)


def _pause(recorder: EpisodeRecorder, rng: np.random.Generator) -> None:
    gripper = recorder.robot_obs[14]
    for _ in range(int(rng.integers(3, 20))):
        recorder.step(np.array([0, 0, 0, 0, 0, 0, gripper]))


def _follow(recorder: EpisodeRecorder, rng: np.random.Generator, plan: list[Waypoint]) -> None:
    """Follow way-points with a random style and gripper."""
    mover = Mover(rng, Style.human(rng, rng.random()), gripper=1.0 if rng.random() < 0.6 else -1.0)
    mover.follow(plan)
    for _ in range(MAX_SEGMENT_STEPS):
        recorder.step(mover.act(recorder.robot_obs, recorder.target_pose))
        if mover.done:
            return


def _random_reach(rng: np.random.Generator) -> list[Waypoint]:
    """One to three random poses in the workspace."""
    points = rng.uniform(REACH_LOWER, REACH_UPPER, (int(rng.integers(1, 4)), 3))
    return [Waypoint(p, (AT_SWITCH if rng.random() < 0.25 else DOWN) + rng.normal(0, 0.15, 3), via=True) for p in points]


def _wiggle(scene_obs: np.ndarray, rng: np.random.Generator) -> list[Waypoint]:
    """A few random points close to one of the handles: touches, near misses, partial movements both ways."""
    choice = int(rng.integers(4))
    centre, euler = (
        (np.array([0.18, -0.22 - scene_obs[DRAWER], 0.40]), DOWN),
        (np.array([0.04 - scene_obs[SLIDER], 0.0, 0.56]), DOWN),
        (np.array([0.30, 0.0, 0.53]) + scene_obs[SWITCH] * np.array([0, 0.5, 0.87]), AT_SWITCH),
        (np.array([-0.12, -0.12, 0.49]), DOWN),
    )[choice]
    spread = np.array([0.07, 0.06, 0.05])
    return [Waypoint(centre + spread * rng.normal(size=3), euler, via=True) for _ in range(int(rng.integers(2, 6)))]


def _attempt_skill(recorder: EpisodeRecorder, rng: np.random.Generator, settings: PlaySettings, last: int | None) -> int:
    """One attempt of a skill in a random style, sometimes broken off; returns the skill's index."""
    label = _choose_skill(recorder.scene_obs, rng, settings, last)
    strength = 0.0 if rng.random() < 0.2 else 1.2 * rng.random() ** settings.strength_power
    style = Style.human(rng, strength)
    if settings.misjudged_share and rng.random() < settings.misjudged_share:
        style = replace(style, misjudged_m=settings.misjudged_m)
    expert = Expert(SKILLS[label], rng, style)
    expert.start(recorder.robot_obs, recorder.scene_obs)
    limit = int(rng.integers(10, 40)) if rng.random() < settings.abort_share else MAX_SEGMENT_STEPS
    for _ in range(limit):
        recorder.step(expert.act(recorder.robot_obs, recorder.target_pose), label)
        if expert.done:
            break
    return label


def _choose_skill(scene_obs: np.ndarray, rng: np.random.Generator, settings: PlaySettings, last: int | None) -> int:
    """Often the counterpart of the last skill, otherwise a skill that has something to do, now and then any skill."""
    if last is not None and rng.random() < settings.undo_share:
        return last ^ 1  # counterparts are neighbours in SKILLS
    names = [skill for skill in SKILLS if has_room(skill, scene_obs)]
    if rng.random() < settings.impossible_share:
        names = list(SKILLS)
    table = _WEIGHTS | {"led": settings.button_weight}
    weights = np.array([next(weight for part, weight in table.items() if part in skill) for skill in names])
    return SKILLS.index(rng.choice(names, p=weights / weights.sum()))


def generate_play(
    path: str,
    frames: int,
    seed: int,
    workers: int,
    settings: PlaySettings | None = None,
    report: Callable[[str, float], None] = lambda stage, done: None,
) -> PlayStore:
    """Write a play store of at least `frames` frames, or the missing part of one that was cut off; the same for any number of workers.

    Raises DataError if `path` holds anything else.
    """
    settings = settings or PlaySettings()
    jobs = [(seed, number, settings) for number in range(-(-frames // settings.episode_frames))]
    return write_episodes(path, {"generator": "play", "seed": seed, **asdict(settings)}, play_episode, jobs, workers, report)


def main() -> None:
    """Command line of the generator; stopped, the same command goes on."""
    from diwa_core.cli.progress import stage_progress

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=120_000)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    defaults = PlaySettings()
    parser.add_argument("--episode-frames", type=int, default=defaults.episode_frames, help="short episodes show more scenes")
    shares = {
        "button_weight": "how often the button is tried",
        "wiggle_share": "share of random touches at the handles",
        "strength_power": "1: careless attempts are as frequent as careful ones; more: rarer",
        "misjudged_share": "share of attempts of which all of the plan is off",
        "misjudged_m": "by how much, per axis",
    }
    for name, text in shares.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name), help=text)
    arguments = parser.parse_args()
    settings = PlaySettings(arguments.episode_frames, **{name: getattr(arguments, name) for name in shares})
    try:
        with stage_progress() as progress:
            generate_play(arguments.out, arguments.frames, arguments.seed, arguments.workers, settings, progress)
    except DiwaError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
