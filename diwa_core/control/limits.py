"""Limits of motion as named profiles, and as the YAML that overrides them.

Letters: X pose coordinates (6), xyz in metres and then the rotation vector in radians that turns the nominal orientation into the pose's.
Speeds, accelerations and jerks hold for each coordinate by itself; an angular velocity is never above the rate of its rotation vector.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntFlag
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.spatial.transform import Rotation

from diwa_core.config import from_dict
from diwa_core.contract import Contract
from diwa_core.errors import ConfigError

COORDINATES = ("x", "y", "z", "rotation x", "rotation y", "rotation z")


class Clamp(IntFlag):
    """Why a command differs from what was asked; the first five as in ExecutedAction.msg."""

    NONE = 0
    RANGE = 1
    NONFINITE = 2
    STALE = 4
    WORKSPACE = 8
    RATE = 16
    LEASH = 32
    JOINT = 64
    SURPRISE = 128  # slowed, because the world model is surprised


@dataclass(frozen=True)
class MotionLimits:
    """What a commanded pose must keep to. None: not limited here.

    workspace_*_m: box of the TCP in the robot's base frame; nominal_rpy_rad: the orientation from which tilt and yaw are counted;
    leash_*: how far a commanded target may lead the measured pose; joint_*: of the arm, kept `joint_margin_rad` away from.
    """

    profile: str = "simulation"
    max_speed_m_s: float = 0.6
    max_acceleration_m_s2: float = 36.0
    max_jerk_m_s3: float = 2160.0
    max_speed_rad_s: float = 1.5
    max_acceleration_rad_s2: float = 90.0
    max_jerk_rad_s3: float = 5400.0
    workspace_lower_m: tuple[float, ...] | None = None
    workspace_upper_m: tuple[float, ...] | None = None
    nominal_rpy_rad: tuple[float, ...] = (np.pi, 0.0, 0.0)
    max_tilt_rad: float | None = None
    max_yaw_rad: float | None = None
    leash_m: float | None = None
    leash_rad: float | None = None
    joint_lower_rad: tuple[float, ...] | None = None
    joint_upper_rad: tuple[float, ...] | None = None
    joint_margin_rad: float = 0.1

    @cached_property
    def nominal(self) -> Rotation:
        """The orientation `nominal_rpy_rad`."""
        return Rotation.from_euler("xyz", self.nominal_rpy_rad)

    def __post_init__(self) -> None:
        """Raises ConfigError on a value that limits nothing or allows nothing."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not 0 < value < np.inf:
                raise ConfigError(f"limits: expected {field.name} above 0 and finite, found {value}.")
        self._check_range("workspace_lower_m", "workspace_upper_m", 3, 0.0)
        self._check_range("joint_lower_rad", "joint_upper_rad", 7, 2 * self.joint_margin_rad)
        if len(self.nominal_rpy_rad) != 3 or not np.isfinite(self.nominal_rpy_rad).all():
            raise ConfigError(f"limits: expected nominal_rpy_rad of 3 finite values, found {self.nominal_rpy_rad}.")
        rotations = np.array([np.inf if value is None else value for value in (self.max_tilt_rad, self.max_tilt_rad, self.max_yaw_rad)])
        if np.isfinite(rotations).any() and np.linalg.norm(rotations) >= np.pi:
            raise ConfigError(
                f"limits: expected max_tilt_rad and max_yaw_rad both, and together below half a turn, found {self.max_tilt_rad} and "
                f"{self.max_yaw_rad}. Choose nominal_rpy_rad in the middle of what the hand does."
            )

    def _check_range(self, lower_name: str, upper_name: str, size: int, least: float) -> None:
        lower, upper = getattr(self, lower_name), getattr(self, upper_name)
        if lower is None and upper is None:
            return
        if lower is None or upper is None or len(lower) != size or len(upper) != size:
            raise ConfigError(f"limits: expected {lower_name} and {upper_name} of {size} values each, found {lower} and {upper}.")
        if not (np.subtract(upper, lower) > least).all():
            raise ConfigError(f"limits: expected every {upper_name} more than {least:g} above its {lower_name}, found {lower} and {upper}.")

    @property
    def speed(self) -> np.ndarray:
        """Largest rate of each coordinate, [X]."""
        return np.repeat([self.max_speed_m_s, self.max_speed_rad_s], 3)

    @property
    def acceleration(self) -> np.ndarray:
        """Largest acceleration of each coordinate, [X]."""
        return np.repeat([self.max_acceleration_m_s2, self.max_acceleration_rad_s2], 3)

    @property
    def jerk(self) -> np.ndarray:
        """Largest jerk of each coordinate, [X]."""
        return np.repeat([self.max_jerk_m_s3, self.max_jerk_rad_s3], 3)

    @property
    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of each coordinate, [X] each; infinite where there is none."""
        lower, upper = np.full(6, -np.inf), np.full(6, np.inf)
        if self.workspace_lower_m is not None:
            lower[:3], upper[:3] = self.workspace_lower_m, self.workspace_upper_m
        if self.max_tilt_rad is not None:
            upper[3:] = self.max_tilt_rad, self.max_tilt_rad, self.max_yaw_rad
            lower[3:] = -upper[3:]
        return lower, upper

    def allows_everything_of(self, contract: Contract) -> bool:
        """Whether no sequence of the contract's actions can ever break these limits, so that nothing need be clamped."""
        widest = contract_limits(contract)
        rates_fit = all((getattr(self, name) >= getattr(widest, name) * (1 - 1e-9)).all() for name in ("speed", "acceleration", "jerk"))
        return rates_fit and not np.isfinite(np.concatenate(self.box)).any()


def contract_limits(contract: Contract) -> MotionLimits:
    """What actions in [-1, 1] can do at all: full speed to full reverse within one step. The simulated table has its own box and leash."""
    rate = contract.rate_hz
    metres, radians = contract.max_delta_m * rate, contract.max_delta_rad * rate
    return MotionLimits("simulation", metres, 2 * metres * rate, 4 * metres * rate**2, radians, 2 * radians * rate, 4 * radians * rate**2)


_ARM = MotionLimits(
    max_speed_m_s=0.25,
    max_acceleration_m_s2=1.0,
    max_jerk_m_s3=50.0,
    max_speed_rad_s=1.0,
    max_acceleration_rad_s2=4.0,
    max_jerk_rad_s3=200.0,
    workspace_lower_m=(0.25, -0.45, 0.02),
    workspace_upper_m=(0.75, 0.45, 0.70),
    max_tilt_rad=0.7,
    max_yaw_rad=2.5,
    leash_m=0.05,
    leash_rad=0.2,
)
ARMS = {
    "fer": replace(
        _ARM,
        profile="fer",
        joint_lower_rad=(-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
        joint_upper_rad=(2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
    ),
    "fr3": replace(
        _ARM,
        profile="fr3",
        joint_lower_rad=(-2.9007, -1.8361, -2.9007, -3.0770, -2.8763, 0.4398, -3.0508),
        joint_upper_rad=(2.9007, 1.8361, 2.9007, -0.1169, 2.8763, 4.6216, 3.0508),
    ),
}
CEILINGS = {  # what the maker allows: speed, acceleration, jerk in m, then in rad
    "fer": (1.7, 13.0, 6500.0, 2.5, 25.0, 12500.0),
    "fr3": (3.0, 9.0, 4500.0, 2.5, 17.0, 8500.0),
}
PROFILES = ("simulation", *ARMS)


def read_limits(values: dict[str, Any], contract: Contract) -> MotionLimits:
    """The profile named by `profile`, with the other keys in place of its own. Raises ConfigError, also above what the maker allows."""
    name = values.get("profile", "simulation")
    if name not in PROFILES:
        raise ConfigError(f"limits.profile: expected one of {', '.join(PROFILES)}, found {name!r}.")
    base = ARMS.get(name) or contract_limits(contract)
    known = {field.name: getattr(base, field.name) for field in fields(base)}
    limits = from_dict(MotionLimits, known | values, "limits")
    if name in CEILINGS:
        _check_ceiling(limits, CEILINGS[name])
    return limits


def load_limits(name_or_path: str, contract: Contract) -> MotionLimits:
    """A profile by name, or a YAML file with `profile` and what differs from it. Raises ConfigError."""
    if name_or_path in PROFILES:
        return read_limits({"profile": name_or_path}, contract)
    if not name_or_path.endswith((".yaml", ".yml")):
        raise ConfigError(f"limits: expected one of {', '.join(PROFILES)} or a YAML file, found '{name_or_path}'.")
    try:
        values = yaml.safe_load(Path(name_or_path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{name_or_path}: cannot be read as YAML: {error}") from error
    return read_limits(values, contract)


def _check_ceiling(limits: MotionLimits, ceiling: tuple[float, ...]) -> None:
    names = [f"max_{what}" for what in ("speed_m_s", "acceleration_m_s2", "jerk_m_s3", "speed_rad_s", "acceleration_rad_s2", "jerk_rad_s3")]
    for name, highest in zip(names, ceiling, strict=True):
        if getattr(limits, name) > highest:
            found = f"expected at most {highest:g}, what the arm '{limits.profile}' can do, found {getattr(limits, name):g}."
            raise ConfigError(f"limits.{name}: {found}")
