"""Offline fine-tuning of one skill: classifier and start bank from recorded data, denoising PPO in imagination, no environment step.

Letters: N starts, F feature.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diwa_core.errors import DataError, DiwaError
from diwa_core.finetune.ppo import DenoisingPPO, PPOConfig
from diwa_core.imagination.dream import Dream
from diwa_core.policy.demonstrations import filter_episode
from diwa_core.policy.diffusion import DiffusionPolicy
from diwa_core.reward.classifier import SuccessClassifier
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.rssm import State

logger = logging.getLogger(__name__)


def demonstration_starts(model: WorldModel, episodes: list[dict[str, np.ndarray]], spread: int = 12, seed: int = 0) -> State:
    """Start bank [N]: for each demonstration, latents filtered from a reset state over the warm-up, beginning at its first frames.

    Beginning at frame 0 is what deployment does; beginnings up to `spread` frames later (still far from success) widen the bank.
    """
    warmup, parts = model.config.warmup_frames, []
    rng = np.random.default_rng(seed)
    for arrays in episodes:
        latest = min(spread, len(arrays["actions"]) // 3)
        for begin in sorted({0, *rng.integers(0, latest + 1, size=3).tolist()}):
            window = {name: values[begin : begin + warmup] for name, values in arrays.items()}
            parts.append(filter_episode(model, window)[-1:])
    if not parts:
        raise DataError("a start bank needs recorded episodes of the skill, found none. Record or mark some.")
    return State(torch.cat([p.h for p in parts]).clone(), torch.cat([p.z for p in parts]).clone())


@torch.no_grad()
def imagined_success(
    model: WorldModel,
    classifier: SuccessClassifier,
    starts: State,
    policy: DiffusionPolicy,
    episodes: int = 512,
    max_chunks: int = 18,
    seed: int = 0,
) -> float:
    """Success rate of `policy`, sampled as at deployment, in imagination from the start bank."""
    dream = Dream(model, classifier, starts, episodes, max_chunks, seed)
    generator = torch.Generator(model.device).manual_seed(seed)
    feature, done, success = dream.reset(), torch.zeros(episodes, dtype=torch.bool), torch.zeros(episodes, dtype=torch.bool)
    for _ in range(max_chunks):
        step = dream.step(policy.sample(feature, generator))
        success |= step.terminated & ~done
        done |= step.terminated | step.truncated
        feature = step.feature
    return success.float().mean().item()


def finetune(
    model: WorldModel,
    classifier: SuccessClassifier,
    starts: State,
    policy: DiffusionPolicy,
    config: PPOConfig,
    run_dir: str | Path,
    seed: int = 0,
    max_chunks: int = 18,
    report: Callable[[dict], None] = lambda metrics: None,
) -> DiffusionPolicy:
    """Denoising PPO in imagination; writes metrics.jsonl and returns the fine-tuned policy. Raises DiwaError when learning breaks down."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    learner = DenoisingPPO(policy, Dream(model, classifier, starts, config.batch, max_chunks, seed), config, seed)
    with (run_dir / "metrics.jsonl").open("w") as log:
        for iteration in range(config.iterations):
            metrics = {"iteration": iteration, **learner.iterate()}
            if not all(np.isfinite(value) for value in metrics.values()):
                raise DiwaError(f"fine-tuning: metrics are not finite at iteration {iteration}: {metrics}. Lower actor_rate.")
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            report(metrics)
    return learner.policy.eval().requires_grad_(False)
