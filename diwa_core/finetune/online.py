"""DPPO, the online baseline: the same denoising PPO as in imagination, run in the simulator, its budget counted in environment steps.

Letters: B play tables, C chunks, H chunk, A action, F feature, N frames.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diwa_core.contract import low_vector
from diwa_core.errors import CheckpointError, ConfigError, DiwaError
from diwa_core.evaluate.evaluation import evaluate, plan_episodes
from diwa_core.evaluate.rollout import MAX_STEPS, executable
from diwa_core.evaluate.statistics import success_rate
from diwa_core.finetune.ppo import DenoisingPPO
from diwa_core.finetune.resume import load_learner, open_metrics, save_learner
from diwa_core.imagination.dream import DreamStep
from diwa_core.policy.diffusion import DiffusionPolicy
from diwa_core.sim.episodes import EpisodePool, EpisodeSettings, EpisodeState, Frames
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.rssm import State

logger = logging.getLogger(__name__)


class BatchFilter:
    """LatentFilter for `batch` environments at once: the same numbers, one pass through the networks for all."""

    def __init__(self, model: WorldModel, batch: int) -> None:
        self.model = model
        self.generators = [torch.Generator(model.device) for _ in range(batch)]
        self.state = model.rssm.initial(batch).detach()
        self.reset(list(range(batch)))

    def reset(self, rows: list[int]) -> None:
        """Forget what was seen in the environments `rows`; their next frames are the first."""
        fresh, chosen = self.model.rssm.initial(1), torch.zeros(len(self.generators), 1, dtype=torch.bool, device=self.model.device)
        chosen[rows] = True
        self.state = State(torch.where(chosen, fresh.h, self.state.h), torch.where(chosen, fresh.z, self.state.z)).detach()
        for row in rows:
            self.generators[row].manual_seed(0)  # as LatentFilter does

    @torch.no_grad()
    def update(self, frames: dict[int, Frames]) -> Tensor:
        """Filter the frames (N may differ) of the environments that are keys of `frames`; returns the features [B, F] of all."""
        rows, counts = list(frames), [len(values["actions"]) for values in frames.values()]
        if not rows:
            return self.state.feature.float()
        together = {name: np.concatenate([values[name] for values in frames.values()]) for name in frames[rows[0]]}
        embeddings = self._embed(together).split(counts)
        actions = torch.from_numpy(together["actions"]).to(self.model.device).split(counts)
        for t in range(max(counts)):
            active = [i for i, count in enumerate(counts) if count > t]
            where = [rows[i] for i in active]
            self._observe(where, torch.stack([actions[i][t] for i in active]), torch.stack([embeddings[i][t] for i in active]))
        return self.state.feature.float()

    def _embed(self, frames: Frames) -> Tensor:
        config, device = self.model.config, self.model.device
        low = low_vector(frames["robot_obs"], frames["target_pose"], frames["scene_obs"], config.scene_size)
        images = {view: torch.from_numpy(frames[view]).to(device) for view in config.views}
        return self.model.embed(torch.from_numpy(low).to(device), images)

    def _observe(self, rows: list[int], action: Tensor, embedding: Tensor) -> None:
        """RSSM.observe of some rows, each with its own noise: that of an episode must not depend on the others."""
        rssm = self.model.rssm
        h, parameters = rssm.estimate(self.state[rows], action, embedding)
        z = torch.cat([rssm.latent.sample(parameters[i : i + 1], self.generators[row]) for i, row in enumerate(rows)])
        state = State(self.state.h.clone(), self.state.z.clone())
        state.h[rows], state.z[rows] = h, z
        self.state = state


class SimulatorEnv:
    """`batch` play tables as the environment of DenoisingPPO: the interface of Dream, success judged by the skill's oracle.

    Starts are fresh ones of the training split. `env_steps` counts every simulator step, warm-ups included.
    Use as a context, or call `close`.
    """

    def __init__(self, model: WorldModel, skill: str, batch: int, workers: int = 2, seed: int = 0, horizon: int = 4) -> None:
        settings = EpisodeSettings(skill, seed, model.config.warmup_frames, MAX_STEPS // horizon, tuple(model.config.views))
        self.pool, self.filter = EpisodePool(settings, batch, workers), BatchFilter(model, batch)
        self.env_steps = 0

    def reset(self) -> Tensor:
        """Start all episodes anew; returns features [B, F]."""
        frames = dict(enumerate(self.pool.begin()))
        self.env_steps += sum(len(values["actions"]) - 1 for values in frames.values())
        self.filter.reset(list(frames))
        return self.filter.update(frames)

    def step(self, chunk: Tensor) -> DreamStep:
        """Execute `chunk` [B, H, A] open loop; an episode ends on the frame on which the oracle is true, or after its last chunk."""
        results = self.pool.run(executable(chunk.cpu().numpy()))
        self.env_steps += sum(result.steps for result in results)
        final = self.filter.update({i: result.frames for i, result in enumerate(results)})
        fresh = {i: result.fresh for i, result in enumerate(results) if result.fresh is not None}
        self.filter.reset(list(fresh))
        feature = self.filter.update(fresh)
        success = torch.tensor([result.success for result in results], device=feature.device)
        truncated = torch.tensor([result.truncated for result in results], device=feature.device)
        return DreamStep(feature, final, success.float(), success, truncated)

    def state(self) -> dict[str, Tensor]:
        """Everything that decides what happens next, for a resumed run."""
        episodes = self.pool.save()
        longest = max(len(episode.actions) for episode in episodes)
        actions = [np.pad(episode.actions, ((0, longest - len(episode.actions)), (0, 0))) for episode in episodes]
        counters = [(episode.number, episode.chunks, len(episode.actions)) for episode in episodes]
        return {
            "counters": torch.tensor(counters),
            "actions": torch.from_numpy(np.stack(actions)),
            "robot_obs": torch.from_numpy(np.stack([episode.robot_obs for episode in episodes])),
            "scene_obs": torch.from_numpy(np.stack([episode.scene_obs for episode in episodes])),
            "h": self.filter.state.h,
            "z": self.filter.state.z,
            "generators": torch.stack([generator.get_state() for generator in self.filter.generators]),
            "env_steps": torch.tensor(self.env_steps),
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Replay to a saved state; the replay is no new experience and is not counted. Raises CheckpointError, DataError if it cannot."""
        if len(tensors["counters"]) != self.pool.batch or tensors["h"].shape != self.filter.state.h.shape:
            raise CheckpointError(
                f"simulator: expected the state of {self.pool.batch} tables with {self.filter.state.h.shape[1]} units, "
                f"found {tuple(tensors['h'].shape)}. Resume with the world model and batch the run was started with."
            )
        arrays = {name: tensors[name].cpu().numpy() for name in ("actions", "robot_obs", "scene_obs")}
        states = [
            EpisodeState(number, chunks, arrays["actions"][i, :length], arrays["robot_obs"][i], arrays["scene_obs"][i])
            for i, (number, chunks, length) in enumerate(tensors["counters"].tolist())
        ]
        self.pool.restore(states)
        self.filter.state = State(tensors["h"], tensors["z"])
        for generator, saved in zip(self.filter.generators, tensors["generators"].cpu(), strict=True):
            generator.set_state(saved.clone())  # torch 2.13 crashes on a view into a larger tensor
        self.env_steps = int(tensors["env_steps"])

    def close(self) -> None:
        """End the simulator's processes."""
        self.pool.close()

    def __enter__(self) -> SimulatorEnv:
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass(frozen=True)
class OnlineBudget:
    """When to stop, and how often to look. Evaluations run on validation starts and are not counted as environment steps."""

    env_steps: int = 200_000
    iterations: int | None = None
    evaluate_every: int = 10  # iterations; 0: never
    episodes: int = 50  # of one evaluation
    match: float | None = None  # success rate at which to stop

    def __post_init__(self) -> None:
        if self.match is not None and not 0 < self.match <= 1:
            raise ConfigError(f"match: expected a success rate above 0 and at most 1, found {self.match}.")
        if self.match is not None and not self.evaluate_every:
            raise ConfigError("match: expected evaluations that can reach it, found evaluate_every 0. Set it to a number of iterations.")


def validation_success(world_model: str | Path, policy: str | Path, skill: str, episodes: int, workers: int = 2) -> dict[str, float]:
    """Success of a policy checkpoint on the first validation starts, as `diwa evaluate` measures it, with its Wilson interval."""
    results = evaluate(world_model, plan_episodes(skill, policy, episodes, "validation"), workers)
    return {"episodes": episodes, **asdict(success_rate(sum(result.success for result in results), episodes))}


def finetune_online(
    learner: DenoisingPPO,
    run_dir: str | Path,
    budget: OnlineBudget,
    validate: Callable[[DiffusionPolicy], dict[str, float]],
    report: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Run or resume `learner`, whose environment is a SimulatorEnv, until the budget is spent or `match` is reached; returns the last row.

    Writes metrics.jsonl, one row per iteration (iteration -1: the base policy), and the state that a killed run resumes from.
    The row that reached `match` holds "matched": the rate and the environment steps it took.
    validate: see `validation_success`; its `value` is compared with `match`. Raises DiwaError when learning breaks down; the state on
    disk is then that of the last good iteration.
    """
    path = Path(run_dir) / "learner.tar"
    row = load_learner(path, learner) if path.exists() else None
    with open_metrics(run_dir, -1 if row is None else learner.iteration) as log:
        while row is None or not _finished(learner, budget, row):
            row = _next_row(learner, budget, validate, base=row is None)
            log.write(json.dumps(row) + "\n")
            log.flush()
            save_learner(path, learner, row)  # after the row: a kill between the two repeats the iteration, and the row with it
            report(row)
    return row


def _next_row(learner: DenoisingPPO, budget: OnlineBudget, validate: Callable, base: bool) -> dict:
    """Run one iteration (none for the base policy), then evaluate if it is due."""
    start = time.monotonic()
    metrics = {} if base else learner.iterate()
    if not all(np.isfinite(value) for value in metrics.values()):
        raise DiwaError(f"DPPO: expected finite metrics after {learner.iteration} iterations, found {metrics}. Lower actor_rate.")
    row = {"iteration": learner.iteration - 1, "env_steps": learner.env.env_steps, "seconds": time.monotonic() - start, **metrics}
    due = budget.evaluate_every and (learner.iteration % budget.evaluate_every == 0 or _spent(learner, budget))
    if due:
        row["validation"] = validate(learner.policy)
        if budget.match is not None and row["validation"]["value"] >= budget.match:
            row["matched"] = {"rate": budget.match, "env_steps": row["env_steps"]}
    return row


def _spent(learner: DenoisingPPO, budget: OnlineBudget) -> bool:
    return learner.env.env_steps >= budget.env_steps or (budget.iterations is not None and learner.iteration >= budget.iterations)


def _finished(learner: DenoisingPPO, budget: OnlineBudget, row: dict) -> bool:
    reached = budget.match is not None and "validation" in row and row["validation"]["value"] >= budget.match
    return reached or _spent(learner, budget)
