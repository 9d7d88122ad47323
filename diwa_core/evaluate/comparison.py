"""Base beside fine-tuned policies on the same starts with the same noise: one function for the pipeline, the command line and ROS.

Letters: S training seeds (pairs of folders), N starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diwa_core.checkpoint import Checkpoint, load_checkpoint
from diwa_core.config import from_dict, to_dict
from diwa_core.errors import CheckpointError, ConfigError, DataError
from diwa_core.evaluate.evaluation import EpisodePlan, plan_episodes
from diwa_core.evaluate.journal import EpisodeKey, Journal, Outcome
from diwa_core.evaluate.rollout import MAX_STEPS
from diwa_core.evaluate.statistics import Estimate, gain_over_seeds, pool_mean, rate_over_seeds
from diwa_core.sim.skills import SKILLS, check_skill

FORMAT_VERSION = 1


class Runner(Protocol):
    """Runs episodes and reports each as it ends: `evaluate` without ROS, `GraphEvaluator.run_plans` on a running graph."""

    def __call__(self, plans: list[EpisodePlan], report: Callable[[EpisodePlan, Outcome], None]) -> object:
        """`report` takes anything with `success` and `steps`."""


@dataclass
class Side:
    """One policy on the N starts. success, steps: one per start, in their order."""

    policy: str
    identity: str
    success: list[bool]
    steps: list[int]


@dataclass
class SeedResult:
    """Base and fine-tuned policy of one training seed on one skill.

    environment_steps: spent by the fine-tuning; imagined_*: success in imagination before and after it, from the starts of `start_bank`;
    None where the checkpoint does not state it. descends: whether the fine-tuned policy names this base as its origin.
    """

    training_seed: int | None
    base: Side
    finetuned: Side
    environment_steps: int | None = None
    imagined_before: float | None = None
    imagined_after: float | None = None
    start_bank: str | None = None
    descends: bool | None = None

    def imagined_error(self, when: str) -> float | None:
        """|imagined - real| `when`: before (base policy) or after (fine-tuned); None where it is not stated."""
        imagined, side = (self.imagined_before, self.base) if when == "before" else (self.imagined_after, self.finetuned)
        return None if imagined is None else abs(imagined - float(np.mean(side.success)))


@dataclass
class SkillComparison:
    """One skill over all training seeds."""

    skill: str
    seeds: list[SeedResult]

    @property
    def base(self) -> Estimate:
        """Success rate of the base policies."""
        return rate_over_seeds(self._outcomes("base"))

    @property
    def finetuned(self) -> Estimate:
        """Success rate of the fine-tuned policies."""
        return rate_over_seeds(self._outcomes("finetuned"))

    @property
    def gain(self) -> Estimate:
        """Paired difference."""
        return gain_over_seeds(self._outcomes("base"), self._outcomes("finetuned"))

    @property
    def environment_steps(self) -> int | None:
        """Most that any training seed spent, or None where one does not state it."""
        stated = [seed.environment_steps for seed in self.seeds]
        return None if None in stated else max(stated)

    def imagined(self, when: str) -> float | None:
        """Mean over training seeds of imagined success `when`: before or after; None where one does not state it."""
        return _mean_stated([getattr(seed, f"imagined_{when}") for seed in self.seeds])

    def imagined_error(self, when: str) -> float | None:
        """Mean over training seeds of |imagined - real|; None where one does not state it."""
        return _mean_stated([seed.imagined_error(when) for seed in self.seeds])

    @property
    def start_bank(self) -> str:
        """The start bank that the imagined figures come from."""
        return ", ".join(sorted({seed.start_bank or "not stated" for seed in self.seeds}))

    def _outcomes(self, side: str) -> np.ndarray:
        """[S, N]."""
        return np.array([getattr(seed, side).success for seed in self.seeds])


@dataclass
class Comparison:
    """All skills. starts: N of each skill, the first of the seeded list of `split`; noise_seed: as in `plan_episodes`."""

    world_model: str
    split: str
    noise_seed: int
    starts: int
    max_steps: int
    skills: list[SkillComparison]
    runner: str = "simulator"

    @property
    def base(self) -> Estimate:
        """Mean over skills."""
        return self._mean("base")

    @property
    def finetuned(self) -> Estimate:
        """Mean over skills."""
        return self._mean("finetuned")

    @property
    def gain(self) -> Estimate:
        """Mean over skills."""
        return self._mean("gain")

    def _mean(self, name: str) -> Estimate:
        return pool_mean({skill.skill: getattr(skill, name) for skill in self.skills})

    def find(self, skill: str) -> SkillComparison | None:
        """One skill, or None."""
        return next((row for row in self.skills if row.skill == skill), None)

    def write(self, path: str | Path) -> None:
        """Write JSON in one step: the episodes, and under `summary` what follows from them (`read` derives it anew). Raises DataError."""
        estimates = ("base", "finetuned", "gain")
        summary = {
            "mean": {name: to_dict(getattr(self, name)) for name in estimates},
            "skills": {
                row.skill: {
                    **{name: to_dict(getattr(row, name)) for name in estimates},
                    "environment_steps": row.environment_steps,
                    **{f"imagined_{when}": row.imagined(when) for when in ("before", "after")},
                    **{f"imagined_error_{when}": row.imagined_error(when) for when in ("before", "after")},
                    "start_bank": row.start_bank,
                }
                for row in self.skills
            },
        }
        path = Path(path)
        temporary = path.with_name(f".{path.name}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"format": FORMAT_VERSION, "summary": summary, **to_dict(self)}, indent=1))
            os.replace(temporary, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error}. Free space or choose another folder; the episodes are kept.") from error

    @staticmethod
    def read(path: str | Path) -> Comparison:
        """Raises DataError on a file that `write` did not make."""
        try:
            values = json.loads(Path(path).read_text())
            values.pop("summary", None)
            if (found := values.pop("format", None)) != FORMAT_VERSION:
                raise ConfigError(f"expected format {FORMAT_VERSION}, found {found}")
            comparison = from_dict(Comparison, values)
            for side in (side for row in comparison.skills for seed in row.seeds for side in (seed.base, seed.finetuned)):
                if not comparison.starts == len(side.success) == len(side.steps):
                    raise ConfigError(f"expected {comparison.starts} outcomes and steps of {side.policy}, found {len(side.success)}")
            return comparison
        except (OSError, ValueError, AttributeError, TypeError, ConfigError) as error:
            raise DataError(f"{path}: expected a comparison of `diwa evaluate --pair`, found none: {error}. Run it again.") from error


def _mean_stated(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def compare_policies(
    pairs: Sequence[tuple[str | Path, str | Path]],
    journal: str | Path,
    run: Runner,
    skills: Sequence[str] = (),
    starts: int = 100,
    split: str = "evaluation",
    noise_seed: int = 0,
    max_steps: int = MAX_STEPS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    runner: str = "simulator",
) -> Comparison:
    """Run what `journal` does not hold yet of every pair (folder of base policies, folder of fine-tuned ones; one per training seed).

    Both sides of a pair get the same starts and the same noise. skills: empty for all that a fine-tuned folder has.
    progress(done, total): episodes. Raises CheckpointError on a policy that is missing or of another world model than the others,
    ConfigError where there is nothing to compare or a pair is given twice, and what `run` raises; finished episodes are then kept.
    """
    policies = _load_sides(pairs, skills)
    (world_model,) = {checkpoint.lineage["world_model"] for checkpoint in policies.values()}
    sides = {}
    for key, outcomes in run_missing(policies, journal, run, starts, split, noise_seed, max_steps, progress).items():
        success, steps = [outcome.success for outcome in outcomes], [outcome.steps for outcome in outcomes]
        sides[key] = Side(str(policies[key].path), policies[key].identity, success, steps)
    rows = [
        SkillComparison(skill, [_seed_result(policies, sides, skill, number) for number in range(len(pairs))])
        for skill in dict.fromkeys(skill for skill, _, _ in policies)
    ]
    return Comparison(world_model, split, noise_seed, starts, max_steps, rows, runner)


def run_missing(
    policies: dict[Any, Checkpoint],
    journal: str | Path,
    run: Runner,
    starts: int,
    split: str,
    noise_seed: int = 0,
    max_steps: int = MAX_STEPS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Any, list[Outcome]]:
    """Outcomes [N] of each of `policies` on the first starts of its skill; what `journal` holds is not run again."""
    plans = {
        key: [
            (episode_key(policy, plan), plan)
            for plan in plan_episodes(policy.config["skill"], policy.path, starts, split, noise_seed, max_steps=max_steps)
        ]
        for key, policy in policies.items()
    }
    finished = Journal(journal)
    wanted = {key: plan for episodes in plans.values() for key, plan in episodes}  # a policy that is there twice runs once
    missing = {plan: key for key, plan in wanted.items() if key not in finished.outcomes}

    def report(plan: EpisodePlan, result: Outcome) -> None:
        finished.add(missing[plan], Outcome(bool(result.success), int(result.steps)))
        progress(len(wanted.keys() & finished.outcomes.keys()), len(wanted))

    if missing:
        run(list(missing), report)
    return {key: [finished.outcomes[episode] for episode, _ in episodes] for key, episodes in plans.items()}


def episode_key(policy: Checkpoint, plan: EpisodePlan) -> EpisodeKey:
    """What decides the outcome of `plan` with `policy`."""
    decides = (plan.skill, plan.split, plan.list_seed, plan.index, plan.noise_seed, plan.max_steps)
    return EpisodeKey(policy.lineage["world_model"], policy.identity, *decides)


def _load_sides(pairs: Sequence[tuple[str | Path, str | Path]], skills: Sequence[str]) -> dict[tuple[str, int, str], Checkpoint]:
    """Checkpoints by (skill, number of the pair, side), verified."""
    if not pairs:
        raise ConfigError("expected at least one pair of folders, found none.")
    found = {skill for _, finetuned in pairs for skill in SKILLS if (Path(finetuned) / skill).exists()}
    chosen = [check_skill(skill) for skill in skills] or [skill for skill in SKILLS if skill in found]
    if not chosen:
        raise CheckpointError(f"{pairs[0][1]}: expected folders named after skills ({', '.join(SKILLS)}), found none.")
    policies = {
        (skill, number, side): load_checkpoint(Path(folder) / skill, "policy")
        for skill in chosen
        for number, pair in enumerate(pairs)
        for side, folder in zip(("base", "finetuned"), pair, strict=True)
    }
    for (skill, _, _), checkpoint in policies.items():
        if checkpoint.config["skill"] != skill:
            raise CheckpointError(f"{checkpoint.path}: expected a policy of '{skill}', found one of '{checkpoint.config['skill']}'.")
        first = next(iter(policies.values()))
        expected, world_model = first.lineage["world_model"], checkpoint.lineage["world_model"]
        if world_model != expected:
            raise CheckpointError(
                f"{checkpoint.path}: expected a policy of world model {expected[:16]}, that of {first.path}, found {world_model[:16]}. "
                "Compare policies of one world model."
            )
    for skill in chosen:
        used = [tuple(policies[skill, number, side].identity for side in ("base", "finetuned")) for number in range(len(pairs))]
        if len(set(used)) < len(used):
            raise ConfigError(f"{skill}: expected pairs of different training seeds, found the same policies twice.")
    return policies


def _seed_result(policies: dict, sides: dict, skill: str, number: int) -> SeedResult:
    """What the checkpoints state beside what was measured."""
    base, finetuned = policies[skill, number, "base"], policies[skill, number, "finetuned"]
    card, origin = finetuned.card, finetuned.lineage.get("base")
    return SeedResult(
        base.lineage.get("seed"),
        sides[skill, number, "base"],
        sides[skill, number, "finetuned"],
        finetuned.lineage.get("environment_steps", finetuned.lineage.get("env_steps")),  # offline states the first, DPPO the second
        card.get("imagined_before"),
        card.get("imagined_after"),
        card.get("starts"),
        None if origin is None else origin == base.identity,
    )
