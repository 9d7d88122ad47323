"""The contract: which streams, sizes, rates, action semantics and image path one robot, its data and its models share.

It travels inside every bag, play store and checkpoint; two parts work together only if their contracts are equal.
Letters: A action (7), P proprio vector (27), H W image height and width.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from diwa_core.config import from_dict, to_dict
from diwa_core.errors import ConfigError, ContractError

ROBOT_OBS_SIZE = 15  # tcp xyz 3, tcp euler 3, gripper width 1, arm joints 7, last gripper action 1
TARGET_POSE_SIZE = 6  # commanded tcp xyz 3, euler 3
ACTION_SIZE = 7  # delta xyz 3, delta euler 3, gripper 1; each in [-1, 1]
PROPRIO_SIZE = 27  # robot_obs with rotation as rot6d (18), target pose likewise (9)
IMAGE_SIZE = 64  # side of what the models see, pixels
MAX_IMAGE_SIZE = 16384  # side of what a camera may send, pixels
FIRST_ACTION = np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32)  # what a model is told led into the first frame after a reset


@dataclass(frozen=True)
class ImageStream:
    """One camera: `name` is its key in data sets and checkpoints, `topic` its relative ROS name."""

    name: str
    topic: str
    height: int
    width: int
    encoding: str = "rgb8"


@dataclass(frozen=True)
class Contract:
    """What must be equal between recording, training and serving. Lengths in metres, angles in radians, rates in hertz."""

    name: str = "play_table"
    version: int = 1
    rate_hz: float = 30.0
    images: tuple[ImageStream, ...] = (
        ImageStream("rgb_static", "camera/static/image_raw", 64, 64),
        ImageStream("rgb_gripper", "camera/gripper/image_raw", 64, 64),
    )
    arm_joints: tuple[str, ...] = field(default_factory=lambda: tuple(f"panda_joint{i}" for i in range(1, 8)))
    finger_joints: tuple[str, ...] = ("panda_finger_joint1", "panda_finger_joint2")
    max_delta_m: float = 0.02  # one step at action 1.0, per axis
    max_delta_rad: float = 0.05

    def __post_init__(self) -> None:
        """Raise ConfigError on rates, sizes and steps that nothing can work with."""
        for name in ("rate_hz", "max_delta_m", "max_delta_rad"):
            if not (math.isfinite(getattr(self, name)) and 1e-6 < getattr(self, name) < 1e6):
                raise ConfigError(f"contract.{name}: expected a positive number, found {getattr(self, name)}.")
        names = [stream.name for stream in self.images]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"contract.images: expected at least one camera, each with a name of its own, found {names}.")
        for stream in self.images:
            if not (0 < stream.height <= MAX_IMAGE_SIZE and 0 < stream.width <= MAX_IMAGE_SIZE):
                found = f"{stream.height} x {stream.width}"
                raise ConfigError(f"contract.images: '{stream.name}': expected sides of 1 to {MAX_IMAGE_SIZE} pixels, found {found}.")

    @property
    def step_s(self) -> float:
        """Control period in seconds."""
        return 1.0 / self.rate_hz

    @property
    def identity(self) -> str:
        """First 16 hex digits of the SHA-256 over the contract's canonical JSON."""
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        """Plain mapping for YAML."""
        return to_dict(self)

    @staticmethod
    def from_dict(values: dict) -> Contract:
        """Read a contract written by `to_dict`; raises ConfigError on unknown keys."""
        return from_dict(Contract, values, "contract")

    def difference(self, other: Contract) -> str | None:
        """One sentence naming the first field in which `other` differs, or None if both are equal."""
        mine, theirs = to_dict(self), to_dict(other)
        for key in mine:
            if mine[key] != theirs[key]:
                return f"contract field '{key}': expected {mine[key]}, found {theirs[key]}"
        return None

    def check_image(self, stream: ImageStream, image: np.ndarray) -> None:
        """Raise ContractError unless `image` is uint8 [H, W, 3] of the size the stream declares."""
        expected = (stream.height, stream.width, 3)
        if image.dtype != np.uint8 or image.shape != expected:
            raise ContractError(
                f"image '{stream.name}': expected uint8 {expected}, found {image.dtype} {image.shape}. "
                "Set the camera to that size or make a contract (and retrain) for this one."
            )


@dataclass
class Observation:
    """One frame on the camera clock.

    images: name -> uint8 [H, W, 3]; robot_obs: float64 [15]; target_pose: float64 [6], the commanded TCP pose;
    scene_obs: float64 [24] in simulation, for low-dimensional models only.
    """

    images: dict[str, np.ndarray]
    robot_obs: np.ndarray
    target_pose: np.ndarray
    scene_obs: np.ndarray | None = None

    def validate(self, contract: Contract) -> None:
        """Raise ContractError on a missing view, a wrong size or a value that is not finite."""
        for stream in contract.images:
            if stream.name not in self.images:
                raise ContractError(f"view '{stream.name}' is missing; found {sorted(self.images)}.")
            contract.check_image(stream, self.images[stream.name])
        for name, values, size in (("robot_obs", self.robot_obs, ROBOT_OBS_SIZE), ("target_pose", self.target_pose, TARGET_POSE_SIZE)):
            values = np.asarray(values)
            if values.shape != (size,):
                raise ContractError(f"{name}: expected shape ({size},), found {values.shape}.")
            if not np.isfinite(values).all():
                raise ContractError(f"{name}: expected finite values, found {values}.")


def model_image(image: np.ndarray) -> np.ndarray:
    """The one image path: uint8 [H, W, 3] -> uint8 [64, 64, 3], area interpolation; the recorder, trainer and node all use it."""
    if image.shape[:2] == (IMAGE_SIZE, IMAGE_SIZE):
        return np.ascontiguousarray(image)
    return cv2.resize(image, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)


def rot6d(euler: np.ndarray) -> np.ndarray:
    """Euler xyz (R = Rz Ry Rx) [..., 3] -> first two columns of R, flattened [..., 6] (Zhou et al. 2019)."""
    euler = np.asarray(euler, dtype=np.float64)
    matrix = Rotation.from_euler("xyz", euler.reshape(-1, 3)).as_matrix()
    return np.concatenate([matrix[:, :, 0], matrix[:, :, 1]], axis=-1).reshape(*euler.shape[:-1], 6)


def proprio_vector(robot_obs: np.ndarray, target_pose: np.ndarray) -> np.ndarray:
    """robot_obs [..., 15] and target_pose [..., 6] -> float32 [..., 27], angles as rot6d, not yet normalised.

    Order: tcp xyz 0:3, tcp rot6d 3:9, gripper width 9, arm joints 10:17, last gripper action 17, target xyz 18:21, target rot6d 21:27.
    """
    robot_obs, target_pose = np.asarray(robot_obs), np.asarray(target_pose)
    parts = [robot_obs[..., :3], rot6d(robot_obs[..., 3:6]), robot_obs[..., 6:], target_pose[..., :3], rot6d(target_pose[..., 3:])]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def low_vector(robot_obs: np.ndarray, target_pose: np.ndarray, scene_obs: np.ndarray | None, scene_size: int) -> np.ndarray:
    """Proprio [.., 27] with the first `scene_size` entries of scene_obs behind it, float32; raises ContractError without scene."""
    low = proprio_vector(robot_obs, target_pose)
    if not scene_size:
        return low
    if scene_obs is None:
        raise ContractError("a low-dimensional world model observes scene_obs, which only the simulation has; use one that sees cameras.")
    return np.concatenate([low, np.asarray(scene_obs)[..., :scene_size].astype(np.float32)], -1)


def hold_action(gripper: float) -> np.ndarray:
    """The action that moves nothing: zero deltas and the gripper as it last was (+1 open, -1 close)."""
    return np.array([0, 0, 0, 0, 0, 0, 1.0 if gripper >= 0 else -1.0], dtype=np.float32)
