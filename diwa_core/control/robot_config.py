"""One YAML for one robot: address, tool, limits, gains, gripper and rates. Every name carries its unit; every value is checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from diwa_core.config import load_yaml
from diwa_core.contract import Contract
from diwa_core.control.kinematics import HAND_M, HAND_YAW_RAD
from diwa_core.control.limits import ARMS, MotionLimits, read_limits
from diwa_core.errors import ConfigError

Vector = tuple[float, ...]
MAX_FRICTION_NM = 1.5


@dataclass(frozen=True)
class Impedance:
    """Gains of the Cartesian impedance tracker. The clips bound force and torque: it has no other watch over a wild target."""

    translational_n_m: float = 600.0
    rotational_nm_rad: float = 40.0
    error_clip_m: float = 0.03
    error_clip_rad: float = 0.15
    friction_nm: Vector = (0.0,) * 7  # of each joint, added along its motion; less than the joint has, or the arm creeps


@dataclass(frozen=True)
class Tool:
    """TCP in the frame of the Franka Hand, and what hangs on the flange besides the hand that Desk knows of."""

    tcp_in_hand_m: Vector = (0.0, 0.0, HAND_M)
    load_kg: float = 0.0
    load_centre_in_flange_m: Vector = (0.0, 0.0, 0.0)
    load_inertia_kg_m2: Vector = (0.0, 0.0, 0.0)  # diagonal


@dataclass(frozen=True)
class Collision:
    """Above these the robot stops with a reflex. 20 N is careful, 40 for contact tasks."""

    torque_nm: float = 20.0
    force_n: float = 20.0


@dataclass(frozen=True)
class Gripper:
    """The Franka Hand; `present: false` for another tool, whose gripper action is ignored."""

    present: bool = True
    speed_m_s: float = 0.1
    force_n: float = 30.0
    debounce_samples: int = 3
    dwell_s: float = 0.5  # shortest time between two commands
    timeout_s: float = 5.0  # a command without an answer for this long is reported


@dataclass(frozen=True)
class RobotConfig:
    """One robot. `streaming`: impedance (torques, compliant) or cartesian (position, stiff)."""

    address: str = "172.16.0.2"
    model: str = "fr3"
    realtime: str = "enforce"  # enforce: refuse without a real-time kernel; ignore: simulators only
    streaming: str = "impedance"
    connect_timeout_s: float = 5.0
    stream_hz: float = 100.0
    state_hz: float = 50.0
    release_after_s: float = 2.0  # without a command the arm leaves the streaming controller and is held by the robot itself
    reflex_recovery: bool = False  # true: recover by ourselves from ONE reflex per run; never from a user stop
    base_position_m: Vector = (0.0, 0.0, 0.0)  # of the robot's base in the world frame
    base_yaw_rad: float = 0.0
    home_joints_rad: Vector = (0.0, -0.7854, 0.0, -2.3562, 0.0, 1.5708, 0.7854)
    max_condition: float = 60.0  # of the hand's Jacobian, lengths in metres: how near a singularity may be
    stop_after_refusals: int = 90  # steps in a row that a limit cut or refused
    limits: dict[str, Any] = field(default_factory=dict)  # what differs from the model's profile (diwa_core.control.limits)
    impedance: Impedance = field(default_factory=Impedance)
    tool: Tool = field(default_factory=Tool)
    collision: Collision = field(default_factory=Collision)
    gripper: Gripper = field(default_factory=Gripper)

    @cached_property
    def motion(self) -> MotionLimits:
        """Limits of motion, in the frame of the robot's base. Raises ConfigError, also above what the maker allows."""
        return read_limits({"profile": self.model, **self.limits}, Contract())

    @cached_property
    def base_in_world(self) -> np.ndarray:
        """[4, 4]."""
        frame = np.eye(4)
        frame[:3, :3] = Rotation.from_euler("z", self.base_yaw_rad).as_matrix()
        frame[:3, 3] = self.base_position_m
        return frame

    @cached_property
    def world_in_base(self) -> np.ndarray:
        """[4, 4]."""
        return np.linalg.inv(self.base_in_world)

    @property
    def tcp_in_flange(self) -> np.ndarray:
        """[4, 4]: the hand is turned on the flange."""
        frame = np.eye(4)
        frame[:3, :3] = Rotation.from_euler("z", HAND_YAW_RAD).as_matrix()
        frame[:3, 3] = frame[:3, :3] @ self.tool.tcp_in_hand_m
        return frame

    def validate(self) -> None:
        """Raise ConfigError naming the first value that is out of range, or that exceeds what the arm itself allows."""
        for name, choices in (("model", tuple(ARMS)), ("realtime", ("enforce", "ignore")), ("streaming", ("impedance", "cartesian"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found '{getattr(self, name)}'.")
        if not self.address or any(character.isspace() for character in self.address):
            raise ConfigError(f"address: expected a host name or IP address, found '{self.address}'.")
        for where, name, low, high in _RANGES:
            part = getattr(self, where) if where else self
            _check_range(f"{where}.{name}".lstrip("."), getattr(part, name), low, high)
        if self.limits.get("profile", self.model) != self.model:
            raise ConfigError(f"limits.profile: expected the model, {self.model}, found '{self.limits['profile']}'. Leave it out.")
        self._check_vectors()

    def _check_vectors(self) -> None:
        sizes = {
            "base_position_m": (self.base_position_m, 3),
            "home_joints_rad": (self.home_joints_rad, 7),
            "tool.tcp_in_hand_m": (self.tool.tcp_in_hand_m, 3),
            "tool.load_centre_in_flange_m": (self.tool.load_centre_in_flange_m, 3),
            "tool.load_inertia_kg_m2": (self.tool.load_inertia_kg_m2, 3),
            "impedance.friction_nm": (self.impedance.friction_nm, 7),
        }
        for name, (values, size) in sizes.items():
            if len(values) != size or not np.isfinite(values).all():
                raise ConfigError(f"{name}: expected {size} finite numbers, found {list(values)}.")
        for index, friction_nm in enumerate(self.impedance.friction_nm, 1):
            _check_range(f"impedance.friction_nm of joint {index}", friction_nm, 0.0, MAX_FRICTION_NM)
        limits = self.motion
        joints = zip(self.home_joints_rad, limits.joint_lower_rad, limits.joint_upper_rad, strict=True)
        for index, (angle, low, high) in enumerate(joints, 1):
            _check_range(f"home_joints_rad of joint {index}", angle, low + limits.joint_margin_rad, high - limits.joint_margin_rad)


_RANGES = (  # part, name, lowest, highest
    ("", "connect_timeout_s", 0.5, 60.0),
    ("", "stream_hz", 50.0, 500.0),
    ("", "state_hz", 5.0, 200.0),
    ("", "release_after_s", 0.2, 60.0),
    ("", "base_yaw_rad", -np.pi, np.pi),
    ("", "max_condition", 5.0, 500.0),
    ("", "stop_after_refusals", 1, 100000),
    ("impedance", "translational_n_m", 50.0, 2000.0),
    ("impedance", "rotational_nm_rad", 5.0, 150.0),
    ("impedance", "error_clip_m", 0.005, 0.05),
    ("impedance", "error_clip_rad", 0.02, 0.3),
    ("tool", "load_kg", 0.0, 3.0),
    ("collision", "torque_nm", 5.0, 60.0),
    ("collision", "force_n", 5.0, 60.0),
    ("gripper", "speed_m_s", 0.01, 0.1),
    ("gripper", "force_n", 1.0, 70.0),
    ("gripper", "debounce_samples", 1, 30),
    ("gripper", "dwell_s", 0.0, 5.0),
    ("gripper", "timeout_s", 0.5, 60.0),
)


def load_robot_config(path: str | Path) -> RobotConfig:
    """Read and check a robot's YAML. Raises ConfigError naming the file and the value."""
    config = load_yaml(RobotConfig, path)
    try:
        config.validate()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}: expected {low:g} to {high:g}, found {value:g}.")
