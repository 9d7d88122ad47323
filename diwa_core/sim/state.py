"""SceneState: where an episode on the play table starts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from diwa_core.errors import ContractError

MAX_DELTA_M, MAX_DELTA_RAD = 0.02, 0.05  # one step at action 1.0
BULB_THRESHOLD_M = 0.044  # the bulb is on when the switch is above it
DRAWER_RANGE_M, SLIDER_RANGE_M, SWITCH_RANGE_M = 0.22, 0.28, 0.088
SCENE_OBS_SIZE = 24
NEUTRAL_POSE = (0.0259, -0.2313, 0.5713, 3.0905, -0.0291, 1.5001)  # TCP at the neutral joints


def _default_blocks() -> np.ndarray:
    return np.array([[-0.30, -0.05, 0.46, 0, 0, 0], [-0.20, -0.12, 0.46, 0, 0, 0], [0.25, -0.08, 0.46, 0, 0, 0]], dtype=np.float64)


@dataclass
class SceneState:
    """A start state. Metres and radians; the bulb follows the switch (on above 0.044 m).

    tcp_pose: [6] xyz and euler, reached by inverse kinematics from the neutral joints (None: neutral); gripper: +1 open, -1 closed;
    blocks: [3, 6] xyz and euler of red, blue and pink.
    """

    tcp_pose: np.ndarray | None = None
    gripper: float = 1.0
    slider: float = 0.0
    drawer: float = 0.0
    switch: float = 0.0
    led: bool = False
    blocks: np.ndarray = field(default_factory=_default_blocks)

    def validate(self) -> None:
        """Raise ContractError on a joint out of its range, a wrong shape or a value that is not finite."""
        for name, upper in (("slider", SLIDER_RANGE_M), ("drawer", DRAWER_RANGE_M), ("switch", SWITCH_RANGE_M)):
            value = getattr(self, name)
            if not 0 <= value <= upper + 1e-6:
                raise ContractError(f"start state: expected {name} in 0..{upper} m, found {value}.")
        for name, values, shape in (("blocks", self.blocks, (3, 6)), ("tcp_pose", self.tcp_pose, (6,))):
            if values is not None and (np.shape(values) != shape or not np.isfinite(values).all()):
                raise ContractError(f"start state: expected {name} of shape {shape} and finite, found {values}.")
        if abs(self.gripper) != 1:
            raise ContractError(f"start state: expected gripper +1 (open) or -1 (closed), found {self.gripper}.")

    @property
    def bulb(self) -> bool:
        """Whether the bulb is on: it follows the switch."""
        return self.switch > BULB_THRESHOLD_M


def wrap_angle(angle: np.ndarray) -> np.ndarray:
    """Angles in radians into [-pi, pi)."""
    return (np.asarray(angle) + np.pi) % (2 * np.pi) - np.pi
