"""The Dream Diffusion MDP's outer environment: a frozen world model as thousands of parallel episodes, tensors from end to end.

One step executes a chunk of H actions. The reward is 1 on the first chunk in which the success classifier fires, and the episode
ends there; it is truncated after `max_chunks`. Both start a new episode from the start bank at once.
Letters: B parallel dreams, H chunk, A action, F feature, N starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diwa_core.reward.classifier import SuccessClassifier
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.probe import readout
from diwa_core.world_model.rssm import State


@dataclass
class DreamStep:
    """What a step returned. `feature` [B, F]: where the policy acts next (after auto-reset); `final_feature`: where the step ended."""

    feature: Tensor
    final_feature: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor


def executable(chunk: Tensor) -> Tensor:
    """Sampled actions [.., A] as a robot executes them: deltas clipped to [-1, 1], gripper -1 or +1."""
    gripper = torch.where(chunk[..., 6:] >= 0, 1.0, -1.0)
    return torch.cat([chunk[..., :6].clamp(-1, 1), gripper], -1)


class Dream:
    """`batch` episodes in imagination. Starts are filtered latents of recorded frames; the simulator is never asked."""

    def __init__(
        self, model: WorldModel, classifier: SuccessClassifier, starts: State, batch: int, max_chunks: int = 18, seed: int = 0
    ) -> None:
        self.model, self.classifier, self.starts, self.batch, self.max_chunks = model, classifier, starts, batch, max_chunks
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self.reset()

    def _draw(self, count: int) -> State:
        return self.starts[torch.randint(len(self.starts.h), (count,), generator=self.generator, device=self.model.device)]

    @torch.no_grad()
    def reset(self) -> Tensor:
        """Start all episodes anew; returns features [B, F]."""
        self.state = self._draw(self.batch)
        self.start_readout = readout(self.model, self.state)
        self.chunks = torch.zeros(self.batch, dtype=torch.long, device=self.model.device)
        return self.state.feature

    @torch.no_grad()
    def step(self, chunk: Tensor) -> DreamStep:
        """Execute `chunk` [B, H, A] open loop."""
        success = torch.zeros(self.batch, dtype=torch.bool, device=self.model.device)
        for action in executable(chunk).unbind(1):
            self.state = self.model.rssm.imagine(self.state, action, self.generator)
            success |= self.classifier.success(readout(self.model, self.state), self.start_readout)
        self.chunks += 1
        truncated = (self.chunks >= self.max_chunks) & ~success
        final = self.state.feature
        done = success | truncated
        if done.any():
            fresh = self._draw(self.batch)
            self.state = fresh.where(done, self.state)
            self.start_readout = torch.where(done[:, None], readout(self.model, fresh), self.start_readout)
            self.chunks = torch.where(done, 0, self.chunks)
        return DreamStep(self.state.feature, final, success.float(), success, truncated)
