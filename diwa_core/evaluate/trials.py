"""A blinded plan of trials: every candidate gets the same skills, starts and noise, on every backend, in an order that tells nothing.

The plan holds what an operator may know. Which candidate runs in which trial is in the key, a file of its own that the report opens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diwa_core.checkpoint import Checkpoint, load_checkpoint
from diwa_core.config import from_dict, to_dict
from diwa_core.errors import CheckpointError, ConfigError, DataError
from diwa_core.evaluate.evaluation import noise_seed
from diwa_core.evaluate.rollout import MAX_STEPS
from diwa_core.sim.skills import SKILLS, SPLITS, check_skill

FORMAT_VERSION = 1
PLAN, KEY, JOURNAL, OPENED = "plan.json", "key.json", "trials.jsonl", "opened.jsonl"  # in the folder of an evaluation


@dataclass(frozen=True)
class Trial:
    """One trial as its operator knows it. number: from 1; index: position in the seeded list of starts of the skill."""

    number: int
    skill: str
    index: int
    noise_seed: int


@dataclass(frozen=True)
class TrialPlan:
    """What is to be tried, without who is tried when. key: SHA-256 of the TrialKey that belongs to it; candidates: how many there are."""

    contract: str
    rate_hz: float
    world_model: str
    skills: tuple[str, ...]
    starts: int
    split: str
    noise_seed: int
    max_steps: int
    candidates: int
    key: str
    trials: tuple[Trial, ...]

    @property
    def identity(self) -> str:
        """First 16 hex digits of the SHA-256 over the plan."""
        return _hash(self)[:16]


@dataclass(frozen=True)
class Candidate:
    """A folder of policies, one per skill. identities: skill -> that of its checkpoint."""

    name: str
    folder: str
    identities: dict[str, str]


@dataclass(frozen=True)
class TrialKey:
    """Which candidate ran. assigned: place in `candidates` of trial 1, 2, ..; seed: of the order."""

    seed: int
    candidates: tuple[Candidate, ...]
    assigned: tuple[int, ...]

    def candidate(self, trial: Trial) -> Candidate:
        """Who runs in `trial`."""
        return self.candidates[self.assigned[trial.number - 1]]

    def policy(self, trial: Trial) -> Path:
        """The checkpoint that runs in `trial`."""
        return Path(self.candidate(trial).folder) / trial.skill


def make_plan(
    candidates: Mapping[str, str | Path],
    world_model: str | Path,
    skills: Sequence[str] = (),
    starts: int = 10,
    split: str = "evaluation",
    seed: int = 0,
    policy_seed: int = 0,
    max_steps: int = MAX_STEPS,
) -> tuple[TrialPlan, TrialKey]:
    """Plan and key for candidates name -> folder. Trials of one start follow each other: the drift of a robot then hits all
    candidates alike; the order of the starts and of the candidates at each start is drawn with `seed`. policy_seed: of the policies' noise.

    skills: empty for all that every candidate has. Raises ConfigError on an unknown skill or nothing to try, CheckpointError on a policy
    that is missing, of another skill, of another world model than `world_model` or of another contract.
    """
    if starts < 1 or max_steps < 1 or min(seed, policy_seed) < 0 or split not in SPLITS:
        raise ConfigError(
            f"plan: expected starts and max_steps of at least 1, seeds of at least 0 and a split of {', '.join(SPLITS)}; "
            f"found {starts}, {max_steps}, {seed}, {policy_seed}, '{split}'."
        )
    model = load_checkpoint(world_model, "world_model")
    chosen = _choose_skills(candidates, skills)
    entries = tuple(
        Candidate(name, str(Path(folder).absolute()), {skill: _identify(Path(folder) / skill, skill, model) for skill in chosen})
        for name, folder in candidates.items()
    )
    _check_different(entries, chosen)
    rng = np.random.default_rng(seed)
    blocks = [(skill, index) for skill in chosen for index in range(starts)]
    drawn = [(blocks[place], who) for place in rng.permutation(len(blocks)) for who in rng.permutation(len(entries))]
    trials = tuple(Trial(i, skill, index, noise_seed(policy_seed, index)) for i, ((skill, index), _) in enumerate(drawn, 1))
    key = TrialKey(seed, entries, tuple(int(who) for _, who in drawn))
    settings = (chosen, starts, split, policy_seed, max_steps, len(entries))
    return TrialPlan(model.contract.identity, model.contract.rate_hz, model.identity, *settings, _hash(key), trials), key


def _choose_skills(candidates: Mapping[str, str | Path], skills: Sequence[str]) -> tuple[str, ...]:
    if not candidates:
        raise ConfigError("candidates: expected at least one folder of policies, found none.")
    chosen = tuple(dict.fromkeys(check_skill(skill) for skill in skills))
    chosen = chosen or tuple(skill for skill in SKILLS if all((Path(folder) / skill).exists() for folder in candidates.values()))
    if not chosen:
        folders = ", ".join(str(folder) for folder in candidates.values())
        raise ConfigError(f"{folders}: expected folders named after skills ({', '.join(SKILLS)}) that all of them have, found none.")
    return chosen


def _identify(path: Path, skill: str, model: Checkpoint) -> str:
    policy = load_checkpoint(path, "policy", model.contract)
    if policy.config["skill"] != skill:
        raise CheckpointError(f"{path}: expected a policy of '{skill}', found one of '{policy.config['skill']}'.")
    if policy.lineage["world_model"] != model.identity:
        raise CheckpointError(
            f"{path}: expected a policy of world model {model.identity[:16]} ({model.path}), found one of "
            f"{str(policy.lineage['world_model'])[:16]}. Candidates are tried in one graph, with one world model."
        )
    return policy.identity


def _check_different(candidates: Sequence[Candidate], skills: Sequence[str]) -> None:
    for skill in skills:
        identities = [candidate.identities[skill] for candidate in candidates]
        if len(set(identities)) < len(identities):
            raise ConfigError(f"candidates: expected different policies of '{skill}', found the same one twice.")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(to_dict(value), sort_keys=True).encode()).hexdigest()


class TrialFolder:
    """The folder of one evaluation: plan, key, journal, and what trials leave behind."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin(self, plan: TrialPlan, key: TrialKey) -> None:
        """Write plan and key, or go on with equal ones. Raises ConfigError when the folder holds another plan, DataError as `read_plan`."""
        if (self.path / PLAN).exists():
            found = self.read_plan()
            if found != plan:
                names = [name for name in to_dict(plan) if getattr(plan, name) != getattr(found, name)]
                raise ConfigError(
                    f"{self.path}: expected the plan of this command ({plan.identity}), found another ({found.identity}) that differs in "
                    f"{', '.join(names)}. Give the arguments it was made with, or another --out."
                )
            self.read_key()
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.path / KEY, key)
            _write(self.path / PLAN, plan)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error}. Free space or choose another --out.") from error

    def read_plan(self) -> TrialPlan:
        """Raises DataError on a file that `begin` did not write."""
        return _read(self.path / PLAN, TrialPlan)

    def read_key(self) -> TrialKey:
        """The key that opens the plan. Raises DataError on a missing one, and on one that was changed or is another plan's."""
        key, plan = _read(self.path / KEY, TrialKey), self.read_plan()
        if _hash(key) != plan.key:
            raise DataError(f"{self.path / KEY}: expected the key of plan {plan.identity}, found another or a changed one. Restore it.")
        return key


def _write(path: Path, value: TrialPlan | TrialKey) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps({"format": FORMAT_VERSION, **to_dict(value)}, indent=1))
    os.replace(temporary, path)


def _read(path: Path, cls: type) -> Any:
    try:
        values = json.loads(path.read_text())
        if (found := values.pop("format", None)) != FORMAT_VERSION:
            raise ConfigError(f"expected format {FORMAT_VERSION}, found {found}")
        return from_dict(cls, values)
    except (OSError, ValueError, AttributeError, ConfigError) as error:
        raise DataError(f"{path}: expected a file of `diwa evaluate robot`, found none that can be read: {error}.") from error
