"""The world model's report: report.json, a table, and pictures of observed half, imagined half and error."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from diwa_core.data.sequences import SequenceIndex, WindowSampler
from diwa_core.data.store import PlayStore
from diwa_core.errors import DataError, SetupError
from diwa_core.sim.skills import SKILLS, skill_progress
from diwa_core.world_model.filter import load_world_model
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.open_loop import HORIZONS, PREFIX, measure_open_loop, print_table, replay
from diwa_core.world_model.probe import SceneProbe, filter_windows, train_probe
from diwa_core.world_model.rssm import State
from diwa_core.world_model.train import PlayData
from diwa_core.world_model.vision import to_uint8

PROBE_FRAMES = 40_000  # of the training play; more changes no figure and only takes time


def load_play(model: WorldModel, paths: list[str], max_frames: int | None = None, labelled: bool = True) -> PlayData:
    """Play as tensors (encoded once if the code is frozen); raises DataError when `labelled` and a store has no simulator labels."""
    data = PlayData([PlayStore.open(path) for path in paths], model.config, max_frames)
    if labelled and len(data.labels) < 2:
        raise DataError(f"{', '.join(paths)}: expected the simulator's labels scene_obs and skill, found {sorted(data.labels)}.")
    if model.config.frozen_embedding:
        with torch.no_grad():
            data.embed(model)
    return data


def write_report(
    checkpoint: str,
    play: list[str],
    validation: list[str],
    rollouts: list[str],
    out: str | Path,
    windows: int = 2000,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """Measure `checkpoint` on held-out play and recorded rollouts; returns the table and writes report.json and pictures to `out`.

    Play of a robot, without the simulated scene, gives pictures only; rollouts without it raise DataError.
    """
    model, loaded = load_world_model(checkpoint, device=device)
    held_out = load_play(model, validation, labelled=False)
    seen = "scene_obs" in held_out.labels
    figures = {"identity": loaded.identity, "seed": seed, "windows": windows, "open_loop": []}
    text = "The held-out play has no simulated scene: pictures only."
    if seen or rollouts:
        data = load_play(model, play, PROBE_FRAMES)
        probe = train_probe(model, data, data.labels["scene_obs"], seed)
    if seen:
        rows = measure_open_loop(model, held_out, held_out.labels["scene_obs"], probe, windows, seed)
        figures["open_loop"], text = [asdict(row) for row in rows], print_table(rows)
    if rollouts:
        replays = measure_replay(model, rollouts, probe)
        figures["replay"] = [asdict(result) for result in replays]
        text += "\n" + "\n".join(
            f"replay {r.skill}: n {r.episodes}, real successes {r.successes}, dream success given real success "
            f"{r.dream_given_success:.2f}, given failure {r.dream_given_failure:.2f}, AUC {r.auc:.2f}"
            for r in replays
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if model.config.views:
        index = WindowSampler(held_out.episodes, 64, PREFIX + max(HORIZONS), (PREFIX, PREFIX), seed).sample(0)
        figures["pictures"] = measured = measure_pictures(model, held_out, index)
        for view, of in measured.items() if not seen else ():
            pairs = zip(of["steps"], of["psnr_db"], strict=True)
            text += f"\n{view}: PSNR in dB after " + ", ".join(f"{steps} steps {level:.1f}" for steps, level in pairs)
        for view in model.config.views:
            columns = open_loop_columns(model, held_out, index, view)
            pick = np.linspace(0, len(columns) - 1, 12).round().astype(int)
            cv2.imwrite(str(out / f"open_loop_{view}.png"), np.concatenate(list(columns[pick]), 1)[..., ::-1])
            write_video(out / f"open_loop_{view}.mp4", columns)
    (out / "report.json").write_text(json.dumps(figures, indent=1))
    (out / "report.txt").write_text(text + "\n")
    return text


def measure_replay(model: WorldModel, rollouts: list[str], probe: SceneProbe):
    """The replay test on recorded evaluation episodes, success by the oracle."""
    data = load_play(model, rollouts)
    scene_obs, skill = data.labels["scene_obs"], data.labels["skill"]
    names, success = [], []
    for start, end in data.episodes:
        name = SKILLS[int(skill[start])]
        names.append(name)
        success.append(skill_progress(name, scene_obs[start], scene_obs[start:end]).max() > 1)
    return replay(model, data, np.array(success), names, probe, skill_progress)


@torch.no_grad()
def imagine_images(model: WorldModel, data: PlayData, index: SequenceIndex, view: str) -> np.ndarray:
    """Decoded images uint8 [B, T, 64, 64, 3] of windows, filtered where observed and open loop elsewhere."""
    states = filter_windows(model, data, index)
    flat = State(states.h.flatten(0, 1), states.z.flatten(0, 1))
    images = [to_uint8(model.decode_images(flat[rows])[view]) for rows in torch.arange(len(flat.h)).split(512)]
    return torch.cat(images).unflatten(0, index.frames.shape).cpu().numpy()


def measure_pictures(model: WorldModel, data: PlayData, index: SequenceIndex) -> dict[str, dict[str, list[float]]]:
    """PSNR (dB) and SSIM per view at the last observed frame and at every horizon."""
    figures: dict[str, dict[str, list[float]]] = {}
    times = [PREFIX - 1, *(PREFIX + h - 1 for h in HORIZONS)]
    for view in model.config.views:
        imagined = imagine_images(model, data, index, view)
        real = data.images[view].numpy()[index.frames]
        figures[view] = {"steps": [0, *HORIZONS], "psnr_db": [], "ssim": []}
        for t in times:
            pairs = list(zip(real[:, t], imagined[:, t], strict=True))
            figures[view]["psnr_db"].append(float(np.mean([peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs])))
            figures[view]["ssim"].append(float(np.mean([structural_similarity(a, b, channel_axis=2, data_range=255) for a, b in pairs])))
    return figures


def open_loop_columns(model: WorldModel, data: PlayData, index: SequenceIndex, view: str, rows: int = 4, scale: int = 2) -> np.ndarray:
    """Pictures uint8 [T, H, W, 3] of a few windows over time: what the camera saw, what the model decodes, and the absolute error.

    Decoded pictures get a red edge once the model runs open loop.
    """
    some = SequenceIndex(index.frames[:rows], index.first[:rows], index.observed[:rows])
    real = data.images[view].numpy()[some.frames]
    imagined = imagine_images(model, data, some, view)
    error = np.abs(real.astype(int) - imagined).astype(np.uint8)
    open_loop = ~some.observed
    imagined[open_loop, 0], imagined[open_loop, :, 0] = (255, 0, 0), (255, 0, 0)
    stacked = np.stack([real, imagined, error], 1)  # [rows, 3, T, 64, 64, 3]
    return stacked.transpose(2, 0, 1, 3, 4, 5).reshape(real.shape[1], -1, 64, 3).repeat(scale, 1).repeat(scale, 2)


def write_video(path: Path, frames: np.ndarray, rate_hz: float = 15.0) -> None:
    """Write RGB frames uint8 [T, H, W, 3] as MP4; raises SetupError when OpenCV has no encoder for it."""
    size = (frames.shape[2], frames.shape[1])
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate_hz, size)
    if not video.isOpened():
        raise SetupError(f"{path}: OpenCV cannot write MP4 here. Install opencv-python-headless from wheels (`make setup`).")
    for frame in frames:
        video.write(np.ascontiguousarray(frame[..., ::-1]))
    video.release()
