"""Scripted experts for the eight skills: way-points from the true state, followed on the commanded target with closed gripper.

A Style makes an expert human: correlated action noise, way-point jitter, speed and pauses. Style() is the precise expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from diwa_core.sim.skills import DRAWER, SLIDER, SWITCH, check_skill
from diwa_core.sim.state import MAX_DELTA_M, MAX_DELTA_RAD, wrap_angle

SLOPE_UP = np.array([0.0, 0.5, 0.8660254])
CLEAR_Z_M, CLEAR_Y_M = 0.57, -0.10  # above and in front of everything that could be hit on the way
NOISE_CORRELATION = 0.8
PATIENCE_STEPS = 12  # how long a way-point that is blocked is pursued after the target has reached it


def tilted(tilt_deg: float, yaw_deg: float) -> np.ndarray:
    """Euler angles [3] of a hand that points down, turned by yaw and then tilted forward (fingers towards +y)."""
    down = Rotation.from_euler("xyz", (np.pi, 0.0, np.radians(yaw_deg)))
    return (Rotation.from_euler("x", np.radians(tilt_deg)) * down).as_euler("xyz")


DOWN, AT_SWITCH = tilted(0.0, 86.0), tilted(45.0, 60.0)


@dataclass(frozen=True)
class Style:
    """How an expert moves. Noise is the standard deviation of the action (1 = full speed), jitter that of way-points in metres.

    Misjudged is the deviation of one offset of the whole plan: the handle is taken to be where it is not.
    """

    action_noise: float = 0.0
    jitter_m: float = 0.0
    misjudged_m: float = 0.0
    speed: float = 1.0
    pause_probability: float = 0.0

    @staticmethod
    def human(rng: np.random.Generator, strength: float) -> Style:
        """A random style; strength 0 is precise, 1 a careless person."""
        return Style(
            action_noise=0.45 * strength * rng.uniform(0.5, 1.0),
            jitter_m=0.016 * strength * rng.uniform(0.3, 1.0),
            speed=1.0 - 0.55 * strength * rng.random(),
            pause_probability=0.03 * strength * rng.random(),
        )


@dataclass(frozen=True)
class Waypoint:
    """A TCP pose to reach: `via` points are passed within 3 cm, others within 1 cm; `speed` is a share of full speed."""

    position: np.ndarray
    euler: np.ndarray
    via: bool = False
    speed: float = 1.0


class Expert:
    """Carries out one skill from the present state on; `act` gives the next action, `done` says that the plan is used up."""

    def __init__(self, skill: str, rng: np.random.Generator, style: Style | None = None):
        self.skill, self.rng, self.style = check_skill(skill), rng, style or Style()
        self.mover = Mover(rng, self.style)

    def start(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> None:
        """Plan from robot_obs [15] and scene_obs [24]."""
        plan = _PLANS[self.skill](scene_obs)
        self.mover.follow([*clear_path(robot_obs[:3], plan[0]), *plan])

    @property
    def done(self) -> bool:
        """Whether the plan is used up (not whether the skill succeeded)."""
        return self.mover.done

    def act(self, robot_obs: np.ndarray, target_pose: np.ndarray) -> np.ndarray:
        """The next action [7] float32, each component in [-1, 1]."""
        return self.mover.act(robot_obs, target_pose)


class Mover:
    """Follows way-points in a given style with the gripper closed (or as `gripper` says)."""

    def __init__(self, rng: np.random.Generator, style: Style, gripper: float = -1.0):
        self.rng, self.style, self.gripper = rng, style, gripper
        self._plan: list[Waypoint] = []
        self._noise = np.zeros(6)
        self._waiting = self._pause = 0

    def follow(self, plan: list[Waypoint]) -> None:
        """Take a new plan; way-points are jittered here, once."""
        jitter = self.style.jitter_m
        offset = self.style.misjudged_m * self.rng.normal(size=3) if self.style.misjudged_m else 0.0
        self._plan = [Waypoint(w.position + offset + jitter * self.rng.normal(size=3), w.euler, w.via, w.speed) for w in plan]
        self._waiting = 0

    @property
    def done(self) -> bool:
        """Whether all way-points have been passed or given up."""
        return not self._plan

    def act(self, robot_obs: np.ndarray, target_pose: np.ndarray) -> np.ndarray:
        """One action towards the present way-point."""
        scale = np.sqrt(1 - NOISE_CORRELATION**2)
        self._noise = NOISE_CORRELATION * self._noise + scale * self.style.action_noise * self.rng.normal(size=6)
        if self._pause == 0 and self.rng.random() < self.style.pause_probability:
            self._pause = int(self.rng.integers(3, 15))
        motion = np.zeros(6)
        if self._pause > 0:
            self._pause -= 1
        else:
            motion = self._advance(robot_obs, target_pose) + self._noise
        return np.append(np.clip(motion, -1, 1), self.gripper).astype(np.float32)

    def _advance(self, robot_obs: np.ndarray, target_pose: np.ndarray) -> np.ndarray:
        """The noise-free motion [6]; drops way-points that are reached or hopeless."""
        while self._plan and self._passed(self._plan[0], robot_obs, target_pose):
            self._plan.pop(0)
            self._waiting = 0
        if not self._plan:
            return np.zeros(6)
        point = self._plan[0]
        turn = wrap_angle(point.euler - target_pose[3:])
        delta = np.concatenate([(point.position - target_pose[:3]) / MAX_DELTA_M, turn / MAX_DELTA_RAD])
        speed = point.speed * self.style.speed
        largest = np.abs(delta[:3]).max()
        delta[:3] *= min(1.0, speed / max(largest, 1e-9))  # straight lines
        return np.clip(delta, -speed, speed)

    def _passed(self, point: Waypoint, robot_obs: np.ndarray, target_pose: np.ndarray) -> bool:
        tolerance = 0.03 if point.via else 0.01
        angle = np.abs(wrap_angle(point.euler - robot_obs[3:6])).max()
        if np.linalg.norm(point.position - robot_obs[:3]) < tolerance and angle < (0.5 if point.via else 0.2):
            return True
        close = np.linalg.norm(point.position - target_pose[:3]) < 0.01 + 0.02 * self.style.action_noise
        leashed = np.linalg.norm(target_pose[:3] - robot_obs[:3]) > 0.07
        self._waiting += bool(close or leashed)
        return self._waiting > PATIENCE_STEPS


def clear_path(tcp: np.ndarray, goal: Waypoint) -> list[Waypoint]:
    """Way-points from anywhere to above or in front of `goal` without brushing the furniture."""
    path, here = [], np.array(tcp[:3], dtype=np.float64)
    if here[1] > CLEAR_Y_M + 0.02 and here[2] > 0.42:  # come out of the cabinet first
        here = np.array([here[0], CLEAR_Y_M - 0.02, here[2]])
        path.append(Waypoint(here.copy(), goal.euler, via=True))
    if here[2] < CLEAR_Z_M - 0.03 and np.linalg.norm(here[:2] - goal.position[:2]) > 0.04:
        here = np.array([here[0], here[1], CLEAR_Z_M])
        path.append(Waypoint(here.copy(), goal.euler, via=True))
    if goal.position[2] < CLEAR_Z_M - 0.03 or goal.position[1] > CLEAR_Y_M:
        over = np.array([goal.position[0], min(goal.position[1], CLEAR_Y_M), max(goal.position[2], CLEAR_Z_M)])
        path.append(Waypoint(over, goal.euler, via=True))
    return path


def _open_drawer(scene_obs: np.ndarray) -> list[Waypoint]:
    y = -0.207 - scene_obs[DRAWER]
    above, behind = np.array([0.18, y, 0.45]), np.array([0.18, y, 0.362])
    return [Waypoint(above, DOWN), Waypoint(behind, DOWN, speed=0.7), Waypoint(behind - [0, 0.25, 0], DOWN)]


def _close_drawer(scene_obs: np.ndarray) -> list[Waypoint]:
    y = -0.295 - scene_obs[DRAWER]
    above, front = np.array([0.18, y, 0.45]), np.array([0.18, y, 0.355])
    push = np.array([0.18, -0.22, 0.355])
    return [Waypoint(above, DOWN, via=True), Waypoint(front, DOWN, speed=0.7), Waypoint(push, DOWN)]


def _move_slider(scene_obs: np.ndarray, direction: float) -> list[Waypoint]:
    """Push the handle towards direction * x with the side of the closed fingers."""
    handle_x = 0.04 - scene_obs[SLIDER]
    side = np.array([handle_x - direction * 0.06, 0.02, 0.549])
    front = side + np.array([0, -0.10, 0.02])
    end = np.array([(0.04 if direction > 0 else -0.24) + direction * 0.02, 0.02, 0.549])
    return [Waypoint(front, DOWN, via=True), Waypoint(side, DOWN), Waypoint(end, DOWN)]


def _switch_light(scene_obs: np.ndarray, up: bool) -> list[Waypoint]:
    """Lift the bar from below, or push it down from above, along the front plane."""
    bar = np.array([0.30, 0.0185, 0.529]) + SLOPE_UP * scene_obs[SWITCH]
    contact = bar + ([0, 0, -0.062] if up else [0, 0.005, 0.055])
    front = contact - np.array([0, 0.10, 0])
    end = contact + SLOPE_UP * ((0.088 - scene_obs[SWITCH] + 0.03) if up else -(scene_obs[SWITCH] + 0.06))
    return [Waypoint(front, AT_SWITCH), Waypoint(contact, AT_SWITCH, speed=0.7), Waypoint(end, AT_SWITCH)]


def _press_button(scene_obs: np.ndarray) -> list[Waypoint]:
    above = np.array([-0.12, -0.12, 0.53])
    return [Waypoint(above, DOWN), Waypoint(above * [1, 1, 0] + [0, 0, 0.460], DOWN, speed=0.7), Waypoint(above, DOWN, via=True)]


_PLANS = {
    "open_drawer": _open_drawer,
    "close_drawer": _close_drawer,
    "move_slider_left": lambda scene_obs: _move_slider(scene_obs, -1.0),
    "move_slider_right": lambda scene_obs: _move_slider(scene_obs, 1.0),
    "turn_on_lightbulb": lambda scene_obs: _switch_light(scene_obs, True),
    "turn_off_lightbulb": lambda scene_obs: _switch_light(scene_obs, False),
    "turn_on_led": _press_button,
    "turn_off_led": _press_button,
}
