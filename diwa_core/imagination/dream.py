"""The Dream Diffusion MDP's outer environment: a frozen world model as thousands of parallel episodes, tensors from end to end.

One step executes a chunk of H actions. The reward is 1 on the first chunk in which the success classifier fires, and the episode
ends there; it is truncated after `max_chunks`. Both start a new episode from the start bank at once.
Letters: B parallel dreams, H chunk, A action, F feature, N starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diwa_core.errors import CheckpointError, ConfigError
from diwa_core.reward.classifier import SuccessClassifier
from diwa_core.world_model.command import TARGET
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
    """`batch` episodes in imagination. Starts are filtered latents of recorded frames; the simulator is never asked.

    models: world models that share their embedding. The first one's states are what the policy sees. `drivers` are the numbers of the
    models that decide what happens, each in an equal share of the episodes: an ensemble is harder to exploit than one model, and a model
    that never drove while the policy learned is an honest judge. starts: the same recorded frames as filtered by each model.
    misplaced_m: in each episode the arm really is elsewhere than the policy sees, by a random offset of this deviation per axis; so a
    policy learns to reach the middle of what works, not an edge that only the model believes in.
    autocast: the world models' matrix products in bfloat16, as they were trained; not bit for bit what float32 dreams.
    """

    def __init__(
        self,
        models: list[WorldModel],
        classifier: SuccessClassifier,
        starts: list[State],
        batch: int,
        max_chunks: int = 18,
        seed: int = 0,
        drivers: tuple[int, ...] = (0,),
        misplaced_m: float = 0.0,
        autocast: bool = False,
    ) -> None:
        if len(models) != len(starts) or not all(0 <= driver < len(models) for driver in drivers) or not drivers:
            raise ConfigError(
                f"a dream of {len(models)} models needs starts of each (found {len(starts)}) and drivers among them: {drivers}."
            )
        if not all(torch.equal(model.command.mean, models[0].command.mean) for model in models):
            raise ConfigError("the models of a dream must share their embedding; train them with `diwa world-model train --codes`.")
        self.models, self.classifier, self.starts, self.batch, self.max_chunks = models, classifier, starts, batch, max_chunks
        if misplaced_m and models[0].config.latent != "residual":
            raise ConfigError("misplaced_m needs world models with residual latents, in which the arm's place can be told.")
        self.device, self.autocast, self.misplaced_m = models[0].device, autocast, misplaced_m
        self.generator = torch.Generator(self.device).manual_seed(seed)
        edges = torch.linspace(0, batch, len(drivers) + 1).round().long().tolist()
        self.parts = [(driver, slice(*rows)) for driver, rows in zip(drivers, pairwise(edges), strict=True)]
        self.reset()

    def _draw(self) -> tuple[State, Tensor, Tensor]:
        """A start for every episode: the state that is seen, the driver's deterministic state, and by how much its latent is elsewhere."""
        pick = torch.randint(len(self.starts[0].h), (self.batch,), generator=self.generator, device=self.device)
        seen, driver_h = self.starts[0][pick], torch.cat([self.starts[driver].h[pick[rows]] for driver, rows in self.parts])
        offset = torch.zeros_like(seen.z)
        if self.misplaced_m:  # the measured pose is kept as a lag behind the commanded one, so both move together
            metres = self.misplaced_m * torch.randn(self.batch, 3, generator=self.generator, device=self.device)
            offset[:, TARGET] = metres / self.models[0].command.std[TARGET]
        return seen, driver_h, offset

    @torch.no_grad()
    def reset(self) -> Tensor:
        """Start all episodes anew; returns features [B, F]."""
        self.latent, self.driver_h, self.offset = self._draw()
        self.start_readout = readout(self.models[0], self.latent)
        self.chunks = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        return self.latent.feature

    @torch.no_grad()
    def step(self, chunk: Tensor) -> DreamStep:
        """Execute `chunk` [B, H, A] open loop."""
        success = torch.zeros(self.batch, dtype=torch.bool, device=self.device)
        for action in executable(chunk).unbind(1):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                self._imagine(action)
            success |= self.classifier.success(readout(self.models[0], self.latent), self.start_readout)
        self.chunks += 1
        truncated = (self.chunks >= self.max_chunks) & ~success
        final = self.latent.feature
        done = success | truncated
        if done.any():
            fresh, fresh_h, fresh_offset = self._draw()
            self.latent = fresh.where(done, self.latent)
            self.driver_h = torch.where(done[:, None], fresh_h, self.driver_h)
            self.offset = torch.where(done[:, None], fresh_offset, self.offset)
            self.start_readout = torch.where(done[:, None], readout(self.models[0], fresh), self.start_readout)
            self.chunks = torch.where(done, 0, self.chunks)
        return DreamStep(self.latent.feature, final, success.float(), success, truncated)

    def _imagine(self, action: Tensor) -> None:
        """One step: each episode's driver says what happens, the first model takes note of it."""
        seer, states, driver_h = self.models[0].rssm, [], []
        for driver, rows in self.parts:
            state, offset = self.latent[rows], self.offset[rows]
            driven = self.models[driver].rssm.imagine(State(self.driver_h[rows], state.z + offset), action[rows], self.generator)
            own = driver == 0 and not self.misplaced_m
            states.append(driven if own else State(seer.advance(state, action[rows]), driven.z - offset))
            driver_h.append(driven.h)
        self.latent = State(torch.cat([s.h for s in states]), torch.cat([s.z for s in states]))
        self.driver_h = torch.cat(driver_h)

    # ---- resuming -----------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """All that the next steps depend on."""
        latents = {"h": self.latent.h, "z": self.latent.z, "driver_h": self.driver_h, "offset": self.offset, "start": self.start_readout}
        return {**latents, "chunks": self.chunks, "generator": self.generator.get_state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `state`; raises CheckpointError when it is of another batch or model."""
        own = self.state()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
            raise CheckpointError("the saved dreams are of another batch size or world model; start the fine-tuning in a new run folder.")
        self.latent, self.driver_h = State(tensors["h"], tensors["z"]), tensors["driver_h"]
        self.offset, self.start_readout, self.chunks = tensors["offset"], tensors["start"], tensors["chunks"]
        self.generator.set_state(tensors["generator"].cpu())
