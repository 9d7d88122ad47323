"""Demonstrations as training pairs: the features a deployed policy would see, and the actions that were taken.

Letters: N pairs, F feature, H chunk, A action.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diwa_core.contract import FIRST_ACTION, low_vector
from diwa_core.errors import DataError
from diwa_core.policy.behaviour_cloning import chunk_targets
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.rssm import State


@torch.inference_mode()
def filter_episode(model: WorldModel, arrays: dict[str, np.ndarray], seed: int = 0, observed: int | None = None) -> State:
    """Posterior states [T, ..] of one recorded episode from a reset state, as LatentFilter gives them live.

    observed: from so many frames on the model goes on in open loop, as in a dream of the same actions; None: all are observed.
    arrays: robot_obs [T, 15], target_pose [T, 6], actions [T, 7], one uint8 [T, 64, 64, 3] per view, scene_obs for low-dimensional models.
    """
    device = model.device
    low = low_vector(arrays["robot_obs"], arrays["target_pose"], arrays.get("scene_obs"), model.config.scene_size)
    images = {view: torch.from_numpy(np.ascontiguousarray(arrays[view])).to(device) for view in model.config.views}
    embeddings = model.embed(torch.from_numpy(low).to(device), images)
    actions = torch.from_numpy(np.concatenate([FIRST_ACTION[None], arrays["actions"][:-1]]).astype(np.float32)).to(device)
    seen = torch.ones(1, len(low), dtype=torch.bool, device=device)
    seen[:, observed:] &= observed is None
    first = torch.zeros_like(seen)
    generator = torch.Generator(device).manual_seed(seed)
    states, _, _ = model.rssm.unroll(model.rssm.initial(1), actions[None], embeddings[None], first, seen, generator)
    return State(states.h[0], states.z[0])


def demonstration_pairs(model: WorldModel, episodes: list[dict[str, np.ndarray]], horizon: int = 4) -> tuple[Tensor, Tensor]:
    """Features [N, F] and chunks [N, H, A] of all frames after the warm-up, each seen live and dreamt, so that a policy knows both.

    Raises DataError when an episode is shorter than the warm-up.
    """
    skip = model.config.warmup_frames - 1
    features, chunks = [], []
    for number, arrays in enumerate(episodes):
        if len(arrays["actions"]) <= skip + 1:
            raise DataError(f"demonstration {number} has {len(arrays['actions'])} frames; {skip + 2} are the least. Record it again.")
        targets = torch.from_numpy(chunk_targets(arrays["actions"][skip:], [(0, len(arrays["actions"]) - skip)], horizon))
        for observed in (None, model.config.warmup_frames):
            features.append(filter_episode(model, arrays, observed=observed).feature[skip:])
            chunks.append(targets)
    return torch.cat(features).float().cpu(), torch.cat(chunks)
