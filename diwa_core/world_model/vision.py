"""Image encoders and decoders: the paper's CNNs, and the frozen whitened image code that trains in minutes on a CPU.

Letters: N images, C code, images are uint8 [N, 64, 64, 3] everywhere outside this file.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, 64, 64, 3] -> float32 [N, 3, 64, 64] in [-1, 1]."""
    return images.movedim(-1, -3).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float [N, 3, 64, 64] in [-1, 1] -> uint8 [N, 64, 64, 3]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


class ConvEncoder(nn.Sequential):
    """DreamerV2's encoder: float [N, 3, 64, 64] -> [N, 32 * width]; kernel 4, stride 2, ELU."""

    def __init__(self, width: int = 48) -> None:
        channels = [3, width, 2 * width, 4 * width, 8 * width]
        layers = [m for i, o in pairwise(channels) for m in (nn.Conv2d(i, o, 4, 2), nn.ELU())]
        super().__init__(*layers, nn.Flatten())
        self.size = 32 * width


class ConvDecoder(nn.Sequential):
    """DreamerV2's decoder: [N, 32 * width] -> float [N, 3, 64, 64]; kernels 5, 5, 6, 6, stride 2, ELU."""

    def __init__(self, width: int = 48) -> None:
        size = 32 * width
        super().__init__(
            nn.Unflatten(-1, (size, 1, 1)),
            nn.ConvTranspose2d(size, 4 * width, 5, 2),
            nn.ELU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 5, 2),
            nn.ELU(),
            nn.ConvTranspose2d(2 * width, width, 6, 2),
            nn.ELU(),
            nn.ConvTranspose2d(width, 3, 6, 2),
        )


class ImageCode(nn.Module):
    """Autoencoder of one view that is told the proprioception, so its code holds what the robot does not know already.

    Pixels are whitened one by one, so the few that move count as much as the background, and weighted by how slowly they change: a light
    that flips once a minute is the scene's state, the arm passing by is not. Trained first, then frozen.
    Letters: C code, P proprioception (standardised).
    """

    def __init__(self, size: int, proprio: int, width: int = 16, noise: float = 0.1) -> None:
        super().__init__()
        self.size, self.noise = size, noise
        w = width
        self.see = nn.Sequential(
            nn.Conv2d(3, w, 4, 2, 1),
            nn.ELU(),
            nn.Conv2d(w, 2 * w, 4, 2, 1),
            nn.ELU(),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1),
            nn.ELU(),
            nn.Conv2d(4 * w, 4 * w, 4, 2, 1),
            nn.ELU(),
            nn.Flatten(),
        )
        self.encoder = nn.Sequential(nn.Linear(64 * w + proprio, 16 * w), nn.ELU(), nn.Linear(16 * w, size))
        self.decoder = nn.Sequential(
            nn.Linear(size + proprio, 32 * w),
            nn.ELU(),
            nn.Linear(32 * w, 64 * w),
            nn.ELU(),
            nn.Unflatten(-1, (4 * w, 4, 4)),
            nn.ConvTranspose2d(4 * w, 4 * w, 4, 2, 1),
            nn.ELU(),
            nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1),
            nn.ELU(),
            nn.ConvTranspose2d(2 * w, w, 4, 2, 1),
            nn.ELU(),
            nn.ConvTranspose2d(w, 3, 4, 2, 1),
        )
        self.register_buffer("pixel_mean", torch.zeros(3, 64, 64))
        self.register_buffer("pixel_std", torch.ones(3, 64, 64))
        self.register_buffer("pixel_weight", torch.ones(3, 64, 64))
        self.register_buffer("code_mean", torch.zeros(size))
        self.register_buffer("unmix", torch.eye(size))
        self.register_buffer("mix", torch.eye(size))
        self.register_buffer("two_peaked", torch.zeros(size))  # 0: one heap of values; 2: just two values

    def measure_pixels(self, images: Tensor, following: Tensor, floor: float = 0.02) -> None:
        """Set whitening and weights from uint8 images [N, 64, 64, 3] and the frames after them; `floor` bounds constant pixels."""
        pixels = to_float(images)
        std = pixels.std(0)
        change = (to_float(following) - pixels).square().mean(0) / std.square().clamp_min(1e-6)
        weight = (std / floor).clamp_max(1) / (change + 0.02)
        weight = weight / weight[std > floor].mean()
        self.pixel_mean.copy_(pixels.mean(0))
        self.pixel_std.copy_(std.clamp_min(floor))
        self.pixel_weight.copy_(weight.clamp_max(6))

    def whiten(self, images: Tensor) -> Tensor:
        """uint8 [N, 64, 64, 3] -> whitened float [N, 3, 64, 64]."""
        return (to_float(images) - self.pixel_mean) / self.pixel_std

    def loss(self, images: Tensor, proprio: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean weighted Huber error of the whitened reconstruction from a noisy code [N, C] and proprio [N, P]."""
        target = self.whiten(images)
        code = self.encoder(torch.cat([self.see(target), proprio], -1))
        code = code + self.noise * torch.empty_like(code).normal_(generator=generator)
        error = F.smooth_l1_loss(self.decoder(torch.cat([code, proprio], -1)), target, reduction="none")
        # the code must not escape the noise by growing
        return (error * self.pixel_weight).mean() + 1e-3 * code.square().mean()

    def _raw_code(self, images: Tensor, proprio: Tensor) -> Tensor:
        return self.encoder(torch.cat([self.see(self.whiten(images)), proprio], -1))

    @torch.no_grad()
    def measure_code(self, images: Tensor, proprio: Tensor) -> None:
        """Turn the code to independent components of unit variance, from uint8 images [N, 64, 64, 3] and proprio [N, P].

        A light, a drawer or a slider then has a component of its own, told by its two peaks: most of the time it is at one of two ends.
        """
        code = self._raw_code(images, proprio).double()
        variances, axes = torch.linalg.eigh(torch.cov(code.T))
        spread = variances.clamp_min(self.noise**2).sqrt()  # what lies below the noise holds nothing and is not blown up
        sphere = axes / spread
        white = (code - code.mean(0)) @ sphere
        rotation = independent_components(white)
        components = white @ rotation
        kurtosis = components.pow(4).mean(0) / components.square().mean(0).square() - 3
        self.code_mean.copy_(code.mean(0))
        self.unmix.copy_(sphere @ rotation)
        self.mix.copy_(rotation.T @ (axes * spread).T)
        self.two_peaked.copy_((-kurtosis - 0.3).clamp_min(0))  # 0.3: a flat heap is not two

    def encode(self, images: Tensor, proprio: Tensor) -> Tensor:
        """uint8 [N, 64, 64, 3] and proprio [N, P] -> code [N, C] of independent components."""
        return (self._raw_code(images, proprio) - self.code_mean) @ self.unmix

    def decode(self, code: Tensor, proprio: Tensor) -> Tensor:
        """Code [N, C] and proprio [N, P] -> float image [N, 3, 64, 64] in [-1, 1]."""
        whitened = self.decoder(torch.cat([code @ self.mix + self.code_mean, proprio], -1))
        return whitened * self.pixel_std + self.pixel_mean


def independent_components(white: Tensor, iterations: int = 200, tolerance: float = 1e-5) -> Tensor:
    """Rotation [C, C] of whitened samples [N, C] to independent components (FastICA, Hyvarinen 1999: symmetric, log cosh)."""
    generator = torch.Generator().manual_seed(0)
    size = white.shape[1]
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=white.dtype))[0].to(white.device)
    for _ in range(iterations):
        bent = torch.tanh(white @ rotation)
        update = white.T @ bent / len(white) - rotation * (1 - bent.square()).mean(0)
        left, _, right = torch.linalg.svd(update)
        update, previous = left @ right, rotation
        rotation = update
        if (update * previous).sum(0).abs().min() > 1 - tolerance:
            break
    return rotation
