"""Recurrent state-space model (Hafner et al. 2019, 2021): one module for single steps and for sequences.

A state is a deterministic part h and a latent part z. Two kinds of latent share the recurrence:
- categorical: z is a sample of one-hot groups; the posterior reads h and the embedded observation (DreamerV2, used by DiWA).
- residual: z lives in the space of the embedded observation. The prior is z plus a predicted change; the posterior goes from there
  a share of the way to the embedding, as in a Kalman filter of constant gain. Nothing that was measured is squeezed through a bottleneck,
  so open-loop errors stay small on little compute; and what a policy sees live is as smooth as what it saw in dreams.
Letters: B batch, T time, D deterministic, Z latent, E embedding, A action.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diwa_core.world_model.command import COMMANDED, LAG, CommandedPose
from diwa_core.world_model.distributed import RandomSource, exponential_like, normal_like


@dataclass
class State:
    """h [B, D] and z [B, Z]; with a time axis after B when it holds a sequence."""

    h: Tensor
    z: Tensor

    @property
    def feature(self) -> Tensor:
        """What policies, classifiers and critics see: [.., D + Z]."""
        return torch.cat([self.h, self.z], dim=-1)

    def detach(self) -> State:
        """The same state outside the autograd graph."""
        return State(self.h.detach(), self.z.detach())

    def where(self, keep: Tensor, other: State) -> State:
        """This state where `keep` [B] is true, `other` elsewhere."""
        return State(torch.where(keep[:, None], self.h, other.h), torch.where(keep[:, None], self.z, other.z))

    def __getitem__(self, index) -> State:
        return State(self.h[index], self.z[index])


def _head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ELU(), nn.Linear(hidden, outputs))


class CategoricalLatent(nn.Module):
    """`groups` one-hot variables of `classes` each, straight-through gradients; distribution parameters are logits [.., Z]."""

    def __init__(self, deterministic: int, hidden: int, embedding: int, groups: int, classes: int) -> None:
        super().__init__()
        self.groups, self.classes, self.size = groups, classes, groups * classes
        self.prior_head = _head(deterministic, hidden, self.size)
        self.posterior_in = nn.Linear(deterministic, hidden)
        self.posterior_embedding = nn.Linear(embedding, hidden, bias=False)
        self.posterior_out = nn.Sequential(nn.LayerNorm(hidden), nn.ELU(), nn.Linear(hidden, self.size))

    def prior(self, h: Tensor, previous: State, action: Tensor) -> Tensor:
        """Logits [B, Z] of the latent before the observation."""
        return self.prior_head(h).float()

    def posterior(self, h: Tensor, embedding: Tensor, prior: Tensor, fresh: Tensor) -> Tensor:
        """Logits [B, Z] of the latent given the observation."""
        return self.posterior_out(self.posterior_in(h) + self.posterior_embedding(embedding)).float()

    def sample(self, logits: Tensor, generator: RandomSource = None) -> Tensor:
        """One-hot sample [.., Z] whose gradient is that of the probabilities."""
        grouped = logits.unflatten(-1, (self.groups, self.classes))
        probabilities = grouped.softmax(-1)
        noise = exponential_like(grouped, generator)
        one_hot = F.one_hot((probabilities / noise).argmax(-1), self.classes).to(probabilities.dtype)
        return (one_hot + probabilities - probabilities.detach()).flatten(-2)

    def divergence(self, posterior: Tensor, prior: Tensor, balance: float) -> Tensor:
        """KL(posterior || prior) [..], summed over groups; `balance` is the share that trains the prior (DreamerV2, eq. 2)."""

        def kl(p: Tensor, q: Tensor) -> Tensor:
            p_log, q_log = (x.unflatten(-1, (self.groups, self.classes)).log_softmax(-1) for x in (p, q))
            return (p_log.exp() * (p_log - q_log)).sum((-1, -2))

        return balance * kl(posterior.detach(), prior) + (1 - balance) * kl(posterior, prior.detach())


class ResidualLatent(nn.Module):
    """The latent estimates the embedded observation; the prior predicts its change. Parameters: mean [.., Z], log-std if stochastic.

    The commanded pose inside it is not predicted but computed by `command`; of the arm the prior predicts which share of its way to the
    commanded pose it goes (none when something is in the way), so neither free motion nor contact drifts.
    """

    def __init__(
        self, deterministic: int, hidden: int, embedding: int, action: int, stochastic: bool, gain: float, command: CommandedPose
    ) -> None:
        super().__init__()
        self.size, self.stochastic, self.gain = embedding, stochastic, gain
        self.outputs = embedding * (2 if stochastic else 1)
        self._command = (command,)  # the world model's own; in a tuple, so that its buffers are not stored twice
        self.prior_head = _head(deterministic + embedding + action, hidden, self.outputs + LAG.stop)
        self.direct = nn.Linear(embedding + action, embedding, bias=False)  # a commanded pose moves linearly with the action
        nn.init.zeros_(self.direct.weight)
        nn.init.zeros_(self.prior_head[-1].bias)
        self.register_buffer("change_scale", torch.ones(embedding))  # std of one-step changes, measured on the play

    def prior(self, h: Tensor, previous: State, action: Tensor) -> Tensor:
        """Mean (and log-std) of the next latent, [B, Z] or [B, 2Z]."""
        inputs = torch.cat([previous.z, action], -1)
        out, share = self.prior_head(torch.cat([h, inputs], -1)).float().split([self.outputs, LAG.stop], -1)
        change = self.change_scale * (out[..., : self.size] + self.direct(inputs).float())
        (command,) = self._command
        commanded, held = command(previous.z[..., : command.mean.shape[0]], action)
        lag = command.close(held, share.sigmoid()) + change[..., LAG]
        mean = previous.z + change
        mean = torch.cat([lag, mean[..., LAG.stop : COMMANDED.start], commanded, mean[..., COMMANDED.stop :]], -1)
        if not self.stochastic:
            return mean
        return torch.cat([mean, (out[..., self.size :] - 3).clamp(-7, 1)], -1)

    def posterior(self, h: Tensor, embedding: Tensor, prior: Tensor, fresh: Tensor) -> Tensor:
        """`gain` of the way from the prior's mean to the embedding, all of it where nothing was seen before (`fresh` [B]); [B, Z]."""
        mean = self.mean(prior)
        return mean + torch.where(fresh, 1.0, self.gain)[:, None] * (embedding - mean)

    def mean(self, parameters: Tensor) -> Tensor:
        """Mean [.., Z] of a prior or posterior."""
        return parameters[..., : self.size]

    def sample(self, parameters: Tensor, generator: RandomSource = None) -> Tensor:
        """A sample of the prior [.., Z]; the mean when the model is deterministic or the parameters are a posterior's."""
        mean = self.mean(parameters)
        if parameters.shape[-1] == self.size:
            return mean
        return mean + parameters[..., self.size :].exp() * normal_like(mean, generator)


class RSSM(nn.Module):
    """h' = GRU(h, ELU(LN(W_z z + W_a a))); prior p(z'|h'), posterior q(z'|h', e'); learnable initial state."""

    def __init__(self, latent: nn.Module, deterministic: int, hidden: int, action: int) -> None:
        super().__init__()
        self.latent, self.deterministic = latent, deterministic
        self.embed_latent = nn.Linear(latent.size, hidden)
        self.embed_action = nn.Linear(action, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.cell = nn.GRUCell(hidden, deterministic)
        self.first_h = nn.Parameter(torch.zeros(deterministic))
        self.first_z = nn.Parameter(torch.zeros(latent.size))

    @property
    def feature_size(self) -> int:
        """Length of State.feature."""
        return self.deterministic + self.latent.size

    def initial(self, batch: int) -> State:
        """The learnable state before anything was seen, [B, ..]."""
        return State(self.first_h.expand(batch, -1), self.first_z.expand(batch, -1))

    def is_fresh(self, state: State) -> Tensor:
        """Which states are still the initial one [B]."""
        return (state.h == self.first_h).all(-1)

    def advance(self, state: State, action: Tensor) -> Tensor:
        """h after `action` [B, A]: [B, D]."""
        inputs = F.elu(self.norm(self.embed_latent(state.z) + self.embed_action(action)))
        return self._gru(inputs, state.h)

    def _gru(self, inputs: Tensor, h: Tensor) -> Tensor:
        """nn.GRUCell whose state stays float32 under autocast: rounding it at every step costs precision over long open loops."""
        cell = self.cell
        reset_x, update_x, new_x = F.linear(inputs, cell.weight_ih, cell.bias_ih).float().chunk(3, -1)
        reset_h, update_h, new_h = F.linear(h, cell.weight_hh, cell.bias_hh).float().chunk(3, -1)
        update = torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return torch.lerp(new, h.float(), update)

    def imagine(self, state: State, action: Tensor, generator: torch.Generator | None = None) -> State:
        """One step without an observation: the latent is drawn from the prior."""
        h = self.advance(state, action)
        return State(h, self.latent.sample(self.latent.prior(h, state, action), generator))

    def observe(self, state: State, action: Tensor, embedding: Tensor, generator: torch.Generator | None = None) -> State:
        """One step with an observation embedding [B, E]: the latent is drawn from the posterior."""
        h, posterior = self.estimate(state, action, embedding)
        return State(h, self.latent.sample(posterior, generator))

    def estimate(self, state: State, action: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """h [B, D] and the parameters of the posterior after `action`, given the observation embedding [B, E]."""
        h = self.advance(state, action)
        prior = self.latent.prior(h, state, action)
        return h, self.latent.posterior(h, embedding, prior, self.is_fresh(state))

    def unroll(
        self, state: State, actions: Tensor, embeddings: Tensor, first: Tensor, observed: Tensor, generator: RandomSource = None
    ) -> tuple[State, Tensor, Tensor]:
        """Filter a sequence; where `observed` is false the model goes on from its own prediction (open loop).

        actions [B, T, A] lead INTO each frame; embeddings [B, T, E]; first [B, T] resets the state before that frame; observed [B, T].
        Returns states (h [B, T, D], z [B, T, Z]) and the parameters of prior and posterior at every frame, both [B, T, .].
        """
        h_all, z_all, priors, posteriors = [], [], [], []
        fresh = self.initial(actions.shape[0])
        all_seen, any_first = observed.all(0).tolist(), first.any(0).tolist()
        for t in range(actions.shape[1]):
            action = actions[:, t]
            if any_first[t]:
                state = fresh.where(first[:, t], state)
            previous = state
            h = self.advance(state, action)
            prior = self.latent.prior(h, state, action)
            posterior = self.latent.posterior(h, embeddings[:, t], prior, self.is_fresh(previous))
            z = self.latent.sample(posterior, generator)
            if not all_seen[t]:
                z = torch.where(observed[:, t, None], z, self.latent.sample(prior, generator))
            state = State(h, z)
            for values, value in ((h_all, h), (z_all, z), (priors, prior), (posteriors, posterior)):
                values.append(value)
        return State(torch.stack(h_all, 1), torch.stack(z_all, 1)), torch.stack(priors, 1), torch.stack(posteriors, 1)
