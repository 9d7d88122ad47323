"""The commanded TCP pose: actions are integrated on it, not on the measured pose, which would droop. What cannot be is cut and counted."""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy.spatial.transform import Rotation

from diwa_core.contract import Contract
from diwa_core.control.kinematics import forward, joint_step
from diwa_core.control.limits import Clamp
from diwa_core.control.motion import to_coordinates
from diwa_core.control.robot_config import RobotConfig


class TargetIntegrator:
    """The pose that the actions so far ask for: xyz (m) and euler xyz (rad) [6] in the world frame, as the simulation integrates it.

    It stays in the workspace and on a leash to the measured pose, so that blocked motion does not wind it up; how it gets there is the
    MotionFilter's affair.
    """

    def __init__(self, config: RobotConfig, contract: Contract) -> None:
        self.config, self.contract = config, contract
        self.counts: Counter[str] = Counter()  # steps cut or refused, by the limit's name
        self.in_a_row = 0  # of them, since the last that was neither
        self.target = np.zeros(6)
        self._lower, self._upper = config.motion.box

    def start(self, pose: np.ndarray) -> None:
        """Begin at the measured pose [6]."""
        self.target = np.array(pose, dtype=np.float64)
        self.in_a_row = 0

    def apply(self, action: np.ndarray, measured: np.ndarray, joints: np.ndarray) -> tuple[np.ndarray, Clamp]:
        """Integrate the deltas of a finite action [7]; measured: TCP pose [6], joints: rad [7].

        Returns what was really applied, as an action, float32 [7], and what changed it.
        """
        limits, step_s = self.config.motion, self.contract.step_s
        scale = np.repeat([self.contract.max_delta_m, self.contract.max_delta_rad], 3)
        wanted = np.asarray(action[:6], np.float64) * scale
        delta = np.concatenate([shorten(wanted[:3], limits.max_speed_m_s * step_s), shorten(wanted[3:], limits.max_speed_rad_s * step_s)])
        clamps = Clamp.NONE if np.array_equal(delta, wanted) else Clamp.RATE
        proposal = self.target + delta
        if limits.leash_m is not None:
            position = measured[:3] + shorten(proposal[:3] - measured[:3], limits.leash_m)
            clamps |= Clamp.NONE if np.array_equal(position, proposal[:3]) else Clamp.LEASH
            proposal[:3] = position
        coordinates = self.to_coordinates(proposal)
        inside = np.clip(coordinates, self._lower, self._upper)
        if not np.array_equal(inside[:3], coordinates[:3]):
            clamps |= Clamp.WORKSPACE
            proposal[:3] = (self.config.base_in_world @ np.append(inside[:3], 1.0))[:3]
        if clamps_turn := self._refuse_turn(proposal, measured, coordinates):
            clamps |= clamps_turn
            proposal[3:] = self.target[3:]
        if self._nears_singularity(proposal, measured, joints):
            clamps |= Clamp.JOINT
            proposal = self.target.copy()
        change = np.concatenate([proposal[:3] - self.target[:3], wrap(proposal[3:] - self.target[3:])])
        self.target = np.concatenate([proposal[:3], wrap(proposal[3:])])
        self.counts.update(clamp.name.lower() for clamp in clamps)
        self.in_a_row = self.in_a_row + 1 if clamps & ~Clamp.RATE else 0
        if not clamps:
            return np.asarray(action, np.float32), clamps
        return np.clip(np.append(change / scale, action[6]), -1.0, 1.0).astype(np.float32), clamps

    def to_coordinates(self, pose: np.ndarray) -> np.ndarray:
        """A pose in the world [6] as coordinates of the MotionFilter [6]."""
        return world_to_coordinates(pose, self.config)

    def _refuse_turn(self, pose: np.ndarray, measured: np.ndarray, coordinates: np.ndarray) -> Clamp:
        """Whether the hand may not turn so far: out of its tilt and yaw, or off the leash. Back is always allowed."""
        before = self.to_coordinates(self.target)
        outside = np.maximum(self._lower - coordinates, coordinates - self._upper)[3:]
        if ((outside > 0) & (outside > np.maximum(self._lower - before, before - self._upper)[3:])).any():
            return Clamp.WORKSPACE
        lead, lead_before = angle_between(pose, measured), angle_between(self.target, measured)
        longest = self.config.motion.leash_rad
        return Clamp.LEASH if longest is not None and lead > longest and lead > lead_before else Clamp.NONE

    def _nears_singularity(self, pose: np.ndarray, measured: np.ndarray, joints: np.ndarray) -> bool:
        """Whether the pose brings a badly conditioned Jacobian nearer, by linear prediction from the present joints."""
        back = self.config.base_in_world[:3, :3].T
        turn = (Rotation.from_euler("xyz", pose[3:]) * Rotation.from_euler("xyz", measured[3:]).inv()).as_rotvec()
        jacobian = forward(joints)[2]
        step = np.concatenate([back @ (pose[:3] - measured[:3]), back @ turn])
        condition = np.linalg.cond(forward(joints + joint_step(jacobian, step))[2])
        return bool(condition > self.config.max_condition and condition > np.linalg.cond(jacobian))


def world_to_coordinates(pose: np.ndarray, config: RobotConfig) -> np.ndarray:
    """A pose in the world, xyz and euler [6] -> coordinates of the MotionFilter, in the base frame [6]."""
    into_base = config.world_in_base
    turn = Rotation.from_matrix(into_base[:3, :3]) * Rotation.from_euler("xyz", pose[3:])
    return to_coordinates((into_base @ np.append(pose[:3], 1.0))[:3], turn, config.motion)


def shorten(vector: np.ndarray, longest: float) -> np.ndarray:
    """`vector`, no longer than `longest`."""
    length = float(np.linalg.norm(vector))
    return vector if length <= longest * (1 + 1e-6) else vector * (longest / length)


def angle_between(a: np.ndarray, b: np.ndarray) -> float:
    """Angle (rad) between the orientations of two poses [6]."""
    return float((Rotation.from_euler("xyz", a[3:]) * Rotation.from_euler("xyz", b[3:]).inv()).magnitude())


def wrap(angle: np.ndarray) -> np.ndarray:
    """Angles in radians into [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
