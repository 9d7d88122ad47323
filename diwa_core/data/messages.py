"""What messages mean to the contract, by the fields they have: live ones and those of a bag are read by this code alone; no ROS in here.

Every stream of a contract has a topic, a message type and one way to turn a message into a stamped sample for the FrameAligner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from diwa_core.contract import Contract
from diwa_core.data.alignment import EXECUTED, JOINTS, POSE, TARGET
from diwa_core.errors import ContractError

NANOSECONDS = 1_000_000_000
GIMBAL_LOCK = 1e-7  # cosine of the middle angle
CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1}

Message = Any  # a live message or one read from a bag: only its fields count


class Source(NamedTuple):
    """Where a stream comes from: its relative topic and message type."""

    topic: str
    type: str


def list_sources(contract: Contract) -> dict[str, Source]:
    """The streams an observation is made of, the clock first: name -> source."""
    return {stream.name: Source(stream.topic, "sensor_msgs/msg/Image") for stream in contract.images} | {
        JOINTS: Source("joint_states", "sensor_msgs/msg/JointState"),
        POSE: Source("current_pose", "geometry_msgs/msg/PoseStamped"),
        TARGET: Source("target_pose", "geometry_msgs/msg/PoseStamped"),
        EXECUTED: Source("executed_action", "diwa_interfaces/msg/ExecutedAction"),
    }


class SampleReader:
    """Messages of the contract's streams -> what the FrameAligner takes. `read_image`: sensor_msgs/Image -> uint8 RGB [H, W, 3]."""

    def __init__(self, contract: Contract, read_image: Callable[[Message], np.ndarray]) -> None:
        self.contract, self.read_image = contract, read_image
        self.cameras = {stream.name: stream for stream in contract.images}
        self.step_ns = round(1e9 / contract.rate_hz)

    def stamp_ns(self, name: str, message: Message) -> int:
        """The time a sample belongs to: of an executed action, which is stamped with the start of its step, the end."""
        return to_ns(message.header.stamp) + (self.step_ns if name == EXECUTED else 0)

    def value(self, name: str, message: Message) -> np.ndarray:
        """The sample itself. Raises ContractError on a picture of another size, missing joints or values that are not finite."""
        if name in self.cameras:
            image = self.read_image(message)
            self.contract.check_image(self.cameras[name], image)
            return image
        if name == JOINTS:
            return read_joints(message, self.contract.arm_joints, self.contract.finger_joints)
        return check_finite(name, np.array(message.action, np.float32) if name == EXECUTED else from_pose(message))


def to_ns(stamp: Message) -> int:
    """builtin_interfaces/Time or Duration -> nanoseconds."""
    return stamp.sec * NANOSECONDS + stamp.nanosec


def read_joints(message: Message, arm: tuple[str, ...], fingers: tuple[str, ...]) -> np.ndarray:
    """Arm joints (rad) then gripper width (m), float64 [8]. Raises ContractError on missing joints or values that are not finite."""
    position = dict(zip(message.name, message.position, strict=False))
    missing = [name for name in (*arm, *fingers) if name not in position]
    if missing:
        raise ContractError(f"joint_states: expected joints {', '.join((*arm, *fingers))}; missing are {', '.join(missing)}.")
    return check_finite("joint_states", np.array([*(position[name] for name in arm), sum(position[name] for name in fingers)]))


def check_finite(name: str, values: np.ndarray) -> np.ndarray:
    """Return `values`, or raise ContractError."""
    if not np.isfinite(values).all():
        raise ContractError(f"{name}: expected finite values, found NaN or infinity.")
    return values


def from_pose(message: Message) -> np.ndarray:
    """PoseStamped -> xyz and euler xyz, float64 [6]. A quaternion that is not finite or zero gives NaN, never an exception."""
    position, orientation = message.pose.position, message.pose.orientation
    quaternion = np.array([orientation.x, orientation.y, orientation.z, orientation.w])
    if not np.isfinite(quaternion).all() or np.linalg.norm(quaternion) < 1e-6:
        euler = np.full(3, np.nan)
    else:
        euler = to_euler(Rotation.from_quat(quaternion).as_matrix())
    return np.concatenate([[position.x, position.y, position.z], euler])


def to_euler(matrix: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] -> euler xyz (R = Rz Ry Rx) [3]; at gimbal lock yaw is 0, without the warning SciPy's would print."""
    level = np.hypot(matrix[0, 0], matrix[1, 0])
    pitch = np.arctan2(-matrix[2, 0], level)
    if level < GIMBAL_LOCK:
        return np.array([np.arctan2(-matrix[1, 2], matrix[1, 1]), pitch, 0.0])
    return np.array([np.arctan2(matrix[2, 1], matrix[2, 2]), pitch, np.arctan2(matrix[1, 0], matrix[0, 0])])


def read_image(message: Message) -> np.ndarray:
    """sensor_msgs/Image (rgb8, bgr8 or mono8, rows padded to `step` or not) -> uint8 RGB [H, W, 3].

    A view of the message where no copy is needed. Byte order does not matter to 8-bit images. Raises ContractError.
    """
    check_layout(message)
    channels = CHANNELS[message.encoding]
    rows = np.frombuffer(message.data, dtype=np.uint8, count=message.height * message.step).reshape(message.height, message.step)
    image = rows[:, : message.width * channels].reshape(message.height, message.width, channels)
    if message.encoding == "bgr8":
        return np.ascontiguousarray(image[:, :, ::-1])
    if message.encoding == "mono8":
        return np.repeat(image, 3, axis=2)
    return image


def check_layout(message: Message) -> None:
    """Raise ContractError unless encoding, size, step and data length of an Image belong together."""
    if message.encoding not in CHANNELS:
        raise ContractError(
            f"image encoding: expected one of {', '.join(CHANNELS)}, found '{message.encoding}'. Set the camera driver to rgb8."
        )
    row = message.width * CHANNELS[message.encoding]
    if message.height == 0 or row == 0 or message.step < row:
        raise ContractError(f"image layout: expected rows of at least {row} bytes, found {message.height} rows of step {message.step}.")
    if len(message.data) < message.height * message.step:
        raise ContractError(f"image data: expected {message.height * message.step} bytes, found {len(message.data)}.")
