"""Tiny checkpoints, two candidates and a backend of known outcomes, for the tests of trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diwa_core.contract import Contract
from diwa_core.evaluate.trial_journal import BY_OPERATOR, ROBOT, TrialRow
from diwa_core.evaluate.trial_judge import TrialJudge
from diwa_core.evaluate.trial_run import Assignment, Seen
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.policy.store import save_policy
from diwa_core.reward.classifier import ClassifierConfig, SuccessClassifier
from diwa_core.reward.store import save_classifier
from diwa_core.world_model.filter import save_world_model
from diwa_core.world_model.model import SIZES, WorldModel

TINY = replace(SIZES["small"], code_sizes=(6, 5), deterministic=12, hidden=12)
SKILLS = ("open_drawer", "turn_on_led")
FEATURE = WorldModel(TINY).feature_size


def make_candidates(folder: Path, names: Sequence[str] = ("policies", "tuned"), skills: Sequence[str] = SKILLS) -> Path:
    """A world model, classifiers and, in a folder for each name, one policy per skill; all with random weights."""
    torch.manual_seed(0)
    model, contract = WorldModel(TINY).eval(), Contract()
    identity = save_world_model(folder / "world_model", model, contract, {})
    config = PolicyConfig(feature_size=model.feature_size, hidden=(16, 16, 16), denoising_steps=4, sampler_steps=4)
    for skill in skills:
        classifier = SuccessClassifier(ClassifierConfig(model.rssm.latent.size, hidden=8, embedding=4))
        save_classifier(folder / "classifiers" / skill, classifier, contract, skill, identity, {})
        base = ""
        for name in names:
            lineage = {"base": base} if base else {}
            card = {"imagined_before": 0.2, "imagined_after": 0.7} if base else {}
            policy = DiffusionPolicy(config)
            policy.feature_std.fill_(100.0)  # random weights have no place where their latents should lie
            base = save_policy(folder / name / skill, policy, contract, skill, identity, lineage, card)
    return folder


def make_judge(folder: Path, skills: Sequence[str] = SKILLS) -> TrialJudge:
    """The classifiers of `make_candidates`."""
    return TrialJudge(folder / "world_model", folder / "classifiers", tuple(skills))


class KnownBackend:
    """A backend whose outcomes are what `outcome(assignment)` says; on the robot as marks. `break_at`: the run with this number fails."""

    def __init__(self, name: str, outcome: Callable[[Assignment], bool | str], break_at: int = 0, robot: str = "") -> None:
        self.name, self.outcome, self.break_at = name, outcome, break_at
        self.robot = robot or ("arm" if name == ROBOT else "")
        self.ran: list[Assignment] = []

    def run(self, assignment: Assignment, row: TrialRow) -> Seen:
        """Judge without running."""
        self.ran.append(assignment)
        if len(self.ran) == self.break_at:
            raise KeyboardInterrupt
        found = self.outcome(assignment)
        row.steps, row.latency_ms, row.clamped = 5, {"camera → chunk": [12.0, 40.0]}, 2
        if self.name == ROBOT:
            row.mark = found if isinstance(found, str) else "success" if found else "failure"
            row.marked_by, row.watchdog, row.start_error = BY_OPERATOR, {"HOLD": 1}, {"hand_mm": 3.0}
        else:
            row.oracle = bool(found)
        frames = np.zeros((6, 8, 8, 3), np.uint8)
        return Seen(frames, np.zeros((TINY.warmup_frames + 3, FEATURE), np.float32))
