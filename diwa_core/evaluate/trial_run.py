"""Runs the trials of a plan on one backend and keeps each as it ends; what was finished before an interruption is not run again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np

from diwa_core.contract import Observation
from diwa_core.errors import CheckpointError, DataError
from diwa_core.evaluate.rollout import run_episode
from diwa_core.evaluate.trial_journal import CALVIN, TrialJournal, TrialRow
from diwa_core.evaluate.trial_judge import TrialJudge
from diwa_core.evaluate.trials import JOURNAL, Trial, TrialFolder, TrialPlan
from diwa_core.policy.diffusion import DiffusionPolicy
from diwa_core.policy.store import load_policy
from diwa_core.sim.skills import start_state
from diwa_core.sim.state import SceneState
from diwa_core.world_model.filter import LatentFilter, load_world_model

if TYPE_CHECKING:
    from diwa_core.sim.play_table import PlayTable  # loads PyBullet, which announces itself on stdout

LIST_SEED = 0  # of the start lists, as in `plan_episodes`
STRIP_FRAMES = 8
WEBP_QUALITY = 80


@dataclass
class Assignment:
    """A trial with what only the backend may know: the policy's checkpoint and its identity."""

    trial: Trial
    policy: Path
    identity: str
    start: SceneState
    plan: TrialPlan


@dataclass
class Seen:
    """What a trial left to look at: frames uint8 [N, H, W, 3] of the first camera, features float32 [M, F] since the filter's reset."""

    frames: Sequence[np.ndarray]
    features: Sequence[np.ndarray]


class Backend(Protocol):
    """Where trials run. name: one of BACKENDS; robot: which one, empty in simulation."""

    name: str
    robot: str

    def run(self, assignment: Assignment, row: TrialRow) -> Seen:
        """Run one trial and write into `row` what was found. Raises DiwaError; the trial is then not kept."""


def run_trials(
    folder: TrialFolder,
    name: str,
    robot: str,
    make_backend: Callable[[], Backend],
    judge: TrialJudge,
    say: Callable[[str], None] = lambda text: None,
) -> int:
    """Run what the journal does not hold yet of backend `name`; returns how many trials ran. `say` gets only what an operator may know.

    make_backend is called once there is something to run. Raises what the backend raises; finished trials are then kept.
    """
    plan, key = folder.read_plan(), folder.read_key()
    journal = TrialJournal(folder.path / JOURNAL, plan)
    journal.check_robot(name, robot)
    missing = [trial for trial in plan.trials if trial.number not in journal.finished(name)]
    if not missing:
        return 0
    backend, before = make_backend(), len(journal.rows)
    for trial in missing:
        start = start_state(trial.skill, trial.index, LIST_SEED, plan.split)
        assignment = Assignment(trial, key.policy(trial), key.candidate(trial).identities[trial.skill], start, plan)
        while trial.number not in journal.finished(name):
            say(f"{name}: trial {trial.number} of {len(plan.trials)}, {trial.skill}")
            journal.add(_run_trial(folder, backend, assignment, judge))
    return len(journal.rows) - before


def _run_trial(folder: TrialFolder, backend: Backend, assignment: Assignment, judge: TrialJudge) -> TrialRow:
    trial, begin_s = assignment.trial, time.monotonic()
    row = TrialRow(assignment.plan.identity, backend.name, trial.number, backend.robot, began=time.strftime("%Y-%m-%d %H:%M:%S"))
    seen = backend.run(assignment, row)
    row.wall_s = round(time.monotonic() - begin_s, 2)
    row.latency_ms = {stage: [round(value, 2) for value in values] for stage, values in row.latency_ms.items()}
    row.classifier, row.classifier_success = judge.judge(trial.skill, np.array(seen.features))
    if len(seen.frames):
        row.strip = f"strips/{backend.name}_{trial.number:03d}.webp"
        write_strip(folder.path / row.strip, seen.frames)
    return row


def write_strip(path: Path, frames: Sequence[np.ndarray]) -> None:
    """STRIP_FRAMES evenly spaced of `frames` uint8 [N, H, W, 3] side by side, the first and the last among them. Raises DataError."""
    chosen = np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int)
    picture = cv2.cvtColor(np.concatenate([frames[i] for i in chosen], axis=1), cv2.COLOR_RGB2BGR)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])[1].tobytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}. Free space; the same command goes on.") from error


class TableBackend:
    """A simulated table in this process, without ROS: the official CALVIN environment, or any other PlayTable."""

    robot = ""

    def __init__(self, table: PlayTable, world_model: str | Path, name: str = CALVIN) -> None:
        """Raises CheckpointError on a world model that cannot be read."""
        self.name, self.table, self.filter = name, table, _RememberingFilter.load(world_model)
        self.policies: dict[Path, DiffusionPolicy] = {}

    def run(self, assignment: Assignment, row: TrialRow) -> Seen:
        """One episode as `diwa evaluate` runs it. Raises CheckpointError on a policy that was exchanged since the plan was made."""
        trial, plan = assignment.trial, assignment.plan
        if assignment.policy not in self.policies:
            self.policies[assignment.policy] = load_assigned(assignment)
        self.filter.features.clear()
        policy = self.policies[assignment.policy]
        result = run_episode(self.table, self.filter, policy, trial.skill, assignment.start, trial.noise_seed, plan.max_steps, record=True)
        row.oracle, row.steps = result.success, result.steps
        count = self.filter.warmup_frames + result.steps  # the tail after a success is not judged
        return Seen(result.frames["rgb_static"][:count], self.filter.features[:count])


class _RememberingFilter(LatentFilter):
    """Keeps the features of the episode."""

    @staticmethod
    def load(path: str | Path) -> _RememberingFilter:
        model, checkpoint = load_world_model(path)
        found = _RememberingFilter(model, checkpoint.contract, checkpoint.identity)
        found.features = []
        return found

    def update(self, observation: Observation, previous_action: np.ndarray | None) -> np.ndarray:
        feature = super().update(observation, previous_action)
        self.features.append(feature)
        return feature


def load_assigned(assignment: Assignment) -> DiffusionPolicy:
    """The policy of a trial. Raises CheckpointError when another one lies at its path than when the plan was made."""
    policy, checkpoint = load_policy(assignment.policy, world_model_id=assignment.plan.world_model)
    check_identity(assignment, checkpoint.identity)
    return policy


def check_identity(assignment: Assignment, found: str) -> None:
    """Raises CheckpointError when `found` is not the policy that the key names; the message does not say who that is."""
    if found != assignment.identity:
        raise CheckpointError(
            f"trial {assignment.trial.number}: expected the policy that the key names, found another one. A checkpoint was exchanged "
            "since the plan was made, or somebody swaps policies on the graph. The trial is not kept."
        )
