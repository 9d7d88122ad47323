"""Serving side of a world model: save, load, and filter one observation after the other into features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diwa_core.checkpoint import load_checkpoint, save_checkpoint
from diwa_core.config import from_dict, to_dict
from diwa_core.contract import FIRST_ACTION, Contract, Observation, low_vector, model_image
from diwa_core.errors import CheckpointError, ContractError
from diwa_core.world_model.model import WorldModel, WorldModelConfig
from diwa_core.world_model.rssm import State

KIND = "world_model"


def save_world_model(
    path: str | Path, model: WorldModel, contract: Contract, lineage: dict, card: dict | None = None, half: bool = False
) -> str:
    """Write a world-model checkpoint; returns its identity."""
    return save_checkpoint(path, KIND, model.state_dict(), to_dict(model.config), contract, lineage, card, half)


def load_world_model(path: str | Path, contract: Contract | None = None, device: str | torch.device = "cpu"):
    """Read a world-model checkpoint: (model in evaluation mode, checkpoint). Raises CheckpointError."""
    checkpoint = load_checkpoint(path, KIND, contract)
    model = WorldModel(from_dict(WorldModelConfig, checkpoint.config, f"{path}: config"))
    try:
        model.load_state_dict(checkpoint.tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: tensors do not fit the configuration in its manifest: {error}") from error
    return model.to(device).eval().requires_grad_(False), checkpoint


class LatentFilter:
    """Filters observations into features, one frame at a time. The same object serves evaluation, demonstrations and the ROS encoder."""

    def __init__(self, model: WorldModel, contract: Contract, identity: str) -> None:
        self.model, self.contract, self.identity = model, contract, identity
        self.warmup_frames = model.config.warmup_frames
        self.generator = torch.Generator(model.device)
        self.reset()

    @staticmethod
    def load(path: str | Path, device: str = "cpu", contract: Contract | None = None) -> LatentFilter:
        """A filter on a checkpoint; raises CheckpointError."""
        model, checkpoint = load_world_model(path, contract, device)
        return LatentFilter(model, checkpoint.contract, checkpoint.identity)

    def reset(self) -> None:
        """Forget everything; the next observation is the first."""
        self.state: State | None = None
        self.action: torch.Tensor | None = None  # [1, A] that led into the last frame, and the embedding [1, E] of that frame
        self.embedding: torch.Tensor | None = None
        self.frames = 0
        self.generator.manual_seed(0)  # categorical posteriors are sampled; serving must repeat itself

    @torch.inference_mode()
    def update(self, observation: Observation, previous_action: np.ndarray | None) -> np.ndarray:
        """Filter one frame; returns the feature float32 [F].

        previous_action [A] is what was really executed since the last frame, None right after a reset. Raises ContractError on a bad
        observation; the state is then unchanged.
        """
        observation.validate(self.contract)
        if (previous_action is None) != (self.state is None):
            raise ContractError("the first frame after a reset has no previous action, every later one needs it.")
        action = FIRST_ACTION if previous_action is None else np.asarray(previous_action, np.float32)
        if action.shape != FIRST_ACTION.shape or not np.isfinite(action).all():
            raise ContractError(f"previous action: expected 7 finite numbers, found {action}.")
        device = self.model.device
        images = {view: torch.from_numpy(model_image(observation.images[view]))[None].to(device) for view in self.model.config.views}
        size = self.model.config.scene_size
        low = torch.from_numpy(low_vector(observation.robot_obs, observation.target_pose, observation.scene_obs, size))[None].to(device)
        self.action, self.embedding = torch.from_numpy(action)[None].to(device), self.model.embed(low, images)
        state = self.model.rssm.initial(1) if self.state is None else self.state
        self.state = self.model.rssm.observe(state, self.action, self.embedding, self.generator)
        self.frames += 1
        return self.state.feature[0].float().cpu().numpy()
