"""The monitor: how far the running world model's open-loop predictions are from what came, and when that is too far.

From each of the last frames the model goes on without looking, with the actions that were really executed; every new frame is compared
with what was expected of it 1, 4 and 12 frames ago. Compared are embeddings, and an open loop begins at the embedding of its frame: a
posterior believes only a share of what it sees, so it would hide a surprise, and trail behind it for long.
Letters: B batch, T time, J open loops (the largest horizon), K horizons, G groups, E embedding, A action.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diwa_core.config import from_dict, to_dict
from diwa_core.contract import PROPRIO_SIZE
from diwa_core.errors import CheckpointError, ConfigError, DataError, DiwaError
from diwa_core.world_model.command import COMMANDED
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.rssm import State

HORIZONS = (1, 4, 12)  # frames ahead
MAX_HORIZON = 120
FORMAT = "diwa_monitor"
FORMAT_VERSION = 1


def list_groups(model: WorldModel) -> dict[str, list[int]]:
    """Entries of the embedding [E] by name: commanded pose, arm, (scene,) one group for each view.

    Raises ConfigError for models that do not predict their embedding.
    """
    config = model.config
    if not config.frozen_embedding:
        raise ConfigError(f"monitor: expected a world model with frozen image codes, found '{config.name}', which predicts pixels.")
    commanded = list(range(COMMANDED.start, COMMANDED.stop))
    groups = {"commanded pose": commanded, "arm": [i for i in range(PROPRIO_SIZE) if i not in commanded]}
    end = PROPRIO_SIZE
    for name, size in (("scene", config.scene_size), *zip(config.views, config.code_sizes, strict=True)):
        if size:
            groups[name] = list(range(end, end + size))
        end += size
    return groups


class OpenLoops:
    """The model's predictions of the present frame from each of the last frames, all advanced together.

    Row j of `states` [B, J, ..] began j + 1 frames ago. Predictions from frames before the model was warm are NaN.
    """

    def __init__(self, model: WorldModel, batch: int = 1, horizons: tuple[int, ...] = HORIZONS) -> None:
        self.model, self.batch, self.horizons = model, batch, horizons
        self.generator = torch.Generator(model.device)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.frames = 0
        self.states: State | None = None
        self.generator.manual_seed(0)

    @torch.inference_mode()
    def compare(self, action: Tensor, embedding: Tensor, state: State) -> Tensor:
        """What came less what was expected [B, K, E] of the frame with `embedding` [B, E] that `action` [B, A] led into.

        state [B, ..]: of the filter, after that frame.
        """
        residuals = embedding.new_full((self.batch, len(self.horizons), embedding.shape[-1]), torch.nan)
        if self.states is not None:
            rows = self.states.h.shape[1]
            flat = State(self.states.h.flatten(0, 1), self.states.z.flatten(0, 1))
            flat = self.model.rssm.imagine(flat, action.repeat_interleave(rows, 0), self.generator)
            self.states = State(flat.h.unflatten(0, (self.batch, rows)), flat.z.unflatten(0, (self.batch, rows)))
            for k, horizon in enumerate(self.horizons):
                if horizon <= rows:
                    residuals[:, k] = embedding - self.model.decode_embedding(self.states[:, horizon - 1])
        self.frames += 1
        if self.frames >= self.model.config.warmup_frames:
            self._begin(embedding, state)
        return residuals

    def _begin(self, embedding: Tensor, state: State) -> None:
        """One more open loop, from the present frame; the oldest ends."""
        z = embedding if self.model.config.latent == "residual" else state.z
        h, z = state.h[:, None], z[:, None]
        if self.states is not None:
            keep = max(self.horizons) - 1
            h, z = (torch.cat([new, old[:, :keep]], 1) for new, old in ((h, self.states.h), (z, self.states.z)))
        self.states = State(h, z)


@torch.inference_mode()
def compare_sequences(model: WorldModel, embeddings: Tensor, actions: Tensor) -> np.ndarray:
    """Residuals float32 [B, T, K, E] of recorded sequences: embeddings [B, T, E], actions [B, T, A] that led into each frame."""
    batch, length = embeddings.shape[:2]
    loops, state = OpenLoops(model, batch), model.rssm.initial(batch)
    generator = torch.Generator(model.device).manual_seed(0)
    residuals = []
    for t in range(length):
        state = model.rssm.observe(state, actions[:, t], embeddings[:, t], generator)
        residuals.append(loops.compare(actions[:, t], embeddings[:, t], state))
    return torch.stack(residuals, 1).float().cpu().numpy()


def group_errors(residuals: np.ndarray, groups: dict[str, list[int]], deviations: np.ndarray | float = 1.0) -> np.ndarray:
    """Root mean square over each group's entries [.., K, G] of residuals [.., K, E] in units of `deviations` [K, E]."""
    squares = np.square(residuals / deviations)
    return np.sqrt(np.stack([squares[..., entries].mean(-1) for entries in groups.values()], -1))


# -- judging ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """What is usual: the deviations of residuals on held-out play, and the limits that clean play passes so many times an hour.

    deviations [K][E]; limits [K][G]: of a group's error, that is alarming when passed for `debounce_frames` frames in a row.
    """

    world_model: str
    horizons: tuple[int, ...]
    groups: tuple[str, ...]
    deviations: tuple[tuple[float, ...], ...]
    limits: tuple[tuple[float, ...], ...]
    debounce_frames: int
    false_alarms_per_hour: float
    hours: float = 0.0  # of play it was made from
    stores: tuple[str, ...] = ()  # their content hashes

    def __post_init__(self) -> None:
        shapes = np.shape(self.deviations)[:1], np.shape(self.limits)
        if shapes != ((len(self.horizons),), (len(self.horizons), len(self.groups))):
            raise ConfigError("calibration: expected deviations and limits for every horizon and group, found others. Calibrate again.")
        for name in ("deviations", "limits"):
            values = np.asarray(getattr(self, name), float)
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise ConfigError(f"calibration: expected finite, positive {name}, found others. Calibrate again.")
        if not self.horizons or not all(1 <= horizon <= MAX_HORIZON for horizon in self.horizons):
            raise ConfigError(f"calibration.horizons: expected 1 to {MAX_HORIZON} frames, found {self.horizons}.")
        if self.debounce_frames < 1:
            raise ConfigError(f"calibration.debounce_frames: expected at least 1, found {self.debounce_frames}.")

    def limits_of(self, group: str) -> str:
        """The limits of a group, for people."""
        column = self.groups.index(group)
        return ", ".join(f"{row[column]:.1f} at {k}" for row, k in zip(self.limits, self.horizons, strict=True))

    def save(self, path: str | Path) -> None:
        """Write JSON; whatever was there is replaced in one step."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "calibration": to_dict(self)}, indent=1) + "\n")
        os.replace(temporary, path)

    @staticmethod
    def load(path: str | Path, model: WorldModel, identity: str) -> Calibration:
        """Read the calibration of the world model `identity`. Raises CheckpointError when it is missing, damaged or of another one."""
        mend = "Make one with `diwa world-model monitor calibrate`."
        try:
            values = json.loads(Path(path).read_text())
            if not isinstance(values, dict) or (values.get("format"), values.get("version")) != (FORMAT, FORMAT_VERSION):
                raise ConfigError(f"expected a {FORMAT} file of version {FORMAT_VERSION}, found something else.")
            calibration = from_dict(Calibration, values.get("calibration"), "calibration")
        except (OSError, ValueError, DiwaError) as error:
            raise CheckpointError(f"{path}: cannot be read as the monitor's calibration: {error} {mend}") from error
        if calibration.world_model != identity:
            raise CheckpointError(
                f"{path}: expected a calibration of world model {identity[:16]}, found one of {calibration.world_model[:16]}. {mend}"
            )
        groups, size = tuple(list_groups(model)), model.embedding_size
        if calibration.groups != groups or np.shape(calibration.deviations)[1:] != (size,):
            raise CheckpointError(f"{path}: expected groups {groups} of {size} entries, found {calibration.groups}. {mend}")
        return calibration


@dataclass(frozen=True)
class Surprise:
    """The verdict on one frame. errors float64 [K, G], NaN where nothing was expected yet; score: 1 is the limit."""

    errors: np.ndarray
    score: float = 0.0
    worst: str = ""
    alarm: bool = False


class Monitor:
    """Watches one filter, frame by frame. Without a calibration it measures and judges nothing."""

    def __init__(self, model: WorldModel, calibration: Calibration | None = None) -> None:
        """Raises ConfigError for a model that does not predict its embedding."""
        self.groups = list_groups(model)
        self.calibration = calibration
        self.horizons = calibration.horizons if calibration else HORIZONS
        self.loops = OpenLoops(model, 1, self.horizons)
        self.deviations = np.asarray(calibration.deviations) if calibration else 1.0
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next frame is the first."""
        self.loops.reset()
        self.above = np.zeros((len(self.horizons), len(self.groups)), int)  # frames in a row over the limit

    def update(self, action: Tensor, embedding: Tensor, state: State) -> Surprise:
        """Judge the frame with `embedding` [1, E] that `action` [1, A] led into; `state` [1, ..] of the filter after it.

        An error that is not finite is an alarm at once.
        """
        begun = self.loops.states.h.shape[1] if self.loops.states is not None else 0
        residuals = self.loops.compare(action, embedding, state)[0].float().cpu().numpy().astype(np.float64)
        errors = group_errors(residuals, self.groups, self.deviations)
        if self.calibration is None:
            return Surprise(errors)
        expected = np.array(self.horizons)[:, None] <= begun
        ratios = np.where(expected, errors / np.asarray(self.calibration.limits), 0.0)
        ratios = np.where(np.isfinite(ratios), ratios, math.inf)
        self.above = np.where(ratios > 1, self.above + 1, 0)
        alarming = (self.above >= self.calibration.debounce_frames) | np.isinf(ratios)
        k, g = np.unravel_index(np.argmax(np.where(alarming, ratios, 0.0) if alarming.any() else ratios), ratios.shape)
        worst = f"{self.calibration.groups[g]}, {self.horizons[k]} ahead" if expected.any() else ""
        return Surprise(errors, float(ratios[k, g]), worst, bool(alarming.any()))


def judge(residuals: np.ndarray, model: WorldModel, calibration: Calibration) -> np.ndarray:
    """On which frames of a recorded episode the running monitor would raise its alarm, per group: bool [T, G]; residuals [T, K, E]."""
    errors = group_errors(residuals.astype(np.float64), list_groups(model), np.asarray(calibration.deviations))
    ratios = errors / np.asarray(calibration.limits)
    alarms = [[debounce(ratios[:, k, g], calibration.debounce_frames) > 1 for k in range(ratios.shape[1])] for g in range(ratios.shape[2])]
    return np.array(alarms).any(1).T


# -- calibrating -----------------------------------------------------------------------------------------------------------------------

LEVEL_QUANTILE = 0.99  # brings the horizons of a group to one scale
BASE_QUANTILE = 0.95  # where the tail begins
APART_FRAMES = 30  # peaks nearer than this are one event
MIN_PEAKS = 20  # of a group, for a tail to be fitted
MIN_DEVIATION = 0.01  # standard deviations of the play: an entry that the model knows exactly must not decide by its rounding
MAX_SHAPE = 0.5  # a generalised Pareto tail heavier than this is an artefact of few peaks


@dataclass(frozen=True)
class Tail:
    """Peaks over `base` are generalised Pareto (Pickands 1975; Coles 2001, chapter 4) and come `peaks_per_hour` times an hour."""

    base: float
    shape: float
    scale: float
    peaks_per_hour: float
    peaks: int

    def level(self, times_per_hour: float) -> float:
        """What is passed so many times an hour."""
        ratio = max(self.peaks_per_hour / times_per_hour, 1.0)
        growth = math.log(ratio) if self.shape == 0 else (ratio**self.shape - 1) / self.shape
        return self.base + self.scale * growth


def debounce(scores: np.ndarray, frames: int) -> np.ndarray:
    """The least of the last `frames` scores [T]: what all of them have passed; NaN counts as nothing."""
    padded = np.concatenate([np.zeros(frames - 1), np.nan_to_num(scores, nan=0.0)])
    return np.lib.stride_tricks.sliding_window_view(padded, frames).min(-1)


def find_peaks(scores: np.ndarray, base: float, apart: int = APART_FRAMES) -> list[float]:
    """The highest score of every event in [T]: passages of `base` less than `apart` frames from each other are one event."""
    over = np.flatnonzero(scores > base)
    events = np.split(over, np.flatnonzero(np.diff(over) > apart) + 1) if len(over) else []
    return [float(scores[event].max()) for event in events]


def fit_tail(episodes: list[np.ndarray], hours: float) -> Tail:
    """Tail of debounced scores, one array [T] for each episode. Raises DataError when there are too few peaks."""
    from scipy import stats

    base = float(np.quantile(np.concatenate(episodes), BASE_QUANTILE))
    excess = np.array([peak - base for scores in episodes for peak in find_peaks(scores, base)])
    if len(excess) < MIN_PEAKS:
        raise DataError(
            f"monitor: expected at least {MIN_PEAKS} separate peaks in the errors, to fit a tail to, found {len(excess)} "
            f"in {60 * hours:.1f} minutes of play. Calibrate on more held-out play."
        )
    shape, _, scale = stats.genpareto.fit(excess, floc=0)
    if not 0 <= shape <= MAX_SHAPE:
        shape = min(max(shape, 0.0), MAX_SHAPE)
        _, _, scale = stats.genpareto.fit(excess, fc=shape, floc=0)
    return Tail(base, float(shape), float(scale), len(excess) / hours, len(excess))


def calibrate(
    residuals: list[np.ndarray],
    model: WorldModel,
    identity: str,
    rate_hz: float,
    false_alarms_per_hour: float = 1.0,
    debounce_frames: int = 3,
    stores: tuple[str, ...] = (),
) -> tuple[Calibration, dict[str, Tail]]:
    """Calibration from the residuals [T, K, E] of held-out episodes, and the tail of each group.

    Every group may give its share of the false alarms. Raises DataError on too little data and on residuals that are not
    finite, ConfigError on a rate or debounce that is not positive.
    """
    if not false_alarms_per_hour > 0 or debounce_frames < 1:
        found = f"{false_alarms_per_hour} and {debounce_frames}"
        raise ConfigError(f"monitor: expected more than 0 false alarms per hour and a debounce of at least 1 frame, found {found}.")
    groups = list_groups(model)
    warm = [part[model.config.warmup_frames + max(HORIZONS) - 1 :] for part in residuals]
    for number, part in enumerate(warm):
        if not np.isfinite(part).all():
            raise DataError(f"monitor: expected finite prediction errors, found others in episode {number}. Leave it out.")
    frames = sum(len(part) for part in warm)
    if not frames:
        raise DataError(f"monitor: expected episodes longer than {model.config.warmup_frames + max(HORIZONS)} frames, found none.")
    hours = frames / rate_hz / 3600
    everything = np.concatenate(warm).astype(np.float64)
    deviations = np.sqrt(np.square(everything).mean(0)).clip(MIN_DEVIATION)
    levels = np.quantile(group_errors(everything, groups, deviations), LEVEL_QUANTILE, axis=0).clip(1.0)
    limits, tails = np.zeros_like(levels), {}
    errors = [group_errors(part.astype(np.float64), groups, deviations) / levels for part in warm]
    for g, name in enumerate(groups):
        scores = [np.stack([debounce(part[:, k, g], debounce_frames) for k in range(part.shape[1])]).max(0) for part in errors]
        tails[name] = fit_tail(scores, hours)
        limits[:, g] = levels[:, g] * tails[name].level(false_alarms_per_hour / len(groups))
    calibration = Calibration(
        identity, HORIZONS, tuple(groups), to_tuples(deviations), to_tuples(limits), debounce_frames, false_alarms_per_hour, hours, stores
    )
    return calibration, tails


def to_tuples(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """[K, N] as nested tuples."""
    return tuple(tuple(float(value) for value in row) for row in values)
