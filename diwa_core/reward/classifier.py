"""Success classifier on latents: the reward of fine-tuning, learned from recorded episodes with success labels.

It sees the latent now and the latent at the episode's start, because success is a change: a drawer half open is a success only if it
was shut. Trained with supervised NT-Xent (Khosla et al. 2020) plus cross-entropy on filtered and on imagined latents; its probabilities
and its threshold are calibrated on whole episodes.
Letters: N frames, B episodes, T time, R read-out, C embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diwa_core.errors import ConfigError


@dataclass(frozen=True)
class ClassifierConfig:
    """Architecture and training of a success classifier.

    consistency: which imagined frames are taught with the label of what really happened. A dream may be late, or fail where reality
    succeeded; taught blindly, the classifier learns to reward it for the arm's movement alone. A teacher trained on filtered frames
    judges every dream: `positives` drops real successes that the dream does not show, `both` also drops dreamt successes that did not
    really happen, `off` drops nothing, `filtered` teaches no imagined frame at all.
    margin: frames up to this share beyond success are not taught: a policy that is paid at the line stops there, on either side of it.
    """

    inputs: int
    arm_inputs: int = 0  # the first entries of a read-out that tell of the arm and not of the scene
    arm_dropout: float = 0.5  # share of training frames in which they come from another frame: the scene decides, not the arm's pose
    hidden: int = 256
    embedding: int = 64
    temperature: float = 0.5
    contrastive_scale: float = 0.1
    updates: int = 1200
    teacher_updates: int = 400
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    noise: float = 0.05  # on standardised read-outs, so that a confident answer needs more than one latent's quirk
    consistency: str = "positives"
    settle_frames: int = 3  # imagined frames left out on both sides of a change of the label: a dream may be that late or early
    margin: float = 0.15
    imagined_frames: int = 72  # of a window that are taught; later ones are vaguer

    def __post_init__(self) -> None:
        if self.consistency not in (choices := ("positives", "both", "off", "filtered")):
            raise ConfigError(f"classifier 'consistency': expected one of {', '.join(choices)}; found '{self.consistency}'.")


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
        self.register_buffer("scale", torch.tensor(1.0))  # of the logit, and what is added to it: set by calibration
        self.register_buffer("shift", torch.tensor(0.0))
        self.register_buffer("threshold", torch.tensor(0.5))  # of the reward in dreams, which show half a success where they are unsure
        self.register_buffer("filtered_threshold", torch.tensor(0.5))  # of what was really seen

    def embedding(self, now: Tensor, start: Tensor) -> Tensor:
        """[N, C]."""
        standard = [((x - self.mean) / self.std).clamp(-8, 8) for x in (now, start)]
        if self.training:
            standard = [x + self.config.noise * torch.randn_like(x) for x in standard]
        return self.embed(torch.cat([standard[0], standard[0] - standard[1]], -1))

    def forward(self, now: Tensor, start: Tensor) -> Tensor:
        """Calibrated logits [N]."""
        return self.scale * self.classify(F.silu(self.embedding(now, start))).squeeze(-1) + self.shift

    @torch.no_grad()
    def success(self, now: Tensor, start: Tensor) -> Tensor:
        """Whether the skill has succeeded, bool [N], at the threshold calibrated for dreams."""
        return self(now, start).sigmoid() > self.threshold

    @torch.no_grad()
    def judge(self, now: Tensor, start: Tensor) -> Tensor:
        """Calibrated logits [B, T] of whole episodes now [B, T, R] that begin at start [B, R]."""
        parts = zip(now.split(64), start[:, None].expand_as(now).split(64), strict=True)
        return torch.cat([self(n, s) for n, s in parts])

    def loss(self, now: Tensor, start: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy plus supervised NT-Xent of a batch; label float [N]."""
        embedding = self.embedding(self._swap_arms(now), start)
        logits = self.classify(F.silu(embedding)).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logits, label)
        if self.config.contrastive_scale:
            loss = loss + self.config.contrastive_scale * contrastive_loss(embedding, label, self.config.temperature)
        return loss

    def _swap_arms(self, now: Tensor) -> Tensor:
        """Read-outs of which a share shows the arm of another frame of the batch."""
        arm = self.config.arm_inputs
        swapped = torch.rand(len(now), 1, device=now.device) < self.config.arm_dropout
        other = now[torch.randperm(len(now), device=now.device), :arm]
        return torch.cat([torch.where(swapped, other, now[:, :arm]), now[:, arm:]], -1)


def contrastive_loss(embedding: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Supervised NT-Xent: pull frames of one class together (Khosla et al. 2020, eq. 2); embedding [N, C], label [N]."""
    unit = F.normalize(embedding, dim=-1)
    similarity = unit @ unit.T / temperature
    own = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    log_share = similarity - torch.logsumexp(similarity.masked_fill(own, -torch.inf), 1, keepdim=True)
    same = (label[:, None] == label) & ~own
    per_anchor = -(log_share * same).sum(1) / same.sum(1).clamp_min(1)
    return per_anchor[same.any(1)].mean()
