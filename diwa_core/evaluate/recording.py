"""Recorded episodes of policies as a play store: to measure world models and classifiers on, or to refit them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diwa_core.contract import Contract
from diwa_core.data.store import PlayStore
from diwa_core.evaluate.rollout import EpisodeResult
from diwa_core.sim.skills import SKILLS

GENERATOR = "evaluation"


def create_rollout_store(path: str | Path, split: str, seed: int) -> PlayStore:
    """An empty store for episodes on starts of `split`. Raises DataError when something lies at `path`."""
    return PlayStore.create(path, Contract(), {"generator": GENERATOR, "split": split, "seed": seed})


def append_rollout(store: PlayStore, result: EpisodeResult) -> None:
    """Append a recorded episode, every frame marked with its skill; its frames are dropped from `result`, which need the memory."""
    skill = np.full(len(result.frames["actions"]), SKILLS.index(result.skill), np.int8)
    store.append_episode({**result.frames, "skill": skill})
    result.frames = {}


def count_steps(store: PlayStore) -> int:
    """Simulator steps in recorded episodes, warm-ups included."""
    return len(store) - len(store.episodes)


def spent_steps(stores: list[PlayStore], *lineages: dict[str, Any]) -> dict[str, int]:
    """Environment steps by store (content hash): of those of `stores` that hold episodes of policies, and those that `lineages` spent.

    Play costs none. What was spent twice on the same store counts once.
    """
    spent = {store.content_hash: count_steps(store) for store in stores if store.settings.get("generator") == GENERATOR}
    for lineage in lineages:
        spent |= lineage.get("rollouts", {})
    return spent
