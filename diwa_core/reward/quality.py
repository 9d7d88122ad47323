"""Calibrate success classifiers on whole episodes, and measure them: precision, recall and reliability of frames and of episodes.

Letters: N judgements, B windows, T frames after the warm-up.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from diwa_core.reward.classifier import SuccessClassifier
from diwa_core.reward.windows import Windows

BINS = 10
_EVENT_GAP = 30  # frames between two successes that count as different ones


def calibrate(classifier: SuccessClassifier, windows: Windows, skill: str) -> float:
    """Set scale, shift and threshold so that they judge whole episodes, filtered and imagined together; returns the threshold.

    An episode's probability is its highest frame's. Scale and shift are Platt's (1999, with his smoothed targets); the threshold is the
    one of best balanced accuracy. There must be successes and failures (`check_successes`).
    """
    real = episode_success(windows, skill)
    classifier.scale.fill_(1.0)
    classifier.shift.fill_(0.0)
    best = torch.cat([best_logit(classifier.judge(now, windows.start), windows) for now in (windows.filtered, windows.imagined)])
    best, real = best.double().cpu().numpy(), np.tile(real, 2)
    scale, shift = _platt(best, real)
    classifier.scale.fill_(scale)
    classifier.shift.fill_(shift)
    best = expit(scale * best + shift)
    candidates = np.linspace(0.05, 0.95, 91)
    accuracy = [(best[real] > c).mean() + (best[~real] <= c).mean() for c in candidates]
    classifier.threshold.fill_(float(np.median(candidates[np.isclose(accuracy, max(accuracy))])))
    return classifier.threshold.item()


def _platt(logit: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Scale and shift of logits [N] that make them the log-odds of `real` [N]."""
    high, low = (real.sum() + 1) / (real.sum() + 2), 1 / ((~real).sum() + 2)
    target = np.where(real, high, low)

    def loss(parameters: np.ndarray) -> float:
        moved = np.exp(parameters[0]) * logit + parameters[1]
        return float(np.mean(np.logaddexp(0, moved) - target * moved))

    log_scale, shift = minimize(loss, np.zeros(2), method="Nelder-Mead").x
    return float(np.exp(log_scale)), float(shift)


def episode_success(windows: Windows, skill: str) -> np.ndarray:
    """Whether each window holds a success, bool [B]."""
    return (windows.success[skill] & windows.valid).any(1).cpu().numpy()


def best_logit(logits: Tensor, windows: Windows) -> Tensor:
    """The highest of logits [B, T] in each window [B]."""
    return logits.masked_fill(~windows.valid, -torch.inf).amax(1)


def measure_quality(classifier: SuccessClassifier, windows: Windows, skill: str) -> dict:
    """Figures on filtered and on imagined frames, each for single frames and for whole episodes (their highest frame).

    `events` is the number of different real successes: windows overlap, so it says how much the figures can be trusted.
    """
    real, success, valid = episode_success(windows, skill), windows.success[skill], windows.valid
    figures: dict = {"events": count_events(windows, skill)}
    for name in ("filtered", "imagined"):
        logits = classifier.judge(getattr(windows, name), windows.start)
        probability, best = logits.sigmoid(), best_logit(logits, windows).sigmoid().cpu().numpy()
        threshold = classifier.threshold.item()
        figures[name] = {
            "frames": compare(probability[valid].cpu().numpy(), success[valid].cpu().numpy(), threshold),
            "episodes": compare(best, real, threshold),
        }
    return figures


def compare(probability: np.ndarray, real: np.ndarray, threshold: float) -> dict:
    """Precision and recall at `threshold`, and reliability, of probabilities [N] for outcomes [N]; None where undefined."""
    said = probability > threshold
    hits = int((said & real).sum())

    def share(part: int) -> float | None:
        return hits / part if part else None

    return {
        "precision": share(int(said.sum())),
        "recall": share(int(real.sum())),
        "count": len(real),
        "successes": int(real.sum()),
        "reliability": reliability(probability, real),
    }


def reliability(probability: np.ndarray, real: np.ndarray) -> dict:
    """Per tenth of the probability scale: mean probability, observed share of successes (None where empty), count; and the expected
    calibration error, the mean difference of the two weighted by the counts (Guo et al. 2017)."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, weights, minlength=BINS) for weights in (probability, real)]
    means = [[float(s / n) if n else None for s, n in zip(total, count, strict=True)] for total in sums]
    error = float(np.abs(sums[0] - sums[1]).sum() / len(real))
    return {"probability": means[0], "observed": means[1], "count": count.tolist(), "expected_error": error}


def count_events(windows: Windows, skill: str) -> int:
    """Number of different real successes in overlapping windows."""
    hit = windows.success[skill] & windows.valid
    good = hit.any(1)
    onset = np.sort((windows.frame[good] + hit[good].int().argmax(1)).cpu().numpy())
    return int((np.diff(onset) > _EVENT_GAP).sum()) + bool(len(onset))
