"""Where the joints of a Franka go when its hand moves: enough to stop before a joint meets its limit.

FER and FR3 share their Denavit-Hartenberg parameters (Craig's convention, Franka's documentation). Letters: J joints (7).
"""

from __future__ import annotations

from math import cos, sin

import numpy as np
from scipy.spatial.transform import Rotation

from diwa_core.control.limits import MotionLimits

A_M = (0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088)
D_M = (0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0)
ALPHA_RAD = (0.0, -np.pi / 2, np.pi / 2, np.pi / 2, -np.pi / 2, np.pi / 2, np.pi / 2)
FLANGE_M, HAND_M = 0.107, 0.1034  # flange behind joint 7, TCP of the hand behind the flange
HAND_YAW_RAD = -np.pi / 4
DAMPING = 0.02  # of the pseudo-inverse: near a singularity joints move fast and this says so without becoming infinite
RESERVE_RAD = 0.02  # for the straight line that the prediction draws


def forward(joints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joints rad [J] -> (TCP position m [3], orientation matrix [3, 3], Jacobian of linear and angular velocity [6, J])."""
    frame, origins, axes = np.eye(4), np.empty((7, 3)), np.empty((7, 3))
    for index, (a, d, alpha, q) in enumerate(zip(A_M, D_M, ALPHA_RAD, joints, strict=True)):
        ca, sa, cq, sq = cos(alpha), sin(alpha), cos(q), sin(q)
        frame = frame @ np.array([[cq, -sq, 0, a], [sq * ca, cq * ca, -sa, -d * sa], [sq * sa, cq * sa, ca, d * ca], [0, 0, 0, 1]])
        origins[index], axes[index] = frame[:3, 3], frame[:3, 2]
    position = frame[:3, 3] + (FLANGE_M + HAND_M) * frame[:3, 2]
    yaw = np.array([[cos(HAND_YAW_RAD), -sin(HAND_YAW_RAD), 0], [sin(HAND_YAW_RAD), cos(HAND_YAW_RAD), 0], [0, 0, 1]])
    return position, frame[:3, :3] @ yaw, np.concatenate([np.cross(axes, position - origins), axes], axis=1).T


def joint_step(jacobian: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Joint motion [J] for a small motion of the hand [6], m and rad: damped least squares."""
    return jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + DAMPING**2 * np.eye(6), step)


class JointGuard:
    """Says whether a motion of the hand keeps every joint its margin away from its limits."""

    def __init__(self, limits: MotionLimits) -> None:
        margin = limits.joint_margin_rad
        self.lower, self.upper = np.array(limits.joint_lower_rad) + margin, np.array(limits.joint_upper_rad) - margin

    def allows(self, joints: np.ndarray, start: np.ndarray, end: np.ndarray) -> bool:
        """Whether the hand may go from `start` to `end`, coordinates [6], when the joints are `joints` rad [J] at the start.

        A joint already inside its margin may come out of it but not go further in.
        """
        turn = Rotation.from_rotvec(end[3:]) * Rotation.from_rotvec(start[3:]).inv()
        after = joints + joint_step(forward(joints)[2], np.concatenate([end[:3] - start[:3], turn.as_rotvec()]))
        deepest = np.maximum(self.depth(joints), -RESERVE_RAD)
        return bool((self.depth(after) <= deepest).all())

    def depth(self, joints: np.ndarray) -> np.ndarray:
        """How far each joint is inside its margin, rad [J]; negative: how far away from it."""
        return np.maximum(self.lower - joints, joints - self.upper)
