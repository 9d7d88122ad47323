"""One episode of a policy in the simulator: what an evaluation, with or without ROS, counts as an episode (docs/architecture.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from diwa_core.contract import Observation, hold_action
from diwa_core.policy.diffusion import DiffusionPolicy
from diwa_core.sim.skills import SkillOracle
from diwa_core.sim.state import SceneState
from diwa_core.world_model.filter import LatentFilter

if TYPE_CHECKING:
    from diwa_core.sim.play_table import PlayTable  # loads PyBullet, which announces itself on stdout

MAX_STEPS = 72
AFTER_SUCCESS = 8  # steps recorded after a success: a dream that is a few frames behind is still right


@dataclass
class EpisodeResult:
    """Outcome of one episode. `steps`: policy steps until success or the cap; `frames`: recorded arrays, time first, if asked for."""

    skill: str
    success: bool
    steps: int
    final_scene_obs: np.ndarray
    frames: dict[str, np.ndarray] = field(default_factory=dict)


def episode_generator(seed: int) -> torch.Generator:
    """The policy's noise of one episode: the same on every machine and in the ROS graph."""
    return torch.Generator("cpu").manual_seed(seed)


def executable(action: np.ndarray) -> np.ndarray:
    """A policy's action as the robot executes it: deltas clipped to [-1, 1], gripper exactly -1 or +1."""
    action = np.clip(np.asarray(action, np.float32), -1, 1)
    action[..., 6] = np.where(action[..., 6] >= 0, 1.0, -1.0)
    return action


def run_episode(
    env: PlayTable,
    latent_filter: LatentFilter,
    policy: DiffusionPolicy,
    skill: str,
    start_state: SceneState,
    seed: int,
    max_steps: int = MAX_STEPS,
    record: bool = False,
) -> EpisodeResult:
    """Reset to `start_state`, warm the filter up, then let the policy act until the oracle says success or `max_steps` is reached."""
    env.reset(options={"state": start_state})
    latent_filter.reset()
    oracle = SkillOracle(skill, env.scene_obs)
    generator = episode_generator(seed)
    recorder = _Recorder() if record else None
    chunk: list[np.ndarray] = []
    previous, steps, tail = None, 0, AFTER_SUCCESS if record else 0
    result: EpisodeResult | None = None
    while True:
        observation = env.observation()
        if latent_filter.model.config.scene_size:  # a low-dimensional world model sees the scene's true state
            observation.scene_obs = env.scene_obs
        feature = latent_filter.update(observation, previous)
        if latent_filter.frames < latent_filter.warmup_frames:
            action = hold_action(observation.robot_obs[14])
        else:
            if not chunk:
                sample = policy.sample(torch.from_numpy(feature)[None], generator=generator)[0]
                chunk = list(executable(sample.cpu().numpy()))
            action = chunk.pop(0)
            steps += 1
        if recorder:
            recorder.add(observation, env.scene_obs, action)
        env.apply(action)
        previous = action
        if result is None:
            success = bool(steps > 0 and oracle.success(env.scene_obs))
            if success or steps >= max_steps:
                result = EpisodeResult(skill, success, steps, np.array(env.scene_obs))
        if result is not None and (not result.success or tail == 0):
            break
        tail -= result is not None
    if recorder:
        recorder.add(env.observation(), env.scene_obs, hold_action(action[6]))
        result.frames = recorder.arrays()
    return result


class _Recorder:
    """Collects frames in the play store's fields."""

    def __init__(self) -> None:
        self.rows: dict[str, list[np.ndarray]] = {}

    def add(self, observation: Observation, scene_obs: np.ndarray, action: np.ndarray) -> None:
        """Keep one frame and the action taken on it."""
        row = {
            **observation.images,
            "robot_obs": observation.robot_obs,
            "target_pose": observation.target_pose,
            "scene_obs": scene_obs,
            "actions": action,
        }
        for name, value in row.items():
            self.rows.setdefault(name, []).append(np.array(value))

    def arrays(self) -> dict[str, np.ndarray]:
        """All frames as arrays, time first."""
        return {name: np.stack(values) for name, values in self.rows.items()}
