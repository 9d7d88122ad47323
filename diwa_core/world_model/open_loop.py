"""How far a world model can be trusted: open-loop errors on held-out play, and the replay test on real episodes of a policy.

A model that predicts pixels prettily may still not know success from failure; these figures say whether it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from diwa_core.data.sequences import SequenceIndex, WindowSampler
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.probe import SCENE, SceneProbe, filter_windows, readout

PREFIX = 8  # observed frames before the open loop begins
HORIZONS = (4, 36, 72)
MOVED_M = {"slider": 0.05, "drawer": 0.05, "switch": 0.02}


@dataclass
class OpenLoopFigures:
    """Errors at one horizon; joints and lights only over windows in which they really moved or flipped."""

    horizon: int
    windows: int
    tcp_cm: float
    moved_cm: dict[str, tuple[float, float, int]]  # joint -> (error, error of the no-change guess, windows)
    still_cm: dict[str, float]  # error where the joint did not move
    flips: dict[str, tuple[float, float, int]]  # light -> (share of flips predicted, share of false flips, flips)


def measure_open_loop(
    model: WorldModel, data, scene_obs: np.ndarray, probe: SceneProbe, windows: int = 2000, seed: int = 0
) -> list[OpenLoopFigures]:
    """Figures at 4, 36 and 72 steps on random windows of held-out play (with simulator labels scene_obs [frames, 24])."""
    sampler = WindowSampler(data.episodes, windows, PREFIX + max(HORIZONS), (PREFIX, PREFIX), seed)
    index = sampler.sample(0)
    states = filter_windows(model, data, index)
    truth = scene_obs[index.frames][..., : len(SCENE)]
    predicted = probe.scene(readout(model, states))
    low = model.decode_low(states)
    tcp = None if low is None else low[..., :3].cpu().numpy()
    real_tcp = data.low[torch.from_numpy(index.frames)][..., :3].numpy()
    rows = []
    for horizon in HORIZONS:
        t = PREFIX + horizon - 1
        error = float("nan") if tcp is None else 100 * float(np.linalg.norm(tcp[:, t] - real_tcp[:, t], axis=-1).mean())
        row = OpenLoopFigures(horizon, windows, error, {}, {}, {})
        for name, line in MOVED_M.items():
            j = SCENE.index(name)
            change = np.abs(truth[:, t, j] - truth[:, PREFIX - 1, j])
            wrong = np.abs(predicted[:, t, j] - truth[:, t, j])
            moved = change > line
            if moved.any():
                row.moved_cm[name] = (100 * float(wrong[moved].mean()), 100 * float(change[moved].mean()), int(moved.sum()))
            row.still_cm[name] = 100 * float(wrong[change < 0.002].mean()) if (change < 0.002).any() else float("nan")
        for name in ("bulb", "led"):
            j = SCENE.index(name)
            before, after = truth[:, PREFIX - 1, j] > 0.5, truth[:, t, j] > 0.5
            guess, flipped = predicted[:, t, j] > 0.5, before != after
            row.flips[name] = (
                float((guess == after)[flipped].mean()) if flipped.any() else float("nan"),
                float((guess != after)[~flipped].mean()),
                int(flipped.sum()),
            )
        rows.append(row)
    return rows


def print_table(rows: list[OpenLoopFigures]) -> str:
    """The figures as text, one line per horizon."""
    lines = []
    for row in rows:
        moved = ", ".join(f"{n} {e:.1f} (no-change {g:.1f}, n {k}, still {row.still_cm[n]:.1f})" for n, (e, g, k) in row.moved_cm.items())
        flips = ", ".join(f"{n} {100 * p:.0f} % of {k} (false {100 * f:.1f} %)" for n, (p, f, k) in row.flips.items())
        lines.append(f"{row.horizon:3d} steps, n {row.windows}: TCP {row.tcp_cm:.2f} cm; moved cm: {moved}; flips: {flips}")
    return "\n".join(lines)


@dataclass
class ReplayResult:
    """Real episodes replayed open loop: what the model dreamt, given what really happened."""

    skill: str
    episodes: int
    successes: int
    dream_given_success: float
    dream_given_failure: float
    auc: float


def replay(model: WorldModel, data, real_success: np.ndarray, skills: list[str], probe: SceneProbe, margin) -> list[ReplayResult]:
    """Replay each episode's actions open loop after the warm-up and compare the dreamt outcome with the real one.

    data: PlayData with one episode per rollout; real_success [episodes]; skills: the skill each episode tried;
    margin(skill, start, scene [T, S]) -> progress [T], success where it exceeds 1.
    """
    warmup = model.config.warmup_frames
    scores = np.zeros(len(data.episodes))
    for length in sorted({end - start for start, end in data.episodes}):
        members = [i for i, (start, end) in enumerate(data.episodes) if end - start == length]
        frames = np.array([np.arange(*data.episodes[i]) for i in members])
        first = np.zeros(frames.shape, bool)
        first[:, 0] = True
        observed = np.broadcast_to(np.arange(length) < warmup, frames.shape)
        scene = probe.scene(readout(model, filter_windows(model, data, SequenceIndex(frames, first, observed))))
        for i, path in zip(members, scene, strict=True):
            scores[i] = margin(skills[i], path[warmup - 1], path[warmup:]).max(initial=0.0)
    results = []
    for skill in sorted(set(skills)):
        mine = np.array([s == skill for s in skills])
        good, bad = scores[mine & real_success], scores[mine & ~real_success]
        both = len(good) and len(bad)
        auc = float((good[:, None] > bad).mean() + 0.5 * (good[:, None] == bad).mean()) if both else float("nan")
        results.append(
            ReplayResult(skill, int(mine.sum()), len(good), *(float((s > 1).mean()) if len(s) else float("nan") for s in (good, bad)), auc)
        )
    return results
