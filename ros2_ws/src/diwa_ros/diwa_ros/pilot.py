"""What an operator wants, from keys or from a joystick: motion while a dead-man is held, the gripper, marks. No ROS in here.

Actions are those of the contract: delta xyz and delta euler xyz in the world frame, then the gripper, each in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from diwa_core.config import load_yaml
from diwa_core.contract import ACTION_SIZE
from diwa_core.errors import ConfigError

SUCCESS, FAILURE, DISCARD = "success", "failure", "discard"  # as in EpisodeMark.msg
MOTION_KEYS = {  # key -> (component of the action, direction)
    "w": (1, 1.0),  # away from the base
    "s": (1, -1.0),
    "a": (0, -1.0),
    "d": (0, 1.0),
    "r": (2, 1.0),
    "f": (2, -1.0),
    "u": (3, 1.0),
    "o": (3, -1.0),
    "i": (4, 1.0),
    "k": (4, -1.0),
    "j": (5, 1.0),
    "l": (5, -1.0),
}
GRIPPER_KEY = " "
MARK_KEYS = {"1": SUCCESS, "2": FAILURE, "3": DISCARD}
HELP = (
    "hold a key to move, let go to stop\n"
    "  w/s forward/back   a/d left/right   r/f up/down   u/o i/k j/l turn about x y z\n"
    "  space opens and closes the gripper   1 success   2 failure   3 discard   Ctrl-C ends\n"
)


class Pilot:
    """Base of both: the gripper toggles, marks queue up. `intent` answers what to do now."""

    def __init__(self, speed: float) -> None:
        """speed: share of full speed, 0 to 1."""
        self.speed = speed
        self.gripper = 1.0
        self.marks: list[str] = []

    def intent(self, now_s: float) -> np.ndarray | None:
        """Action [7] float32, or None while the dead-man is not held: then nothing may move."""
        raise NotImplementedError

    def pop_marks(self) -> list[str]:
        """Marks made since the last call, oldest first."""
        marks, self.marks = self.marks, []
        return marks

    def _compose(self, motion: np.ndarray) -> np.ndarray:
        action = np.zeros(ACTION_SIZE, np.float32)
        action[:6], action[6] = np.clip(self.speed * motion, -1.0, 1.0), self.gripper
        return action


class KeyPilot(Pilot):
    """Keys of a terminal. It tells presses but not releases, so holding a key is its repetition, and that is the dead-man."""

    def __init__(self, speed: float = 0.5, hold_s: float = 0.2) -> None:
        """hold_s: how long one press counts; longer than the keyboard's repetition, or the arm stutters."""
        super().__init__(speed)
        self.hold_s = hold_s
        self._pressed: dict[str, float] = {}
        self._toggled_s = -np.inf

    def press(self, key: str, now_s: float) -> None:
        """One character came from the terminal; unknown ones mean nothing."""
        if key in MOTION_KEYS:
            self._pressed[key] = now_s
        elif key == GRIPPER_KEY:
            if now_s - self._toggled_s > self.hold_s:  # a held key is one wish
                self.gripper = -self.gripper
            self._toggled_s = now_s
        elif key in MARK_KEYS:
            self.marks.append(MARK_KEYS[key])

    def intent(self, now_s: float) -> np.ndarray | None:
        """Motion of the keys that are held; the gripper moves while its key counts, too."""
        held = [key for key, pressed_s in self._pressed.items() if now_s - pressed_s <= self.hold_s]
        if not held and now_s - self._toggled_s > self.hold_s:
            return None
        motion = np.zeros(6)
        for key in held:
            component, direction = MOTION_KEYS[key]
            motion[component] += direction
        return self._compose(motion)


@dataclass(frozen=True)
class JoyMap:
    """Which axis and button of a sensor_msgs/Joy means what. -1: not on this device. signs: of the axes, so that left is -x, up is +z."""

    axes: tuple[int, ...] = (0, 1, 4, -1, -1, 3)  # for delta x y z and euler x y z: an Xbox-like gamepad
    signs: tuple[float, ...] = (-1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    deadman: int = 4
    gripper: int = 0
    success: int = 3
    failure: int = 1
    discard: int = 2
    dead_zone: float = 0.1

    def __post_init__(self) -> None:
        if len(self.axes) != 6 or len(self.signs) != 6:
            raise ConfigError(f"joystick map: expected 6 axes and 6 signs, found {len(self.axes)} and {len(self.signs)}.")
        if self.deadman < 0:
            raise ConfigError("joystick map: expected a dead-man button, found none. Nothing may move without one.")
        if not 0 <= self.dead_zone < 1:
            raise ConfigError(f"joystick map: expected a dead_zone from 0 to below 1, found {self.dead_zone}.")


JOY_MAPS = {
    "gamepad": JoyMap(),
    "spacemouse": JoyMap(
        axes=(1, 0, 2, 4, 3, 5), signs=(-1.0, 1.0, 1.0, 1.0, 1.0, 1.0), deadman=0, gripper=1, success=-1, failure=-1, discard=-1
    ),
}


def load_joy_map(name: str) -> JoyMap:
    """One of JOY_MAPS by its name, or a YAML file. Raises ConfigError."""
    return JOY_MAPS[name] if name in JOY_MAPS else load_yaml(JoyMap, name)


@dataclass
class JoyPilot(Pilot):
    """A gamepad or SpaceMouse. It moves only while the dead-man button is held and messages keep coming."""

    layout: JoyMap = field(default_factory=JoyMap)
    speed: float = 1.0
    timeout_s: float = 0.3  # joystick drivers repeat; silence is a lost device

    def __post_init__(self) -> None:
        super().__init__(self.speed)
        self._axes: Sequence[float] = ()
        self._buttons: Sequence[int] = ()
        self._heard_s = -np.inf

    def take(self, axes: Sequence[float], buttons: Sequence[int], now_s: float) -> None:
        """One sensor_msgs/Joy. Raises ConfigError when the device has fewer axes or buttons than the layout names."""
        named = (self.layout.deadman, self.layout.gripper, self.layout.success, self.layout.failure, self.layout.discard)
        if max(self.layout.axes) >= len(axes) or max(named) >= len(buttons):
            raise ConfigError(
                f"joy: expected at least {max(self.layout.axes) + 1} axes and {max(named) + 1} buttons, "
                f"found {len(axes)} and {len(buttons)}. Choose another joy_map."
            )
        if not np.isfinite(axes).all():
            raise ConfigError("joy: expected finite axes, found NaN or infinity.")
        pressed = {name for name in ("gripper", SUCCESS, FAILURE, DISCARD) if self._is_edge(getattr(self.layout, name), buttons)}
        if "gripper" in pressed:
            self.gripper = -self.gripper
        self.marks += [mark for mark in (SUCCESS, FAILURE, DISCARD) if mark in pressed]
        self._axes, self._buttons, self._heard_s = list(axes), list(buttons), now_s

    def intent(self, now_s: float) -> np.ndarray | None:
        """Motion of the sticks while the dead-man is held."""
        if now_s - self._heard_s > self.timeout_s or not self._buttons[self.layout.deadman]:
            return None
        raw = np.array([self._axes[axis] if axis >= 0 else 0.0 for axis in self.layout.axes]) * self.layout.signs
        beyond = np.maximum(np.abs(raw) - self.layout.dead_zone, 0) / (1 - self.layout.dead_zone)
        return self._compose(np.sign(raw) * beyond)

    def _is_edge(self, button: int, buttons: Sequence[int]) -> bool:
        """Whether `button` went down with this message; the first message only tells what is held already."""
        return button >= 0 and len(self._buttons) > 0 and bool(buttons[button]) and not self._buttons[button]
