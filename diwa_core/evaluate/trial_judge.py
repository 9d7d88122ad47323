"""The success classifier as a judge of trials: what the encoder believed in, a probability out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diwa_core.errors import CheckpointError
from diwa_core.reward.store import load_classifier
from diwa_core.world_model.filter import load_world_model
from diwa_core.world_model.probe import readout
from diwa_core.world_model.rssm import State


class TrialJudge:
    """Classifiers of one world model, by skill. Letters: N frames, W frames of warm-up, F feature."""

    def __init__(self, world_model: str | Path, classifiers: str | Path | None, skills: tuple[str, ...]) -> None:
        """classifiers: a folder with one per skill; skills without one are not judged. Raises CheckpointError on one that does not fit."""
        self.model, checkpoint = load_world_model(world_model)
        self.contract, self.warmup_frames = checkpoint.contract, self.model.config.warmup_frames
        paths = {skill: Path(classifiers) / skill for skill in skills} if classifiers else {}
        self.classifiers = {skill: load_classifier(path, checkpoint.identity, skill)[0] for skill, path in paths.items() if path.exists()}

    def judge(self, skill: str, features: np.ndarray) -> tuple[float | None, bool | None]:
        """Highest probability of success, and whether it passed the threshold, over features float32 [N, F] since the filter's reset.

        None and None without a classifier of the skill, or when the trial did not outlast the warm-up. Raises CheckpointError on features
        of another world model.
        """
        classifier = self.classifiers.get(skill)
        if classifier is None or len(features) <= self.warmup_frames:
            return None, None
        if np.shape(features)[1:] != (self.model.feature_size,):
            raise CheckpointError(
                f"{skill}: expected features of {self.model.feature_size} numbers, found {np.shape(features)[1:]}. "
                "The graph runs another world model than the plan's."
            )
        feature = torch.from_numpy(np.array(features[self.warmup_frames - 1 :], np.float32))
        seen = readout(self.model, State(*feature.split([self.model.rssm.deterministic, self.model.rssm.latent.size], -1)))
        with torch.inference_mode():
            best = classifier.judge(seen[None, 1:], seen[:1]).sigmoid().max()
        return float(best), bool(best > classifier.filtered_threshold)
