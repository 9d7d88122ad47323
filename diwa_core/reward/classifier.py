"""Success classifier on latents: the reward of fine-tuning, learned from recorded episodes with success marks.

It sees the latent now and the latent at the episode's start, because success is a change: a drawer half open is a success only if it
was shut. Trained with supervised NT-Xent (Khosla et al. 2020) plus cross-entropy on filtered and on imagined latents; its threshold is
calibrated on whole episodes.
Letters: N frames, R read-out, C embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ClassifierConfig:
    """Architecture and training of a success classifier."""

    inputs: int
    hidden: int = 256
    embedding: int = 64
    temperature: float = 0.5
    contrastive_scale: float = 0.1
    updates: int = 2000
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    noise: float = 0.05  # on standardised read-outs, so that a confident answer needs more than one latent's quirk


class SuccessClassifier(nn.Module):
    """Probability that a skill has succeeded, from the read-outs now [N, R] and at the episode's start [N, R]."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Sequential(
            nn.Linear(2 * config.inputs, config.hidden), nn.SiLU(), nn.Linear(config.hidden, config.hidden), nn.SiLU(),
            nn.Linear(config.hidden, config.embedding),
        )  # fmt: skip
        self.classify = nn.Sequential(nn.Linear(config.embedding, config.hidden), nn.SiLU(), nn.Linear(config.hidden, 1))
        self.register_buffer("mean", torch.zeros(config.inputs))
        self.register_buffer("std", torch.ones(config.inputs))
        self.register_buffer("threshold", torch.tensor(0.5))

    def embedding(self, now: Tensor, start: Tensor) -> Tensor:
        """[N, C]."""
        standard = [((x - self.mean) / self.std).clamp(-8, 8) for x in (now, start)]
        if self.training:
            standard = [x + self.config.noise * torch.randn_like(x) for x in standard]
        return self.embed(torch.cat([standard[0], standard[0] - standard[1]], -1))

    def forward(self, now: Tensor, start: Tensor) -> Tensor:
        """Logits [N]."""
        return self.classify(F.silu(self.embedding(now, start))).squeeze(-1)

    @torch.no_grad()
    def success(self, now: Tensor, start: Tensor) -> Tensor:
        """Whether the skill has succeeded, bool [N], at the calibrated threshold."""
        return self(now, start).sigmoid() > self.threshold

    def loss(self, now: Tensor, start: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy plus supervised NT-Xent of a batch; label float [N]."""
        embedding = self.embedding(now, start)
        logits = self.classify(F.silu(embedding)).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logits, label)
        if self.config.contrastive_scale:
            loss = loss + self.config.contrastive_scale * contrastive_loss(embedding, label, self.config.temperature)
        return loss


def contrastive_loss(embedding: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Supervised NT-Xent: pull frames of one class together (Khosla et al. 2020, eq. 2); embedding [N, C], label [N]."""
    unit = F.normalize(embedding, dim=-1)
    similarity = unit @ unit.T / temperature
    own = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    log_share = similarity - torch.logsumexp(similarity.masked_fill(own, -torch.inf), 1, keepdim=True)
    same = (label[:, None] == label) & ~own
    per_anchor = -(log_share * same).sum(1) / same.sum(1).clamp_min(1)
    return per_anchor[same.any(1)].mean()
