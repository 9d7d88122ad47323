"""Many play tables in parallel processes, as a Gymnasium vector environment."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv

from diwa_core.errors import ConfigError
from diwa_core.sim.cameras import VIEWS
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.state import SceneState


class StartablePlayTable(PlayTable):
    """A PlayTable whose next resets begin in `start` (None: random), so that each one in a vector can have its own."""

    start: SceneState | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict]:
        """As PlayTable.reset; without options the start state is `start`."""
        if options is None and self.start is not None:
            options = {"state": self.start}
        return super().reset(seed=seed, options=options)


class VectorPlayTable(AsyncVectorEnv):
    """`count` play tables, one process each; observations and actions carry a leading axis [count].

    Raises ConfigError if `count` is below 1 or the number of start states differs from it.
    """

    def __init__(self, count: int, image_size: int | None = 64, views: tuple[str, ...] = VIEWS):
        if count < 1:
            raise ConfigError(f"count: expected at least 1 play table, found {count}.")
        super().__init__([partial(StartablePlayTable, image_size=image_size, views=views)] * count, context="spawn")

    def reset_to(self, states: list[SceneState]) -> tuple[dict[str, np.ndarray], dict]:
        """Reset every table to its own start state."""
        if len(states) != self.num_envs:
            raise ConfigError(f"states: expected {self.num_envs}, one per play table; found {len(states)}.")
        self.set_attr("start", states)
        return self.reset()
