"""Denoising PPO (Ren et al. 2024; DiWA, section 4): a policy gradient on the last K' denoising steps of a diffusion policy.

The environment is anything with `reset() -> feature` and `step(chunk) -> DreamStep`: imagination (DiWA), or the simulator
(DPPO, the baseline).
Letters: B episodes in parallel, C chunks per iteration, K' fine-tuned denoising steps, H chunk, A action, F feature.
Rows of a batch are states; pairs are (state, k).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diwa_core.imagination.dream import DreamStep
from diwa_core.policy.diffusion import DiffusionPolicy


@dataclass(frozen=True)
class PPOConfig:
    """Hyperparameters; the defaults learn within minutes on a CPU, `PAPER` holds the paper's."""

    iterations: int = 60
    batch: int = 512  # parallel episodes
    chunks: int = 18  # per episode and iteration
    finetuned_steps: int = 5
    epochs: int = 2
    minibatch: int = 1536  # states, each with all its denoising steps
    actor_rate: float = 3e-4
    critic_rate: float = 1e-3
    clip_first: float = 0.01  # at the noisiest fine-tuned step
    clip_last: float = 0.05  # at the last
    clip_growth: float = 3.0
    gamma: float = 0.95  # per chunk: a success in ten chunks is worth more than one in eighteen, where evaluation stops
    gae_lambda: float = 0.95
    denoising_discount: float = 0.99
    std_floor: float = 0.1
    log_prob_range: tuple[float, ...] = (-5.0, 2.0)
    bc_scale: float = 0.05
    bc_share: float = 0.25  # of the states that the regulariser is taken on: an unbiased sample, at a quarter of the cost
    value_scale: float = 0.5
    target_kl: float = 1.0
    critic_warmup: int = 2
    max_grad_norm: float = 1.0


PAPER = PPOConfig(
    iterations=800,
    batch=50,
    chunks=36,
    finetuned_steps=10,
    epochs=10,
    minibatch=1800,
    actor_rate=1e-5,
    clip_first=0.001,
    clip_last=0.01,
    gamma=0.999,
)


class Critic(nn.Module):
    """Value of a feature [B, F] -> [B]; residual MLP, Mish, on standardised features."""

    def __init__(self, features: int, hidden: int = 256) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(features, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def forward(self, feature: Tensor) -> Tensor:
        """[B]."""
        hidden = nn.functional.mish(self.first(((feature - self.mean) / self.std).clamp(-5, 5)))
        return self.out(hidden + nn.functional.mish(self.second(hidden))).squeeze(-1)


@dataclass
class Rollout:
    """One iteration's experience, chunk first: features [C, B, F], chains [C, B, K'+1, H, A], log-probs [C, B, K'], the rest [C, B]."""

    features: Tensor
    chains: Tensor
    log_probs: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    final_values: Tensor
    values: Tensor
    last_value: Tensor


def clip_schedule(config: PPOConfig, steps_from_noisiest: Tensor) -> Tensor:
    """PPO's clip per denoising step: exponential growth from the noisiest fine-tuned step (0) to the last (K' - 1)."""
    position = steps_from_noisiest.float() / max(config.finetuned_steps - 1, 1)
    growth = torch.expm1(config.clip_growth * position) / torch.expm1(torch.tensor(config.clip_growth))
    return config.clip_first + (config.clip_last - config.clip_first) * growth


def advantages(rollout: Rollout, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns [C, B]; truncation bootstraps from the state where the episode was cut, termination does not."""
    next_values = torch.cat([rollout.values[1:], rollout.last_value[None]])
    next_values = torch.where(rollout.truncated, rollout.final_values, next_values)
    next_values = torch.where(rollout.terminated, 0.0, next_values)
    done = rollout.terminated | rollout.truncated
    deltas = rollout.rewards + gamma * next_values - rollout.values
    result, running = torch.zeros_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        running = deltas[t] + gamma * gae_lambda * torch.where(done[t], 0.0, running)
        result[t] = running
    return result, result + rollout.values


def policy_loss(new: Tensor, old: Tensor, advantage: Tensor, k: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Clipped surrogate over (state, k) pairs (broadcastable shapes) and the mean approximate KL; k counts down to 0, the last step."""
    log_ratio = new - old
    ratio = log_ratio.exp()
    discounted = advantage * config.denoising_discount ** k.float()
    clip = clip_schedule(config, config.finetuned_steps - 1 - k)
    clipped = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
    surrogate = torch.minimum(ratio * discounted, clipped * discounted)
    return -surrogate.mean(), (ratio - 1 - log_ratio).mean().detach()


class RewardScale:
    """Divides rewards by the running standard deviation of discounted returns."""

    def __init__(self, gamma: float) -> None:
        self.gamma, self.returns = gamma, None
        self.count, self.mean, self.m2 = 1e-4, 0.0, 1e-4

    def __call__(self, rewards: Tensor, done: Tensor) -> Tensor:
        """Scaled rewards of one step [B]."""
        self.returns = rewards if self.returns is None else self.gamma * self.returns + rewards
        for value in (self.returns.mean().item(),):
            batch, variance = len(self.returns), self.returns.var(correction=0).item()
            delta, total = value - self.mean, self.count + batch
            self.m2 += variance * batch + delta**2 * self.count * batch / total
            self.mean, self.count = self.mean + delta * batch / total, total
        self.returns = torch.where(done, 0.0, self.returns)
        return rewards / max((self.m2 / self.count) ** 0.5, 1e-3)


class DenoisingPPO:
    """Improves a copy of `policy` in `env`; `iterate()` runs one iteration and returns its metrics.

    autocast: the policy's matrix products in bfloat16 while it explores and learns, in half the time. Old and new log-probs are then
    rounded nearly alike: where nothing has changed they differ by less than the tightest clip.
    """

    def __init__(self, policy: DiffusionPolicy, env, config: PPOConfig, seed: int = 0, autocast: bool = False) -> None:
        self.env, self.config, self.autocast = env, config, autocast
        self.policy = policy.add_finetuned(config.finetuned_steps).requires_grad_(False)
        self.policy.finetuned.requires_grad_(True)
        device = policy.feature_mean.device
        self.generator = torch.Generator(device).manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.critic = Critic(policy.config.feature_size).to(device)
        self.critic.mean.copy_(policy.feature_mean)
        self.critic.std.copy_(policy.feature_std)
        self.actor_optimizer = torch.optim.AdamW(self.policy.finetuned.parameters(), config.actor_rate, weight_decay=0.0)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), config.critic_rate, weight_decay=0.0)
        self.reward_scale = RewardScale(config.gamma)
        self.iteration = 0
        self.feature = env.reset()

    # ---- experience ---------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self) -> tuple[Rollout, dict[str, float]]:
        """Act for `chunks` chunks in every episode."""
        config, rows, successes, ended = self.config, [], 0.0, 0.0
        for _ in range(config.chunks):
            with self.precision():
                chain = self.policy.sample_chain(self.feature, self.generator, std_floor=config.std_floor)
            step: DreamStep = self.env.step(chain.actions)
            log_prob = self._reduce(chain.log_prob[:, -config.finetuned_steps :])
            done = step.terminated | step.truncated
            rewards = self.reward_scale(step.reward, done)
            states = chain.states[:, -config.finetuned_steps - 1 :]
            final = self.critic(step.final_feature)
            rows.append((self.feature, states, log_prob, rewards, step.terminated, step.truncated, final, self.critic(self.feature)))
            successes, ended = successes + step.terminated.sum().item(), ended + done.sum().item()
            self.feature = step.feature
        rollout = Rollout(*(torch.stack(values) for values in zip(*rows, strict=True)), last_value=self.critic(self.feature))
        return rollout, {"success": successes / max(ended, 1), "episodes": ended}

    def _reduce(self, log_prob: Tensor) -> Tensor:
        """Mean over chunk and action, clamped: [.., H, A] -> [..]."""
        low, high = self.config.log_prob_range
        return log_prob.mean((-1, -2)).clamp(low, high)

    # ---- learning -----------------------------------------------------------------------------------------------------------------

    def iterate(self) -> dict[str, float]:
        """Collect, then learn; the first iterations train the critic alone."""
        rollout, metrics = self.collect()
        advantage, returns = advantages(rollout, self.config.gamma, self.config.gae_lambda)
        features, returns = rollout.features.flatten(0, 1), returns.flatten()
        self._fit_critic(features, returns)
        if self.iteration >= self.config.critic_warmup:
            metrics |= self._fit_actor(features, rollout.chains.flatten(0, 1), rollout.log_probs.flatten(0, 1), advantage.flatten())
        self.iteration += 1
        explained = 1 - (returns - rollout.values.flatten()).var() / returns.var().clamp_min(1e-8)
        return metrics | {"explained_variance": explained.item()}

    def _fit_critic(self, features: Tensor, returns: Tensor) -> None:
        for _ in range(2 * self.config.epochs):
            for rows in torch.randperm(len(features), generator=self.generator, device=features.device).split(1024):
                loss = self.config.value_scale * 0.5 * (self.critic(features[rows]) - returns[rows]).square().mean()
                self.critic_optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.critic_optimizer.step()

    def _fit_actor(self, features: Tensor, chains: Tensor, old: Tensor, advantage: Tensor) -> dict[str, float]:
        """Several epochs over all (state, k) pairs; stops early when the policy moved by more than `target_kl`."""
        config = self.config
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        kl = loss = cloning = torch.zeros(())
        k = torch.arange(config.finetuned_steps - 1, -1, -1, device=old.device)
        for _ in range(config.epochs):
            for rows in torch.randperm(len(old), generator=self.generator, device=old.device).split(config.minibatch):
                loss, kl = policy_loss(self._log_prob(features[rows], chains[rows]), old[rows], advantage[rows, None], k, config)
                total = loss
                if config.bc_scale:
                    few = features[rows[: max(1, round(config.bc_share * len(rows)))]]
                    cloning = -self._log_prob(few, self._frozen_chains(few)).mean()
                    total = loss + config.bc_scale * cloning
                self.actor_optimizer.zero_grad(set_to_none=True)
                total.backward()
                nn.utils.clip_grad_norm_(self.policy.finetuned.parameters(), config.max_grad_norm)
                self.actor_optimizer.step()
            if kl > config.target_kl:
                break
        return {"policy_loss": loss.item(), "kl": kl.item(), "cloning": cloning.item()}

    def _log_prob(self, features: Tensor, chains: Tensor) -> Tensor:
        """Log-probs [N, K'] of chains [N, K'+1, H, A], with gradients."""
        with self.precision():
            log_prob = self.policy.chain_log_prob(features, chains[:, None], self.config.std_floor)
        return self._reduce(log_prob)[:, 0]

    @torch.no_grad()
    def _frozen_chains(self, features: Tensor) -> Tensor:
        """Chains of the frozen policy at the visited states [N, K'+1, H, A]."""
        with self.precision():
            chain = self.policy.sample_chain(features, self.generator, std_floor=self.config.std_floor, base_only=True)
        return chain.states[:, -self.config.finetuned_steps - 1 :]

    def precision(self) -> torch.autocast:
        """The context in which the policy explores and learns."""
        return torch.autocast(self.policy.feature_mean.device.type, torch.bfloat16, enabled=self.autocast)
