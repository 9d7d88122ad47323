"""The network that predicts the noise in an action chunk from the chunk, the denoising step and a feature of the world model.

Letters: B batch, H chunk, A action, F feature, D hidden width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """x + W2 mish(W1 mish(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.mish(self.first(functional.mish(x))))


class Denoiser(nn.Module):
    """Residual MLP on concat(noisy chunk, time embedding, feature).

    The first linear layer is kept in two parts, so that a whole denoising chain multiplies the feature, its widest input, only once.
    """

    def __init__(self, horizon: int, action_size: int, feature_size: int, hidden: tuple[int, ...], time_size: int) -> None:
        super().__init__()
        if len(hidden) % 2 == 0 or len(set(hidden)) != 1:
            raise ValueError(f"hidden must be an odd number of equal widths (one input layer, blocks of two), found {hidden}")
        width = hidden[0]
        self.time_size = time_size
        self.time_layers = nn.Sequential(nn.Linear(time_size, 2 * time_size), nn.Mish(), nn.Linear(2 * time_size, time_size))
        self.feature_layer = nn.Linear(feature_size, width)
        self.chunk_layer = nn.Linear(horizon * action_size + time_size, width, bias=False)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(len(hidden) // 2)))
        self.output_layer = nn.Linear(width, horizon * action_size)

    def embed(self, feature: Tensor) -> Tensor:
        """Feature [B, F] -> its part of the first layer [B, D]."""
        return self.feature_layer(feature)

    def forward(self, noisy: Tensor, k: Tensor, embedded: Tensor) -> Tensor:
        """Noisy chunk [B, H, A], step k [B] (or [1] for all), embedded feature [B, D] -> predicted noise [B, H, A]."""
        time = self.time_layers(sinusoidal_embedding(k, self.time_size))
        x = self.chunk_layer(torch.cat([noisy.flatten(1), time.expand(len(noisy), -1)], dim=1)) + embedded
        return self.output_layer(self.blocks(x)).view_as(noisy)


def sinusoidal_embedding(k: Tensor, size: int) -> Tensor:
    """Steps [B] -> sines and cosines of geometrically spaced frequencies [B, size] (Vaswani et al. 2017)."""
    half = size // 2
    frequencies = torch.exp(torch.arange(half, device=k.device) * (-math.log(10000) / (half - 1)))
    angles = k[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
