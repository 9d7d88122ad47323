"""Sampling training sequences from play: random windows, or streams whose state is carried from batch to batch.

Every batch is a function of (seed, step) alone, so a resumed training sees what the killed one would have seen.
Letters: B batch, T time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from diwa_core.contract import FIRST_ACTION
from diwa_core.errors import DataError


@dataclass
class SequenceIndex:
    """frames [B, T] into the play arrays; first [B, T]: the state is reset before that frame; observed [B, T]: else open loop."""

    frames: np.ndarray
    first: np.ndarray
    observed: np.ndarray

    def __getitem__(self, rows: slice) -> SequenceIndex:
        """Some of the sequences."""
        return SequenceIndex(self.frames[rows], self.first[rows], self.observed[rows])


@dataclass(frozen=True)
class WindowSampler:
    """Random windows inside episodes: a filtered prefix of random length, then open loop.

    episodes: (start, end) pairs, end exclusive. `prefix` = (shortest, longest) number of observed frames at a window's start.
    `events` [N]: weights of frames; `event_share` of the windows have such a frame in their open-loop part.
    """

    episodes: list[tuple[int, int]]
    batch: int
    length: int
    prefix: tuple[int, int]
    seed: int
    events: np.ndarray | None = None
    event_share: float = 0.0

    def __post_init__(self) -> None:
        if not any(end - start >= self.length for start, end in self.episodes):
            longest = max((end - start for start, end in self.episodes), default=0)
            raise DataError(
                f"training windows need {self.length} frames, the longest episode has {longest}. Record longer play or shorten 'horizon'."
            )

    @cached_property
    def _usable(self) -> tuple[np.ndarray, np.ndarray]:
        """First window start and one past the last [E, 2] of episodes that are long enough, and the running count of starts [E]."""
        usable = np.array([(start, end - self.length + 1) for start, end in self.episodes if end - start >= self.length])
        return usable, np.cumsum(usable[:, 1] - usable[:, 0])

    @cached_property
    def _event_mass(self) -> np.ndarray:
        """Running sum of the events' weights [N], without those in episodes that are too short."""
        inside = np.zeros(len(self.events), bool)
        for start, end in self._usable[0]:
            inside[start : end + self.length - 1] = True
        return np.cumsum(np.where(inside, self.events, 0.0), dtype=np.float64)

    def sample(self, step: int) -> SequenceIndex:
        """The batch of training step `step`."""
        rng = np.random.default_rng([self.seed, step])
        usable, counts = self._usable
        draw = rng.integers(counts[-1], size=self.batch)
        episode = np.searchsorted(counts, draw, side="right")
        starts = usable[episode, 1] - (counts[episode] - draw)
        if self.events is not None and self._event_mass[-1] > 0:
            chosen = rng.random(self.batch) < self.event_share
            starts = np.where(chosen, self._around_events(rng), starts)
        frames = starts[:, None] + np.arange(self.length)
        first = np.zeros(frames.shape, bool)
        first[:, 0] = True
        prefixes = rng.integers(self.prefix[0], self.prefix[1] + 1, size=self.batch)
        return SequenceIndex(frames, first, np.arange(self.length) < prefixes[:, None])

    def _around_events(self, rng: np.random.Generator) -> np.ndarray:
        """Window starts [B] so that an event lies somewhere behind the prefix."""
        mass = self._event_mass
        event = np.searchsorted(mass, rng.random(self.batch) * mass[-1], side="right")
        usable = self._usable[0]
        episode = np.searchsorted(usable[:, 0], event, side="right") - 1
        wanted = event - rng.integers(min(self.prefix[1], self.length - 1), self.length, size=self.batch)
        return np.clip(wanted, usable[episode, 0], usable[episode, 1] - 1)


@dataclass(frozen=True)
class StreamSampler:
    """B parallel readers walk through the play; the trainer carries each reader's state on (DiWA's recipe).

    `reset_probability` per frame forgets the state at random, so that the model also learns to start.
    """

    episodes: list[tuple[int, int]]
    batch: int
    length: int
    reset_probability: float
    seed: int

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """All frames of all episodes in a row, and which of them begin an episode."""
        order = np.concatenate([np.arange(start, end) for start, end in self.episodes])
        begins = np.zeros(len(order), bool)
        begins[np.cumsum([0] + [end - start for start, end in self.episodes[:-1]])] = True
        return order, begins

    def sample(self, step: int) -> SequenceIndex:
        """The batch of training step `step`: frames continue those of step - 1."""
        order, begins = self._order
        offsets = np.random.default_rng([self.seed]).integers(len(order), size=self.batch)
        position = (offsets[:, None] + step * self.length + np.arange(self.length)) % len(order)
        random_resets = np.random.default_rng([self.seed, step]).random(position.shape) < self.reset_probability
        first = begins[position] | random_resets
        if step == 0:
            first[:, 0] = True
        return SequenceIndex(order[position], first, np.ones(position.shape, bool))


def previous_actions(actions: np.ndarray, index: SequenceIndex) -> np.ndarray:
    """The action that led into each frame, float32 [B, T, A]; zeros with the gripper open where the state is reset.

    actions [N, A]: the action executed from frame n to n + 1.
    """
    previous = actions[np.maximum(index.frames - 1, 0)].astype(np.float32)
    previous[index.first] = FIRST_ACTION
    return previous
