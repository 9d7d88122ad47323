"""The eight skills: when each has succeeded (the oracle) and where its episodes start.

Success is a change from the start of the episode: drawer by 0.12 m, slider by 0.15 m, or the light flipped the right way.
"""

from __future__ import annotations

import zlib

import numpy as np

from diwa_core.errors import ConfigError, ContractError
from diwa_core.sim.state import DRAWER_RANGE_M, NEUTRAL_POSE, SLIDER_RANGE_M, SWITCH_RANGE_M, SceneState

SKILLS = (
    "open_drawer",
    "close_drawer",
    "move_slider_left",
    "move_slider_right",
    "turn_on_lightbulb",
    "turn_off_lightbulb",
    "turn_on_led",
    "turn_off_led",
)
SPLITS = ("train", "validation", "evaluation")
SLIDER, DRAWER, BUTTON, SWITCH, BULB, LED = range(6)  # indices into scene_obs
_CHANGES = {  # skill -> (index, least signed change)
    "open_drawer": (DRAWER, 0.12),
    "close_drawer": (DRAWER, -0.12),
    "move_slider_left": (SLIDER, 0.15),
    "move_slider_right": (SLIDER, -0.15),
    "turn_on_lightbulb": (BULB, 0.5),
    "turn_off_lightbulb": (BULB, -0.5),
    "turn_on_led": (LED, 0.5),
    "turn_off_led": (LED, -0.5),
}
TCP_SPREAD_M, TCP_SPREAD_RAD = np.array([0.12, 0.08, 0.06]), np.array([0.10, 0.10, 0.20])
TABLE_BLOCKS_M = ((0.0, -0.15), (0.35, -0.03))  # lower and upper xy of blocks on the table
COMPARTMENTS_M = (((-0.32, 0.07), (-0.14, 0.13)), ((-0.06, 0.07), (0.12, 0.13)))
BLOCK_GAP_M = 0.09


def check_skill(skill: str) -> str:
    """Return `skill`, or raise ConfigError if it is none of the eight."""
    if skill not in SKILLS:
        raise ConfigError(f"skill: expected one of {', '.join(SKILLS)}; found '{skill}'.")
    return skill


class SkillOracle:
    """Judges one episode of one skill against `scene_obs_at_start` [24]."""

    def __init__(self, skill: str, scene_obs_at_start: np.ndarray):
        self.skill = check_skill(skill)
        self._index, self._change = _CHANGES[skill]
        self._start = float(_check_scene_obs(scene_obs_at_start)[self._index])

    def success(self, scene_obs: np.ndarray) -> bool:
        """Whether the skill has succeeded in the scene `scene_obs` [24]; raises ContractError on another shape."""
        change = float(_check_scene_obs(scene_obs)[self._index]) - self._start
        return change > self._change if self._change > 0 else change < self._change


def skill_progress(skill: str, start: np.ndarray, scene: np.ndarray) -> np.ndarray:
    """Share of the change that means success, of scenes [T, 6 or more] after `start`; above 1 is success. For predicted scenes too."""
    index, change = _CHANGES[check_skill(skill)]
    return (np.asarray(scene)[..., index] - np.asarray(start)[..., index]) / change


def _check_scene_obs(scene_obs: np.ndarray) -> np.ndarray:
    scene_obs = np.asarray(scene_obs)
    if scene_obs.shape != (24,):
        raise ContractError(f"scene_obs: expected shape (24,), found {scene_obs.shape}.")
    return scene_obs


def has_room(skill: str, scene_obs: np.ndarray) -> bool:
    """Whether the skill has something to do: at least 40 % of the joint's way to go, or the light in the other state."""
    index, change = _CHANGES[check_skill(skill)]
    fraction = float(_check_scene_obs(scene_obs)[index]) / {DRAWER: DRAWER_RANGE_M, SLIDER: SLIDER_RANGE_M}.get(index, 1.0)
    return fraction < 0.6 if change > 0 else fraction > 0.4


def start_states(skill: str, count: int, seed: int, split: str = "evaluation") -> list[SceneState]:
    """`count` reproducible start states in which `skill` is possible and not done.

    The n-th state depends only on (skill, n, seed, split), so a longer list begins with a shorter one; splits have streams of their own.
    Raises ConfigError on an unknown skill or split.
    """
    return [start_state(skill, number, seed, split) for number in range(count)]


def start_state(skill: str, number: int, seed: int, split: str) -> SceneState:
    """The n-th start state of a skill, seed and split."""
    check_skill(skill)
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}; found '{split}'.")
    return draw_state(skill, np.random.default_rng([seed, SPLITS.index(split), zlib.crc32(skill.encode()), number]))


def draw_state(skill: str | None, rng: np.random.Generator) -> SceneState:
    """A random start state: the hand around neutral, joints and lights anywhere, but so that `skill` (if given) is possible."""
    fractions = {name: _draw_fraction(rng) for name in ("slider", "drawer", "switch")}
    led = bool(rng.random() < 0.5)
    if skill is not None:
        index, change = _CHANGES[check_skill(skill)]
        share = rng.random() * (rng.random() < 0.6)  # often exactly at the end stop
        if index == LED:
            led = change < 0
        else:
            name, room = {DRAWER: ("drawer", 0.25), SLIDER: ("slider", 0.30), BULB: ("switch", 0.35)}[index]
            fractions[name] = room * share if change > 0 else 1.0 - room * share
    position = NEUTRAL_POSE[:3] + TCP_SPREAD_M * rng.uniform(-1, 1, 3)
    euler = NEUTRAL_POSE[3:] + TCP_SPREAD_RAD * rng.uniform(-1, 1, 3)
    return SceneState(
        tcp_pose=np.concatenate([position, euler]),
        gripper=1.0 if rng.random() < 0.5 else -1.0,
        slider=SLIDER_RANGE_M * fractions["slider"],
        drawer=DRAWER_RANGE_M * fractions["drawer"],
        switch=SWITCH_RANGE_M * fractions["switch"],
        led=led,
        blocks=_draw_blocks(rng),
    )


def _draw_fraction(rng: np.random.Generator) -> float:
    """Mostly at one of the end stops, otherwise anywhere between."""
    choice = rng.random()
    return 0.0 if choice < 0.4 else 1.0 if choice < 0.75 else float(rng.random())


def _draw_blocks(rng: np.random.Generator) -> np.ndarray:
    """Poses [3, 6] of the blocks, on the table or in a compartment, apart from each other."""
    poses: list[np.ndarray] = []
    while len(poses) < 3:
        on_table = rng.random() < 0.7
        lower, upper = TABLE_BLOCKS_M if on_table else COMPARTMENTS_M[int(rng.integers(2))]
        xy = rng.uniform(lower, upper)
        yaw = rng.uniform(-np.pi, np.pi) if on_table else rng.uniform(-0.3, 0.3)
        if all(np.abs(xy - pose[:2]).max() > BLOCK_GAP_M for pose in poses):
            poses.append(np.array([*xy, 0.461 if on_table else 0.441, 0.0, 0.0, yaw]))
    return np.stack(poses)
