"""The two Franka arms: joint limits, the manufacturer's motion limits, and kinematics (same links in both)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Modified Denavit-Hartenberg parameters (Craig): a (m), d (m), alpha (rad) of joints 1 to 7, then the flange.
_A_M = (0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088, 0.0)
_D_M = (0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0, 0.107)
_ALPHA_RAD = tuple(np.pi / 2 * np.array((0, -1, 1, 1, -1, 1, 1, 0)))
HAND_YAW_RAD = -np.pi / 4  # the Franka Hand on the flange
HAND_TO_TCP_M = 0.1034  # between the tips of the original fingers


@dataclass(frozen=True)
class Arm:
    """One model. Joint limits in rad [7]; the others are the manufacturer's Cartesian limits in m, rad and s."""

    name: str
    joint_lower: tuple[float, ...]
    joint_upper: tuple[float, ...]
    speed_m_s: float
    acceleration_m_s2: float
    jerk_m_s3: float
    speed_rad_s: float
    acceleration_rad_s2: float
    jerk_rad_s3: float
    server_version: int  # of the robot's interface that the pinned franky-control speaks; 0: none


FR3 = Arm(
    "fr3",
    (-2.9007, -1.8361, -2.9007, -3.0770, -2.8763, 0.4398, -3.0508),
    (2.9007, 1.8361, 2.9007, -0.1169, 2.8763, 4.6216, 3.0508),
    *(3.0, 9.0, 4500.0, 2.5, 17.0, 8500.0),
    server_version=10,
)
FER = Arm(
    "fer",
    (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
    (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
    *(1.7, 13.0, 6500.0, 2.5, 25.0, 12500.0),
    server_version=0,
)
ARMS = {arm.name: arm for arm in (FR3, FER)}


def joint_frames(joints: np.ndarray) -> np.ndarray:
    """Joints (rad) [7] -> frames of joints 1 to 7 and of the flange in the base frame [8, 4, 4]."""
    frames, frame = np.empty((8, 4, 4)), np.eye(4)
    for index, angle in enumerate((*joints, 0.0)):
        a, d, alpha = _A_M[index], _D_M[index], _ALPHA_RAD[index]
        (c, s), (ca, sa) = (np.cos(angle), np.sin(angle)), (np.cos(alpha), np.sin(alpha))
        step = np.array([[c, -s, 0, a], [s * ca, c * ca, -sa, -d * sa], [s * sa, c * sa, ca, d * ca], [0, 0, 0, 1]])
        frame = frame @ step
        frames[index] = frame
    return frames


def tcp_frame(joints: np.ndarray, tcp_in_hand: np.ndarray) -> np.ndarray:
    """Joints (rad) [7] and the TCP in the hand's frame [4, 4] -> the TCP in the base frame [4, 4]."""
    return joint_frames(joints)[7] @ hand_on_flange() @ tcp_in_hand


def tcp_jacobian(joints: np.ndarray, tcp_in_hand: np.ndarray) -> np.ndarray:
    """Base-frame Jacobian of the TCP [6, 7]: linear rows (m/rad), then angular."""
    frames = joint_frames(joints)
    tcp = (frames[7] @ hand_on_flange() @ tcp_in_hand)[:3, 3]
    axes, origins = frames[:7, :3, 2], frames[:7, :3, 3]
    return np.concatenate([np.cross(axes, tcp - origins), axes], axis=1).T


def hand_on_flange() -> np.ndarray:
    """The hand's frame on the flange [4, 4]."""
    frame, (c, s) = np.eye(4), (np.cos(HAND_YAW_RAD), np.sin(HAND_YAW_RAD))
    frame[:2, :2] = [[c, -s], [s, c]]
    return frame
