"""Offline fine-tuning of one skill: denoising PPO in imagination, from recorded starts, without an environment step.

Which of the policies met on the way is deployed is decided in imagination too, if possible by a world model that had no part in it.
Letters: N starts, F feature.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diwa_core.data.store import PlayStore
from diwa_core.errors import DataError, DiwaError
from diwa_core.finetune.ppo import DenoisingPPO, PPOConfig
from diwa_core.finetune.resume import load_learner, open_metrics, save_learner
from diwa_core.imagination.dream import Dream
from diwa_core.policy.demonstrations import filter_episode
from diwa_core.policy.diffusion import DiffusionPolicy
from diwa_core.reward.classifier import SuccessClassifier
from diwa_core.run_folder import guard_run
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.probe import readout
from diwa_core.world_model.rssm import State

logger = logging.getLogger(__name__)
MAX_CHUNKS = 18  # 72 steps
POSSIBLE = 0.1  # mean probability of a success in another scene, that of a demonstration: it is low where it is none


@dataclass(frozen=True)
class FinetuneConfig:
    """`judge_every`: iterations between two candidates; `judge_episodes`: dreams that judge a candidate.

    autocast: learning, policy and dreams, runs in bfloat16; judging stays in float32, as deployment.
    """

    ppo: PPOConfig = field(default_factory=PPOConfig)
    judge_every: int = 10
    judge_episodes: int = 384
    report_episodes: int = 1024  # fresh dreams that measure the base policy and the chosen candidate
    seed: int = 1
    autocast: bool = False


@dataclass
class Imagination:
    """Where a policy is fine-tuned and judged. drivers, judges: model numbers.

    starts, judge_starts: banks of each model, each bank from the same recorded frames. Judging from starts that the policy did not learn
    on tells whether it does more than remember scenes.
    """

    models: list[WorldModel]
    classifier: SuccessClassifier
    starts: list[State]
    judge_starts: list[State]
    drivers: tuple[int, ...] = (0,)
    judges: tuple[int, ...] = (0,)
    misplaced_m: float = 0.0  # while learning

    def dream(self, batch: int, seed: int, autocast: bool = False) -> Dream:
        """A batch of dreams to learn in."""
        return Dream(self.models, self.classifier, self.starts, batch, MAX_CHUNKS, seed, self.drivers, self.misplaced_m, autocast)

    @torch.no_grad()
    def success(self, policy: DiffusionPolicy, episodes: int, seed: int = 0, drivers: tuple[int, ...] | None = None) -> float:
        """Success rate of `policy`, sampled as at deployment, from the judges' starts in dreams of the judges (or of `drivers`)."""
        dream = Dream(self.models, self.classifier, self.judge_starts, episodes, MAX_CHUNKS, seed, drivers or self.judges)
        generator = torch.Generator(dream.device).manual_seed(seed)
        feature = dream.reset()
        done = torch.zeros(episodes, dtype=torch.bool, device=dream.device)
        success = done.clone()
        for _ in range(MAX_CHUNKS):
            step = dream.step(policy.sample(feature, generator))
            success |= step.terminated & ~done
            done |= step.terminated | step.truncated
            feature = step.feature
        return success.float().mean().item()


def demonstration_windows(episodes: list[dict[str, np.ndarray]], warmup: int, spread: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """The first `warmup` frames of each episode, as a deployment begins, and of beginnings up to `spread` frames later."""
    rng = np.random.default_rng(seed)
    windows = []
    for arrays in episodes:
        latest = min(spread, len(arrays["actions"]) // 3)  # still far from success
        for begin in sorted({0, *rng.integers(0, latest + 1, size=3).tolist()}):
            windows.append({name: values[begin : begin + warmup] for name, values in arrays.items()})
    return windows


def beginning_windows(store: PlayStore, warmup: int) -> list[dict[str, np.ndarray]]:
    """The first `warmup` frames of each episode of play: the arm where it begins to work, in as many scenes as were recorded."""
    fields = [name for name in store.fields if name != "skill"]
    return [{name: store.read(name, first, first + warmup) for name in fields} for first, end in store.episodes if end - first >= warmup]


@torch.no_grad()
def worth_trying(model: WorldModel, classifier: SuccessClassifier, starts: State, begun: State, ended: State) -> Tensor:
    """Which of `starts` [N] the classifier takes for the beginning of a success, bool [N]: it would be none of an episode that began like
    `begun`, and it could become one, for it differs enough from what demonstrations left behind (`ended`).

    So scenes recorded for any purpose serve as starts of a skill, without asking for the simulator's state.
    """
    now, before, after = (readout(model, states) for states in (starts, begun, ended))
    done = [classifier.success(now, reference.expand_as(now)) for reference in before.split(1)]
    possible = [classifier(reference.expand_as(now), now).sigmoid() for reference in after.split(1)]
    return (torch.stack(done).float().mean(0) < 0.5) & (torch.stack(possible).mean(0) > POSSIBLE)


@torch.no_grad()
def filter_starts(model: WorldModel, windows: list[dict[str, np.ndarray]]) -> State:
    """Start bank [N]: latents filtered from a reset state over each window, as deployment does over its warm-up."""
    if not windows:
        raise DataError("a start bank needs recorded episodes of the skill, found none. Record or mark some.")
    parts = [filter_episode(model, window)[-1:] for window in windows]
    return State(torch.cat([p.h for p in parts]).clone(), torch.cat([p.z for p in parts]).clone())


def finetune(
    imagination: Imagination,
    policy: DiffusionPolicy,
    config: FinetuneConfig,
    run_dir: str | Path,
    report: Callable[[dict], None] = lambda metrics: None,
    is_over: Callable[[], bool] = lambda: False,
    keep: Callable[[DiffusionPolicy, dict], None] = lambda candidate, judgement: None,
    made_from: dict | None = None,
) -> tuple[DiffusionPolicy, dict]:
    """Denoising PPO in imagination; returns the candidate that the judges found best, and what was imagined of it.

    is_over is asked between iterations: when the time is up, the policy of that moment is the last candidate. keep(candidate, {"iteration",
    "judged"}) is given every candidate, the base included. made_from: what else (identities) a run that goes on must have been begun with.
    A killed run in `run_dir` goes on where it stopped, bit for bit. Candidate 0 is the base policy: a run that only does harm in the
    judges' eyes returns it unchanged. Raises DiwaError when learning breaks down; the last good state is kept.
    """
    run_dir = Path(run_dir)
    guard_run(run_dir, asdict(config) | {"made_from": made_from or {}})
    dream = imagination.dream(config.ppo.batch, config.seed, config.autocast)
    learner = DenoisingPPO(policy, dream, config.ppo, config.seed, config.autocast)
    state_path = run_dir / "learner.tar"
    choice = _Choice(policy, learner, imagination, config)
    if state_path.exists():
        choice.load(load_learner(state_path, learner), run_dir)
        logger.info("resumed %s at iteration %d", run_dir, learner.iteration)
    else:
        keep(learner.policy, choice.meta())
    over = is_over()
    with open_metrics(run_dir, learner.iteration) as log:
        while learner.iteration < config.ppo.iterations and not over:
            metrics = {"iteration": learner.iteration, **learner.iterate()}
            if not all(np.isfinite(value) for value in metrics.values()):
                raise DiwaError(
                    f"fine-tuning: metrics are not finite at iteration {metrics['iteration']}: {metrics}. The last good state is in "
                    f"{state_path}. Lower actor_rate (now {config.ppo.actor_rate}) and use another run folder."
                )
            over = is_over() or learner.iteration == config.ppo.iterations
            if over or learner.iteration % config.judge_every == 0:
                metrics["judged"] = choice.consider(run_dir)
                keep(learner.policy, {"iteration": learner.iteration, "judged": metrics["judged"]})
                save_learner(state_path, learner, choice.meta())
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            report(metrics)
    return choice.result()


class _Choice:
    """Remembers the candidate that the judges found best."""

    def __init__(self, base: DiffusionPolicy, learner: DenoisingPPO, imagination: Imagination, config: FinetuneConfig) -> None:
        self.base, self.learner, self.imagination, self.config = base, learner, imagination, config
        self.judged, self.iteration, self.weights = self._judge(), 0, self._copy()

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.learner.policy.finetuned.state_dict().items()}

    def _judge(self) -> float:
        return self.imagination.success(self.learner.policy, self.config.judge_episodes, self.config.seed)

    def consider(self, run_dir: Path) -> float:
        """Judge the present policy."""
        judged = self._judge()
        if judged >= self.judged:
            self.judged, self.iteration, self.weights = judged, self.learner.iteration, self._copy()
            temporary = run_dir / "best.tmp"
            save_file(self.weights, temporary)
            os.replace(temporary, run_dir / "best.safetensors")
        return judged

    def meta(self) -> dict:
        return {"judged": self.judged, "iteration": self.iteration}

    def load(self, meta: dict, run_dir: Path) -> None:
        self.judged, self.iteration = meta["judged"], meta["iteration"]
        if self.iteration:
            self.weights = load_file(run_dir / "best.safetensors", device=str(self.learner.feature.device))

    def result(self) -> tuple[DiffusionPolicy, dict]:
        """The chosen policy, and success imagined in fresh dreams: of the base and the chosen policy, by drivers and by judges."""
        chosen = self.learner.policy
        chosen.finetuned.load_state_dict(self.weights)
        chosen = chosen.eval().requires_grad_(False)
        found: dict = {"iteration": self.iteration}
        for name, policy in (("before", self.base), ("after", chosen)):
            arguments = (policy, self.config.report_episodes, self.config.seed + 1)
            found[f"imagined_{name}"] = self.imagination.success(*arguments, drivers=self.imagination.drivers)
            found[f"judged_{name}"] = self.imagination.success(*arguments)
        return chosen, found
