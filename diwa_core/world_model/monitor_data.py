"""Recorded play for the monitor: what the model expected of every frame, episode by episode, as the running monitor would see it."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import torch
from torch import Tensor

from diwa_core.data.sequences import SequenceIndex, previous_actions
from diwa_core.data.store import PlayStore
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.monitor import compare_sequences
from diwa_core.world_model.train import PlayData

BATCH = 64  # episodes


def measure_play(model: WorldModel, stores: list[PlayStore], max_frames: int | None = None) -> list[np.ndarray]:
    """Residuals [T, K, E] of every episode; one that was recorded twice counts once. Raises DataError when there are none."""
    data = PlayData(stores, model.config, max_frames)
    data.embed(model)
    episodes = drop_copies(data)
    residuals = []
    for start in range(0, len(episodes), BATCH):
        chosen = episodes[start : start + BATCH]
        embeddings, actions = stack_episodes(data, chosen, model.device)
        residuals += [part[: end - begin] for part, (begin, end) in zip(compare_sequences(model, embeddings, actions), chosen, strict=True)]
    return residuals


def drop_copies(data: PlayData) -> list[tuple[int, int]]:
    """(start, end) of the episodes of `data`, each distinct one once."""
    distinct: dict[bytes, tuple[int, int]] = {}
    for start, end in data.episodes:
        content = data.actions[start:end].tobytes() + data.low[start:end].numpy().tobytes()
        distinct.setdefault(hashlib.sha256(content).digest(), (int(start), int(end)))
    if len(distinct) < len(data.episodes):
        logging.getLogger(__name__).warning(
            "%d of %d episodes are copies of others", len(data.episodes) - len(distinct), len(data.episodes)
        )
    return list(distinct.values())


def stack_episodes(data: PlayData, episodes: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """embeddings [B, T, E] and the actions [B, T, A] that led into each frame; shorter episodes repeat their last frame."""
    length = max(end - start for start, end in episodes)
    frames = np.array([np.minimum(np.arange(start, start + length), end - 1) for start, end in episodes])
    first = np.zeros(frames.shape, bool)
    first[:, 0] = True
    actions = previous_actions(data.actions, SequenceIndex(frames, first, ~first))
    return data.embeddings[torch.from_numpy(frames)].to(device), torch.from_numpy(actions).to(device)
