"""Shows an operator how the table must look before a trial: the wanted start rendered over what the camera sees, and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from diwa_core.errors import DataError
from diwa_core.sim.skills import DRAWER, LED, SLIDER, SWITCH
from diwa_core.sim.state import NEUTRAL_POSE, SceneState

PANEL_PX = 400
LINE_PX = 22
INK = (30, 30, 30)


class StartRenderer:
    """Renders wanted starts as the static camera of the simulated table sees them. Use it as a context manager; loads PyBullet."""

    def __init__(self, size_px: int = PANEL_PX) -> None:
        from diwa_core.sim.play_table import PlayTable

        self.table = PlayTable(size_px, ("rgb_static",))

    def __enter__(self) -> StartRenderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.table.close()

    def render(self, start: SceneState) -> np.ndarray:
        """uint8 [P, P, 3]."""
        return self.table.reset(options={"state": start})[0]["rgb_static"]


def start_error(start: SceneState, pose: np.ndarray | None = None, scene_obs: np.ndarray | None = None) -> dict[str, float]:
    """How far the hand, `pose` [6] in the world frame, and the table, scene_obs [24], are from `start`; only what is known.

    hand_mm, hand_deg, slider_mm, drawer_mm, switch_mm: sizes; led, blocks_mm: 1 for the other state, and the farthest block.
    """
    found: dict[str, float] = {}
    if pose is not None:
        wanted = np.asarray(NEUTRAL_POSE if start.tcp_pose is None else start.tcp_pose, float)
        turn = Rotation.from_euler("xyz", wanted[3:]).inv() * Rotation.from_euler("xyz", np.asarray(pose, float)[3:])
        found |= {"hand_mm": 1e3 * float(np.linalg.norm(pose[:3] - wanted[:3])), "hand_deg": float(np.degrees(turn.magnitude()))}
    if scene_obs is not None:
        for name, index in (("slider", SLIDER), ("drawer", DRAWER), ("switch", SWITCH)):
            found[f"{name}_mm"] = 1e3 * abs(float(scene_obs[index]) - getattr(start, name))
        found["led"] = float(bool(scene_obs[LED]) != start.led)
        blocks = np.asarray(scene_obs[6:]).reshape(3, 6)[:, :3]
        found["blocks_mm"] = 1e3 * float(np.linalg.norm(blocks - np.asarray(start.blocks)[:, :3], axis=1).max())
    return {name: round(value, 2) for name, value in found.items()}


def describe_start(start: SceneState) -> list[str]:
    """What the operator sets up by hand, as lines of text."""
    return [
        f"slider {100 * start.slider:.0f} cm from the right, drawer {100 * start.drawer:.0f} cm out",
        f"switch {100 * start.switch:.1f} cm up (bulb {'on' if start.bulb else 'off'}), green light {'on' if start.led else 'off'}",
        f"gripper {'open' if start.gripper > 0 else 'closed'}; blocks as in the picture",
    ]


def draw_overlay(wanted: np.ndarray, live: np.ndarray | None, title: str, start: SceneState, error: Mapping[str, float]) -> np.ndarray:
    """uint8 [H, W, 3]: the wanted start, the camera's picture and both blended half and half, with words and numbers below.

    wanted, live: uint8 [.., .., 3] of any size; live is None while the camera is silent.
    """
    target = _fit(wanted)
    seen = np.full_like(target, 235) if live is None else _fit(live)
    panels = [_name(target, "wanted"), _name(seen, "camera" if live is not None else "no picture"), _name(target // 2 + seen // 2, "both")]
    off = ", ".join(f"{name.rsplit('_', 1)[0]} {value:.0f} {unit}" for name, value in error.items() if (unit := _unit(name)))
    lines = [title, *describe_start(start), f"off by: {off}" if off else "off by: not known; compare the pictures"]
    text = np.full((LINE_PX * len(lines) + 10, 3 * PANEL_PX, 3), 255, np.uint8)
    for number, line in enumerate(lines, 1):
        _write_line(text, line, (8, LINE_PX * number - 4))
    return np.concatenate([np.concatenate(panels, axis=1), text])


def write_picture(path: Path, picture: np.ndarray) -> None:
    """PNG of uint8 [H, W, 3], in one step, so that a viewer never loads half of it. Raises DataError."""
    temporary = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}. Free space; the same command goes on.") from error


def _unit(name: str) -> str:
    return {"mm": "mm", "deg": "degrees"}.get(name.rsplit("_", 1)[-1], "(1: other state)")


def _fit(picture: np.ndarray) -> np.ndarray:
    return cv2.resize(picture, (PANEL_PX, PANEL_PX), interpolation=cv2.INTER_LINEAR)


def _name(panel: np.ndarray, name: str) -> np.ndarray:
    panel = panel.copy()
    cv2.rectangle(panel, (0, 0), (12 + 10 * len(name), 24), (255, 255, 255), -1)
    _write_line(panel, name, (6, 17))
    return panel


def _write_line(picture: np.ndarray, text: str, corner: tuple[int, int]) -> None:
    cv2.putText(picture, text, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
