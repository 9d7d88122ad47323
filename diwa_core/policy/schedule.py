"""The noise schedule and the one Gaussian denoising transition behind DDPM and DDIM.

Letters: B batch, H chunk, A action, K denoising steps. Step k runs from K-1 (noisiest) to 0; -1 stands for the clean sample.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn


def cosine_betas(steps: int, offset: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """Variances of the forward steps, float64 [K]; cosine schedule (Nichol and Dhariwal 2021, eq. 17)."""
    angle = (np.arange(steps + 1) / steps + offset) / (1 + offset) * math.pi / 2
    alpha_bar = np.cos(angle) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def gaussian_log_prob(value: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """Log density of `value` under N(mean, std), element by element."""
    log_std = math.log(std) if isinstance(std, float) else std.log()
    return -0.5 * ((value - mean) / std) ** 2 - log_std - 0.5 * math.log(2 * math.pi)


class NoiseSchedule(nn.Module):
    """Cosine schedule of K steps on the device of the module; holds no weights."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        alpha_bar = np.concatenate([[1.0], np.cumprod(1 - cosine_betas(steps))])  # index k + 1, so that k = -1 is the clean sample
        self.steps = steps
        self._numbers: list[float] = alpha_bar.tolist()
        self.register_buffer("alpha_bar", torch.tensor(alpha_bar, dtype=torch.float32), persistent=False)

    def add_noise(self, clean: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """Diffuse `clean` [B, H, A] to step k [B] (Ho et al. 2020, eq. 4)."""
        alpha_bar = self.alpha_bar[k + 1, None, None]
        return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise

    def transition(
        self, noisy: Tensor, predicted_noise: Tensor, k: Tensor | int, previous: Tensor | int, eta: float
    ) -> tuple[Tensor, Tensor | float]:
        """Mean [B, H, A] and standard deviation of the step from k to previous < k (Song et al. 2021, eq. 12, 16).

        k, previous: one step for the batch, or one per row [B]; the deviation is then a number, or [B, 1, 1]. The clean sample is
        clipped to [-1, 1] and the noise derived from it again. eta = 0 is DDIM; eta = 1 with previous = k - 1 is exactly DDPM with
        its posterior variance (Ho et al. 2020, eq. 7).
        """
        alpha_bar, alpha_bar_next = self._at(k), self._at(previous)
        clean = ((noisy - (1 - alpha_bar) ** 0.5 * predicted_noise) / alpha_bar**0.5).clamp(-1, 1)
        noise = (noisy - alpha_bar**0.5 * clean) / (1 - alpha_bar) ** 0.5
        share = eta**2 * (alpha_bar_next - alpha_bar) / (alpha_bar_next * (1 - alpha_bar))  # of the remaining variance that is drawn anew
        mean = alpha_bar_next**0.5 * clean + ((1 - alpha_bar_next) * (1 - share)) ** 0.5 * noise
        return mean, ((1 - alpha_bar_next) * share) ** 0.5

    def _at(self, k: Tensor | int) -> Tensor | float:
        """alpha_bar as [B, 1, 1] for steps [B]; for one step as a number, which spares a chain many small tensor operations."""
        return self._numbers[k + 1] if isinstance(k, int) else self.alpha_bar[k + 1, None, None]

    def ddim_steps(self, count: int) -> list[int]:
        """`count` of the K steps, evenly spaced from the noisiest down ("trailing", Lin et al. 2024)."""
        return [round(self.steps - i * self.steps / count) - 1 for i in range(count)]
