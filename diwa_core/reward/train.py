"""Train and calibrate success classifiers on recorded play whose frames can be judged (simulator's oracle, or an operator's marks).

Windows of play give everything at once: successes, near misses, and frames where nothing happened, as filtered and as imagined latents.
Letters: B windows, T frames after the warm-up, R read-out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diwa_core.data.sequences import SequenceIndex
from diwa_core.errors import DataError
from diwa_core.reward.classifier import ClassifierConfig, SuccessClassifier
from diwa_core.sim.skills import skill_progress
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.probe import filter_windows, readout
from diwa_core.world_model.train import PlayData

logger = logging.getLogger(__name__)
HORIZON = 72


@dataclass
class Windows:
    """Read-outs after the warm-up: start [B, R], filtered and imagined [B, T, R], and whether each frame is a success [B, T]."""

    start: Tensor
    filtered: Tensor
    imagined: Tensor
    success: Tensor


@dataclass
class Quality:
    """Precision and recall of frames and of whole episodes (any frame), on filtered and on imagined latents."""

    frame_precision: float
    frame_recall: float
    episode_precision: float
    episode_recall: float
    episodes: int


def collect_windows(model: WorldModel, data: PlayData, skill: str, count: int, seed: int) -> Windows:
    """`count` windows of labelled play, half of them with a success in them. Raises DataError without any."""
    scene_obs, warmup = data.labels["scene_obs"], model.config.warmup_frames
    length = warmup + HORIZON
    starts = np.concatenate([np.arange(start, end - length + 1) for start, end in data.episodes])
    frames = starts[:, None] + np.arange(length)
    progress = skill_progress(skill, scene_obs[frames[:, warmup - 1], None], scene_obs[frames[:, warmup:]])
    success = progress > 1
    rng = np.random.default_rng(seed)
    good, bad = np.flatnonzero(success.any(1)), np.flatnonzero(~success.any(1))
    if not len(good):
        raise DataError(f"skill '{skill}': the play holds no success within {HORIZON} frames; record some, or mark the ones there are.")
    near = bad[np.argsort(-progress[bad].max(1))[: max(1, len(bad) // 4)]]  # near misses teach the most
    pick = np.concatenate(
        [rng.choice(good, count // 2), rng.choice(near, count // 4), rng.choice(bad, count - count // 2 - count // 4)]
    )
    index = SequenceIndex(frames[pick], np.arange(length)[None].repeat(count, 0) == 0, np.ones((count, length), bool))
    filtered = readout(model, filter_windows(model, data, index))
    index.observed = np.broadcast_to(np.arange(length) < warmup, (count, length))
    imagined = readout(model, filter_windows(model, data, index))
    return Windows(filtered[:, warmup - 1], filtered[:, warmup:], imagined[:, warmup:], torch.from_numpy(success[pick]))


def train_classifier(windows: Windows, seed: int = 0, config: ClassifierConfig | None = None) -> SuccessClassifier:
    """Fit a classifier on filtered and imagined frames alike."""
    config = config or ClassifierConfig(windows.start.shape[-1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = SuccessClassifier(config).train()
        now = torch.cat([windows.filtered, windows.imagined]).flatten(0, 1)
        start = windows.start.repeat(2, 1)
        success = windows.success.repeat(2, 1)
        time = success.shape[1]
        success = success.flatten()
        classifier.mean.copy_(now.mean(0))
        classifier.std.copy_(now.std(0).clamp_min(1e-2))
        positive, negative = success.nonzero().squeeze(1), (~success).nonzero().squeeze(1)
        optimizer = torch.optim.AdamW(classifier.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.updates)
        for _ in range(config.updates):
            rows = torch.cat([part[torch.randint(len(part), (config.batch // 2,))] for part in (positive, negative)])
            loss = classifier.loss(now[rows], start[rows // time], success[rows].float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def probabilities(classifier: SuccessClassifier, now: Tensor, start: Tensor) -> Tensor:
    """Success probability of every frame [B, T]."""
    repeated = start[:, None].expand(-1, now.shape[1], -1)
    return torch.cat([classifier(n, s).sigmoid() for n, s in zip(now.split(64), repeated.split(64), strict=True)])


def calibrate(classifier: SuccessClassifier, windows: Windows) -> float:
    """Set the threshold that judges whole episodes best (balanced accuracy of 'any frame'), filtered and imagined together; returns it."""
    best = torch.cat([probabilities(classifier, now, windows.start).amax(1) for now in (windows.filtered, windows.imagined)])
    real = windows.success.any(1).repeat(2)
    candidates = torch.linspace(0.3, 0.99, 70)
    accuracy = torch.stack([((best > c) & real).sum() / real.sum() + ((best <= c) & ~real).sum() / (~real).sum() for c in candidates])
    classifier.threshold.fill_(candidates[accuracy >= accuracy.max() - 1e-6].median())
    return classifier.threshold.item()


def measure_quality(classifier: SuccessClassifier, now: Tensor, start: Tensor, success: Tensor) -> Quality:
    """Precision and recall on read-outs now [B, T, R] at the calibrated threshold."""
    fired = probabilities(classifier, now, start) > classifier.threshold

    def pair(said: Tensor, real: Tensor) -> tuple[float, float]:
        hits = (said & real).sum().item()
        return hits / max(said.sum().item(), 1), hits / max(real.sum().item(), 1)

    return Quality(*pair(fired, success), *pair(fired.any(1), success.any(1)), len(success))
