"""Evaluate policies in the simulator over seeded start states: one function for training, command line and comparison with ROS."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from diwa_core.checkpoint import load_checkpoint
from diwa_core.errors import SetupError
from diwa_core.evaluate.rollout import MAX_STEPS, EpisodeResult, run_episode
from diwa_core.policy.store import load_policy
from diwa_core.sim.skills import start_states
from diwa_core.world_model.filter import LatentFilter


@dataclass(frozen=True)
class EpisodePlan:
    """One episode to run: a policy checkpoint, a start from a seeded list, and the seed of the policy's noise."""

    skill: str
    policy: str
    split: str
    index: int
    list_seed: int
    noise_seed: int
    max_steps: int = MAX_STEPS
    record: bool = False


def plan_episodes(
    skill: str,
    policy: str | Path,
    count: int,
    split: str = "evaluation",
    seed: int = 0,
    record: bool = False,
    max_steps: int = MAX_STEPS,
) -> list[EpisodePlan]:
    """`count` episodes on the first starts of the list (split, seed 0); `seed` moves only the policy's noise, so runs are paired."""
    return [EpisodePlan(skill, str(policy), split, i, 0, noise_seed(seed, i), max_steps, record) for i in range(count)]


def noise_seed(seed: int, index: int) -> int:
    """Seed of the policy's noise in episode `index` of an evaluation with `seed`."""
    return seed * 100_003 + index


_worker: dict = {}


def _start_worker(world_model: str, threads: int) -> None:
    from diwa_core.sim.play_table import PlayTable  # loads PyBullet, which only workers need

    torch.set_num_threads(threads)
    _worker.update(env=PlayTable(), filter=LatentFilter.load(world_model), policies={}, starts={})


def _run_plan(plan: EpisodePlan) -> EpisodeResult:
    if plan.policy not in _worker["policies"]:
        _worker["policies"][plan.policy] = load_policy(plan.policy, world_model_id=_worker["filter"].identity)[0]
    key = (plan.skill, plan.split, plan.list_seed)
    if len(_worker["starts"].get(key, ())) <= plan.index:
        _worker["starts"][key] = start_states(plan.skill, max(plan.index + 1, 128), plan.list_seed, plan.split)
    start = _worker["starts"][key][plan.index]
    policy = _worker["policies"][plan.policy]
    return run_episode(_worker["env"], _worker["filter"], policy, plan.skill, start, plan.noise_seed, plan.max_steps, plan.record)


def evaluate(
    world_model: str | Path,
    plans: Iterable[EpisodePlan],
    workers: int | None = None,
    report: Callable[[EpisodePlan, EpisodeResult], None] = lambda plan, result: None,
) -> list[EpisodeResult]:
    """Run `plans` on `workers` processes (default: one per core); results in the order of the plans, whatever the number of workers.

    Raises CheckpointError on a world model or policy that cannot be used, SetupError when a process dies.
    """
    plans = list(plans)
    load_checkpoint(world_model, "world_model")  # refused here in one sentence, and not in every worker
    context = multiprocessing.get_context("spawn")
    workers = workers or min(len(plans), multiprocessing.cpu_count())
    results = []
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (str(world_model), 1)) as pool:
            for plan, result in zip(plans, pool.map(_run_plan, plans), strict=True):
                report(plan, result)
                results.append(result)
    except BrokenProcessPool as error:
        raise SetupError(
            f"evaluation: expected {workers} simulator processes, found one that ended after {len(results)} episodes ({error}). "
            "Its last lines say why; where memory ran out, use fewer --workers."
        ) from error
    return results
