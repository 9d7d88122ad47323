"""The diffusion policy: action chunks from a feature of the world model, and the denoising chains that fine-tuning learns on.

Letters: B batch, H chunk, A action, F feature, K denoising steps. Chunks hold actions in [-1, 1].
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from diwa_core.errors import ConfigError
from diwa_core.policy.denoiser import Denoiser
from diwa_core.policy.schedule import NoiseSchedule, gaussian_log_prob

SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True)
class PolicyConfig:
    """Shape and sampler of a diffusion policy; the defaults are the paper's."""

    feature_size: int
    horizon: int = 4
    action_size: int = 7
    denoising_steps: int = 20
    hidden: tuple[int, ...] = (512, 512, 512)
    time_size: int = 16
    sampler: str = "ddpm"  # ddpm: all steps, stochastic; ddim: sampler_steps of them with noise share eta
    sampler_steps: int = 20
    eta: float = 0.0  # of ddim: 0 deterministic, 1 as noisy as ddpm
    std_floor: float = 1e-3  # at evaluation, for stochastic samplers; the last step is noise-free
    feature_clip: float = 5.0  # bound on standardised features: a rare code may lie tens of deviations out
    finetuned_steps: int = 0  # the last so many denoising steps use a second, fine-tuned network

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"sampler: expected one of {SAMPLERS}, found {self.sampler!r}.")
        for name, value, low, high in (
            ("sampler_steps", self.sampler_steps, 1, self.denoising_steps),
            ("finetuned_steps", self.finetuned_steps, 0, self.denoising_steps),
            ("eta", self.eta, 0, 1),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name}: expected {low} to {high}, found {value}.")


@dataclass
class Chain:
    """Sampled denoising chains. states [B, K+1, H, A] from pure noise to actions; log_prob [B, K, H, A] of each transition."""

    states: Tensor
    log_prob: Tensor

    @property
    def actions(self) -> Tensor:
        """The sampled chunks [B, H, A], not yet clipped to [-1, 1]."""
        return self.states[:, -1]


class DiffusionPolicy(nn.Module):
    """Denoises action chunks [B, H, A] on a world-model feature [B, F], which it standardises by its own statistics."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = NoiseSchedule(config.denoising_steps)
        self.base = Denoiser(config.horizon, config.action_size, config.feature_size, config.hidden, config.time_size)
        self.finetuned = copy.deepcopy(self.base) if config.finetuned_steps else None
        self.register_buffer("feature_mean", torch.zeros(config.feature_size))
        self.register_buffer("feature_std", torch.ones(config.feature_size))

    def set_feature_statistics(self, features: Tensor, min_std: float = 0.1) -> None:
        """Take mean and deviation from the training features [N, F]; nearly constant features are not blown up."""
        self.feature_mean.copy_(features.mean(0))
        self.feature_std.copy_(features.std(0, correction=0).clamp(min=min_std))

    def add_finetuned(self, steps: int) -> DiffusionPolicy:
        """A copy of this policy whose last `steps` denoising steps run on a second network, at first equal to the base."""
        policy = DiffusionPolicy(replace(self.config, finetuned_steps=steps)).to(self.feature_mean.device)
        policy.load_state_dict(self.state_dict() | {f"finetuned.{name}": value for name, value in self.base.state_dict().items()})
        return policy.train(self.training)

    def loss(self, actions: Tensor, feature: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the predicted noise at a random step (Ho et al. 2020, eq. 14). actions [B, H, A], feature [B, F]."""
        k = self._random((len(actions),), generator, integers=True)
        noise = self._random(tuple(actions.shape), generator)
        noisy = self.schedule.add_noise(actions, noise, k)
        return functional.mse_loss(self.base(noisy, k, self.base.embed(self._standardise(feature))), noise)

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """All the noise one call of `sample` or `sample_chain` uses [B, K+1, H, A]: the start, then one draw per step."""
        return self._random((batch, self.config.denoising_steps + 1, self.config.horizon, self.config.action_size), generator)

    @torch.no_grad()
    def sample(
        self, feature: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None, return_chain: bool = False
    ) -> Tensor:
        """Chunks [B, H, A] in [-1, 1] for features [B, F] with the configured sampler, as at evaluation.

        noise: as `draw_noise` gives it, instead of a generator; the result of a row then depends on nothing but that row.
        return_chain: all states from noise to chunk [B, steps+1, H, A] instead.
        """
        config = self.config
        ddim = config.sampler == "ddim"
        steps = self.schedule.ddim_steps(config.sampler_steps) if ddim else list(reversed(range(config.denoising_steps)))
        eta = config.eta if ddim else 1.0
        noise = self.draw_noise(len(feature), generator) if noise is None else noise
        embed = self._embedder(feature)
        states = [noise[:, 0]]
        for i, (k, previous) in enumerate(zip(steps, [*steps[1:], -1], strict=True)):
            mean, std = self._step(embed, states[-1], k, previous, eta)
            noise_free = previous < 0 or eta == 0
            states.append(mean if noise_free else mean + max(std, config.std_floor) * noise[:, i + 1])
        return torch.stack(states, dim=1) if return_chain else states[-1]

    @torch.no_grad()
    def sample_chain(
        self,
        feature: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        std_floor: float = 0.1,
        noise_clip: float = 3.0,
        base_only: bool = False,
    ) -> Chain:
        """Chains for learning: all K steps, deviation at least `std_floor` to explore (also in the last step), noise clipped.

        base_only: ignore the fine-tuned network, for chains of the frozen policy.
        """
        noise = self.draw_noise(len(feature), generator) if noise is None else noise
        embed = self._embedder(feature, base_only)
        states, log_prob = [noise[:, 0]], []
        for i, k in enumerate(reversed(range(self.config.denoising_steps))):
            mean, std = self._step(embed, states[-1], k, k - 1, eta=1.0, base_only=base_only)
            std = max(std, std_floor)
            states.append(mean + std * noise[:, i + 1].clamp(-noise_clip, noise_clip))
            log_prob.append(gaussian_log_prob(states[-1], mean, std))
        return Chain(torch.stack(states, dim=1), torch.stack(log_prob, dim=1))

    def chain_log_prob(self, feature: Tensor, chains: Tensor, std_floor: float = 0.1) -> Tensor:
        """Log density [B, M, K', H, A] of the last K' transitions of M chains [B, M, K'+1, H, A] per feature [B, F], with gradients.

        Runs on the fine-tuned network, so K' must not exceed `finetuned_steps`; on the base where there is none. The feature is embedded
        once for all of its transitions.
        """
        network = self.finetuned if self.finetuned is not None else self.base
        batch, count, steps = chains.shape[0], chains.shape[1], chains.shape[2] - 1
        noisy, cleaner = chains[:, :, :-1].flatten(0, 2), chains[:, :, 1:].flatten(0, 2)
        k = torch.arange(steps - 1, -1, -1, device=chains.device).repeat(batch * count)
        embedded = network.embed(self._standardise(feature)).repeat_interleave(count * steps, 0)
        mean, std = self.schedule.transition(noisy, network(noisy, k, embedded), k, k - 1, eta=1.0)
        return gaussian_log_prob(cleaner, mean, std.clamp(min=std_floor)).view(batch, count, steps, *chains.shape[3:])

    def _step(
        self, embed: dict[Denoiser, Tensor], noisy: Tensor, k: int, previous: int, eta: float, base_only: bool = False
    ) -> tuple[Tensor, float]:
        network = self.base if base_only or k >= self.config.finetuned_steps else self.finetuned
        predicted = network(noisy, torch.full((1,), k, device=noisy.device), embed[network])
        return self.schedule.transition(noisy, predicted, k, previous, eta)

    def _embedder(self, feature: Tensor, base_only: bool = False) -> dict[Denoiser, Tensor]:
        """The feature's part of the first layer, once per chain, for each network in use."""
        feature = self._standardise(feature)
        networks = [self.base] if base_only or self.finetuned is None else [self.base, self.finetuned]
        return {network: network.embed(feature) for network in networks}

    def _standardise(self, feature: Tensor) -> Tensor:
        return ((feature - self.feature_mean) / self.feature_std).clamp(-self.config.feature_clip, self.config.feature_clip)

    def _random(self, shape: tuple[int, ...], generator: torch.Generator | None, integers: bool = False) -> Tensor:
        """Normal noise, or steps below K. Drawn where the generator lives: a CPU generator gives the same numbers on every device."""
        device = self.feature_mean.device
        source = generator.device if generator is not None else device
        if integers:
            return torch.randint(self.config.denoising_steps, shape, generator=generator, device=source).to(device)
        return torch.randn(shape, generator=generator, device=source).to(device)

    def __repr__(self) -> str:
        parts = {name: sum(p.numel() for p in module.parameters()) for name, module in self.named_children()}
        sizes = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parts.items() if count)
        return f"DiffusionPolicy({sizes} parameters; {self.config})"
