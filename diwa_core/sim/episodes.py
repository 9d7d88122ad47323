"""Episodes of one skill on many play tables in a few processes: warm-up, chunks of actions, the oracle's verdict, the next start.

An episode is that of `evaluate.rollout.run_episode`. A table executes a whole chunk, and begins anew if that ended the episode, before it
answers: the processes meet once per chunk, not once per step.
Letters: B tables, N frames, H chunk, A action.
"""

from __future__ import annotations

import multiprocessing
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from diwa_core.contract import FIRST_ACTION, IMAGE_SIZE, hold_action
from diwa_core.errors import ConfigError, DiwaError
from diwa_core.sim.skills import SkillOracle, check_skill, start_state

Frames = dict[str, np.ndarray]  # time first: views, robot_obs, target_pose, scene_obs, and `actions` that led INTO each frame [N, A]


@dataclass(frozen=True)
class EpisodeSettings:
    """What all tables have in common. Start states are those of (skill, n, seed, split), a new n for every episode."""

    skill: str
    seed: int
    warmup_frames: int
    max_chunks: int
    views: tuple[str, ...]  # rendered; none is much faster
    split: str = "train"


@dataclass
class ChunkResult:
    """What one chunk did on one table. `frames`: after each executed action; `fresh`: the next episode's warm-up if this one ended."""

    frames: Frames
    success: bool
    truncated: bool
    fresh: Frames | None

    @property
    def steps(self) -> int:
        """Simulator steps taken, those of the next warm-up included (its first frame takes none)."""
        return len(self.frames["actions"]) + (len(self.fresh["actions"]) - 1 if self.fresh else 0)


@dataclass
class EpisodeState:
    """Where a table is, as its history: episode `number` after `actions` [T, A]; the observations prove a replay."""

    number: int
    chunks: int
    actions: np.ndarray
    robot_obs: np.ndarray
    scene_obs: np.ndarray


class EpisodeTable:
    """One play table that runs the episodes `first`, `first + stride`, ..."""

    def __init__(self, settings: EpisodeSettings, first: int, stride: int) -> None:
        from diwa_core.sim.play_table import PlayTable  # loads PyBullet, which only the processes with tables need

        self.settings, self.stride = settings, stride
        self.number, self.chunks = first - stride, 0
        self.table = PlayTable(IMAGE_SIZE if settings.views else None, settings.views)

    def begin(self) -> Frames:
        """Go to the next start state and hold through the warm-up; returns its frames, on the last of which a policy acts."""
        self._go_to_start(self.number + self.stride)
        rows = [self._frame(self.first_observation, FIRST_ACTION)]
        while len(rows) < self.settings.warmup_frames:
            rows.append(self._step(hold_action(rows[-1]["robot_obs"][14])))
        return _stack(rows)

    def run(self, chunk: np.ndarray) -> ChunkResult:
        """Execute `chunk` [H, A] until it ends or the skill has succeeded; begins the next episode where this one is over."""
        rows, success = [], False
        for action in chunk:
            rows.append(self._step(action))
            success = self.oracle.success(rows[-1]["scene_obs"])
            if success:
                break
        self.chunks += 1
        truncated = self.chunks >= self.settings.max_chunks and not success
        return ChunkResult(_stack(rows), success, truncated, self.begin() if success or truncated else None)

    def save(self) -> EpisodeState:
        """The state, for `restore` on this or another table of the same settings."""
        snapshot = self.table.save_state()
        return EpisodeState(self.number, self.chunks, snapshot.actions, snapshot.robot_obs, snapshot.scene_obs)

    def restore(self, state: EpisodeState) -> None:
        """Replay to `state`; raises DataError if the replay ends elsewhere (another PyBullet or machine type)."""
        from diwa_core.sim.play_table import Snapshot

        start = self._go_to_start(state.number)
        self.chunks = state.chunks
        self.table.restore_state(Snapshot(start, state.actions, state.robot_obs, state.scene_obs))

    def close(self) -> None:
        """Disconnect the physics."""
        self.table.close()

    def _go_to_start(self, number: int):
        self.number, self.chunks = number, 0
        start = start_state(self.settings.skill, number, self.settings.seed, self.settings.split)
        self.first_observation, _ = self.table.reset(options={"state": start})
        self.oracle = SkillOracle(self.settings.skill, self.first_observation["scene_obs"])
        return start

    def _step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        return self._frame(self.table.step(action)[0], action)

    @staticmethod
    def _frame(observation: dict[str, np.ndarray], action: np.ndarray) -> dict[str, np.ndarray]:
        return {**observation, "actions": np.asarray(action, np.float32)}


def _stack(rows: list[dict[str, np.ndarray]]) -> Frames:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class EpisodePool:
    """`batch` EpisodeTables in `workers` processes (1: here); results do not depend on their number. Table b runs episodes b, b + B, ...

    Use as a context, or call `close`. Raises ConfigError on an unknown skill or numbers below 1.
    """

    def __init__(self, settings: EpisodeSettings, batch: int, workers: int) -> None:
        check_skill(settings.skill)
        if batch < 1 or workers < 1:
            raise ConfigError(f"play tables: expected at least one table and one process, found {batch} and {workers}.")
        self.settings, self.batch, workers = settings, batch, min(workers, batch)
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        self._tables = [EpisodeTable(settings, i, batch) for i in range(batch)] if workers == 1 else []
        self._shares = [range(i, batch, workers) for i in range(workers)] if workers > 1 else []
        for share in self._shares:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, settings, share, batch), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def begin(self) -> list[Frames]:
        """Start the next episode on every table."""
        return self._call("begin", [()] * self.batch)

    def run(self, chunks: np.ndarray) -> list[ChunkResult]:
        """Execute executable `chunks` [B, H, A], one on each table."""
        return self._call("run", [(chunk,) for chunk in chunks])

    def save(self) -> list[EpisodeState]:
        """The state of every table."""
        return self._call("save", [()] * self.batch)

    def restore(self, states: list[EpisodeState]) -> None:
        """Bring every table to its saved state; raises DataError where a replay ends elsewhere."""
        self._call("restore", [(state,) for state in states])

    def _call(self, method: str, arguments: list[tuple]) -> list:
        if self._tables:
            return _call_each(self._tables, method, arguments)
        results: list[Any] = [None] * self.batch
        try:
            for pipe, share in zip(self._pipes, self._shares, strict=True):
                pipe.send((method, [arguments[i] for i in share]))
            answers = [pipe.recv() for pipe in self._pipes]
        except (EOFError, OSError) as error:
            raise DiwaError(
                f"simulation: expected an answer from every process, one ended ({error or type(error).__name__}). "
                "If memory was short, use fewer tables or processes."
            ) from error
        for share, answer in zip(self._shares, answers, strict=True):
            if isinstance(answer, Exception):
                raise answer
            for i, result in zip(share, answer, strict=True):
                results[i] = result
        return results

    def close(self) -> None:
        """End the processes; closing twice is harmless."""
        for table in self._tables:
            table.close()
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()
        self._pipes, self._processes, self._tables = [], [], []

    def __enter__(self) -> EpisodePool:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _call_each(tables: list[EpisodeTable], method: str, arguments: list[tuple]) -> list:
    return [getattr(table, method)(*values) for table, values in zip(tables, arguments, strict=True)]


def _serve(pipe: Connection, settings: EpisodeSettings, share: range, batch: int) -> None:
    """The life of one process: answers calls until the pool is closed or gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that owns the pool
    tables = [EpisodeTable(settings, i, batch) for i in share]
    try:
        while True:
            method, arguments = pipe.recv()
            try:
                pipe.send(_call_each(tables, method, arguments))
            except DiwaError as error:
                pipe.send(error)
    except (EOFError, OSError):  # the pool is closed
        for table in tables:
            table.close()
