"""Behaviour cloning: a diffusion policy from world-model features and the actions of demonstrations.

Letters: N pairs, T frames, E episodes, F feature, H chunk, A action.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diwa_core.contract import hold_action
from diwa_core.errors import DataError
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig

logger = logging.getLogger(__name__)
MIN_PAIRS = 64


@dataclass(frozen=True)
class BCConfig:
    """Training of a base policy. The paper: lr 1e-4, 5,000 epochs (about 30,000 updates), EMA every 10 updates after epoch 20.

    The defaults are for 1,500 pairs and half a minute on one core (18 ms an update at F = 640): with so few updates a rate of 1e-3
    leaves sampled actions 0.26 from the expert's where 1e-4 leaves 0.33 (rms, held-out, a synthetic task); more updates add little.
    """

    updates: int = 1500
    batch: int = 256
    lr: float = 1e-3
    final_lr: float = 1e-5  # reached by a cosine
    weight_decay: float = 1e-6
    ema_decay: float = 0.995
    ema_start: int = 200  # updates
    ema_every: int = 1  # updates


def chunk_targets(actions: np.ndarray, episodes: list[tuple[int, int]] | np.ndarray, horizon: int = 4) -> np.ndarray:
    """For every frame of every episode the next `horizon` actions, float32 [N, H, A].

    actions [T, A]; episodes: pairs (first frame, one past the last). Row order: episode by episode, frame by frame.
    Past the end of an episode the arm holds: zero deltas, the gripper as it last was. Raises DataError on empty or foreign bounds.
    """
    actions = np.asarray(actions, dtype=np.float32)
    chunks = []
    for start, end in episodes:
        if not 0 <= start < end <= len(actions):
            raise DataError(
                f"episode bounds: expected 0 <= start < end <= {len(actions)}, found ({start}, {end}). Check the index of the store."
            )
        hold = hold_action(actions[end - 1, -1])
        padded = np.concatenate([actions[start:end], np.tile(hold, (horizon - 1, 1))])
        chunks.append(np.lib.stride_tricks.sliding_window_view(padded, horizon, axis=0).transpose(0, 2, 1))
    return np.concatenate(chunks)


def train_policy(
    features: Tensor,
    chunks: Tensor,
    policy_config: PolicyConfig,
    config: BCConfig = BCConfig(),
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> DiffusionPolicy:
    """Clone features [N, F] -> chunks [N, H, A] and return the policy with averaged weights, in evaluation mode, on `device`.

    progress(update, loss) is called after every update. The result depends on nothing but the arguments and the kind of device.
    Raises DataError on too few pairs, foreign shapes or values, or a loss that is not finite.
    """
    _check_pairs(features, chunks, policy_config)
    features, chunks = features.to(device, torch.float32), chunks.to(device, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = DiffusionPolicy(replace(policy_config, finetuned_steps=0)).to(device)
    policy.set_feature_statistics(features)
    average = copy.deepcopy(policy)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    for update in range(config.updates):
        cosine = 0.5 * (1 + math.cos(math.pi * update / config.updates))
        optimiser.param_groups[0]["lr"] = config.final_lr + (config.lr - config.final_lr) * cosine
        rows = torch.randint(len(features), (config.batch,), generator=generator).to(device)
        loss = policy.loss(chunks[rows], features[rows], generator)
        if not torch.isfinite(loss):
            raise DataError(
                f"behaviour cloning: loss is {loss.item()} at update {update}. Lower lr (now {config.lr}) or look at the features."
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        _update_average(average, policy, update, config)
        if progress is not None:
            progress(update + 1, loss.item())
    logger.info("behaviour cloning: %d pairs, %d updates, last loss %.4f", len(features), config.updates, loss.item())
    return average.eval().requires_grad_(False)


@torch.no_grad()
def _update_average(average: DiffusionPolicy, policy: DiffusionPolicy, update: int, config: BCConfig) -> None:
    """Copy the weights until `ema_start`, then move the average a little towards them."""
    if update < config.ema_start:
        average.load_state_dict(policy.state_dict())
    elif update % config.ema_every == 0:
        for mean, value in zip(average.parameters(), policy.parameters(), strict=True):
            mean.lerp_(value, 1 - config.ema_decay)


def _check_pairs(features: Tensor, chunks: Tensor, config: PolicyConfig) -> None:
    if len(features) < MIN_PAIRS:
        raise DataError(
            f"behaviour cloning: expected at least {MIN_PAIRS} pairs, found {len(features)}. Record more demonstrations of the skill."
        )
    expected = (len(features), config.feature_size), (len(features), config.horizon, config.action_size)
    if (tuple(features.shape), tuple(chunks.shape)) != expected:
        raise DataError(
            f"behaviour cloning: expected features and chunks of shapes {expected}, found {tuple(features.shape)}, {tuple(chunks.shape)}."
        )
    if not torch.isfinite(features).all() or not torch.isfinite(chunks).all() or chunks.abs().max() > 1:
        raise DataError(
            "behaviour cloning: expected finite features and actions in [-1, 1], found others. Clip the actions of the demonstrations."
        )
