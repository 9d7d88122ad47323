"""Recording a PlayTable frame by frame, and making stores of episodes in parallel that do not depend on the number of workers."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diwa_core.contract import Contract
from diwa_core.data.store import PlayStore
from diwa_core.errors import ConfigError, DataError
from diwa_core.sim.play_table import PlayTable


class EpisodeRecorder:
    """Steps a PlayTable and keeps every frame with the action executed from it."""

    def __init__(self, table: PlayTable):
        self.table = table
        self.frames: list[dict[str, Any]] = []
        self.robot_obs, self.scene_obs, self.target_pose = table.robot_obs, table.scene_obs, table.target_pose

    def step(self, action: np.ndarray, skill: int = -1) -> None:
        """Record the present frame with `action` (gripper thresholded, as executed) and the attempted skill, then step."""
        executed = np.clip(action, -1, 1).astype(np.float32)
        executed[6] = 1.0 if executed[6] >= 0 else -1.0
        frame = {**self.table.observation().images, "robot_obs": self.robot_obs, "scene_obs": self.scene_obs}
        self.frames.append({**frame, "target_pose": self.target_pose, "actions": executed, "skill": skill})
        self.table.apply(executed)
        self.robot_obs, self.scene_obs, self.target_pose = self.table.robot_obs, self.table.scene_obs, self.table.target_pose

    def __len__(self) -> int:
        return len(self.frames)

    def arrays(self) -> dict[str, np.ndarray]:
        """The episode as arrays [T, ...]."""
        return {name: np.stack([frame[name] for frame in self.frames]) for name in self.frames[0]}


def write_episodes(
    path: str | Path, settings: dict, make: Callable[..., Any], jobs: list[tuple], workers: int, report: Callable[[str, float], None]
) -> PlayStore:
    """Write a store with the episode make(*job) of every job; one of the same settings that was cut off gets the missing ones.

    report(settings["generator"], share done). Raises DataError if `path` holds anything else, or more episodes than asked for.
    """
    store = PlayStore.create_or_continue(path, Contract(), settings)
    with store.writing():
        done = len(store.episodes)
        if done > len(jobs):
            raise DataError(f"{path}: expected at most the {len(jobs)} episodes asked for, found {done}. Choose another path or remove it.")
        for number, episode in enumerate(make_in_order(make, jobs[done:], workers), start=done + 1):
            store.append_episode(episode)
            report(settings["generator"], number / len(jobs))
    return store


def make_in_order(make: Callable[..., Any], jobs: list[tuple], workers: int) -> Iterator[Any]:
    """Yield make(*job) for every job in order, computed by `workers` fresh processes (1: here)."""
    if workers < 1:
        raise ConfigError(f"workers: expected at least 1, found {workers}.")
    if workers == 1 or len(jobs) < 2:
        yield from (make(*job) for job in jobs)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        yield from pool.imap(_Call(make), jobs)


class _Call:
    """make(*job) as a picklable callable of one argument."""

    def __init__(self, make: Callable[..., Any]):
        self.make = make

    def __call__(self, job: tuple) -> Any:
        return self.make(*job)
