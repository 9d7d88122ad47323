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
FALSE_ALARM_COST = 2.0  # of a rewarded failure, in missed successes: a policy finds what is rewarded too early and exploits it
_THRESHOLD_SLACK = 0.005  # of the score: less is no reason to leave 0.5, which is where Platt's scaling puts the even odds
_EVENT_GAP = 30  # frames between two successes that count as different ones


def calibrate(classifier: SuccessClassifier, windows: Windows, skill: str) -> None:
    """Set scale and shift so that they judge whole episodes, filtered and imagined together, and the threshold of each of the two.

    An episode's probability is its highest frame's. Scale and shift are Platt's (1999, with his smoothed targets); thresholds are
    `choose_threshold`'s. There must be successes and failures (`check_successes`).
    """
    real = windows.success(skill).any(1).cpu().numpy()
    classifier.scale.fill_(1.0)
    classifier.shift.fill_(0.0)
    seen, dreamt = (
        best_logit(classifier.judge(now, windows.start), windows).double().cpu().numpy() for now in (windows.filtered, windows.imagined)
    )
    scale, shift = _platt(np.concatenate([seen, dreamt]), np.tile(real, 2))
    classifier.scale.fill_(scale)
    classifier.shift.fill_(shift)
    classifier.filtered_threshold.fill_(choose_threshold(expit(scale * seen + shift), real))
    classifier.threshold.fill_(choose_threshold(expit(scale * dreamt + shift), real))


def choose_threshold(probability: np.ndarray, real: np.ndarray) -> float:
    """The threshold nearest to 0.5 of those at which probabilities [N] tell outcomes [N] best.

    The score is the share of successes found minus FALSE_ALARM_COST times the share of failures taken for one, so that probabilities that
    tell nothing reward nothing.
    """
    candidates = np.linspace(0.05, 0.99, 95)
    found, alarms = ((probability[which] > candidates[:, None]).mean(1) for which in (real, ~real))
    score = found - FALSE_ALARM_COST * alarms
    good = candidates[score >= score.max() - _THRESHOLD_SLACK]
    return float(good[np.abs(good - 0.5).argmin()])


def _platt(logit: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Scale and shift of logits [N] that make them the log-odds of `real` [N]."""
    high, low = (real.sum() + 1) / (real.sum() + 2), 1 / ((~real).sum() + 2)
    target = np.where(real, high, low)

    def loss(parameters: np.ndarray) -> float:
        moved = np.exp(parameters[0]) * logit + parameters[1]
        return float(np.mean(np.logaddexp(0, moved) - target * moved))

    log_scale, shift = minimize(loss, np.zeros(2), method="Nelder-Mead").x
    return float(np.exp(log_scale)), float(shift)


def best_logit(logits: Tensor, windows: Windows) -> Tensor:
    """The highest of logits [B, T] in each window [B]."""
    return logits.masked_fill(~windows.valid, -torch.inf).amax(1)


def measure_quality(classifier: SuccessClassifier, windows: Windows, skill: str) -> dict:
    """Figures on filtered and on imagined frames, each for single frames and for whole episodes (their highest frame).

    `events` is the number of different real successes: windows overlap, so it says how much the figures can be trusted.
    """
    success, valid = windows.success(skill), windows.valid
    real = success.any(1).cpu().numpy()
    figures: dict = {"events": count_events(windows, skill)}
    for name in ("filtered", "imagined"):
        logits = classifier.judge(getattr(windows, name), windows.start)
        probability, best = logits.sigmoid(), best_logit(logits, windows).sigmoid().cpu().numpy()
        threshold = (classifier.filtered_threshold if name == "filtered" else classifier.threshold).item()
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
    hit = windows.success(skill)
    good = hit.any(1)
    onset = np.sort((windows.frame[good] + hit[good].int().argmax(1)).cpu().numpy())
    return int((np.diff(onset) > _EVENT_GAP).sum()) + bool(len(onset))
