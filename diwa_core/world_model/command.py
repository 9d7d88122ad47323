"""What is known exactly about the proprioception: how an action moves the commanded pose, and that the arm follows it.

The commanded (target) pose integrates actions on a leash to the measured one; a model need not learn that, and must not drift from it.
The measured pose is expressed as its lag behind the command: bounded, small, and drawn back to zero by the robot's own controller.
Letters: P proprio (27 entries as in contract.proprio_vector, maybe scene entries behind).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TCP, TCP_ROTATION, TARGET, TARGET_ROTATION = slice(0, 3), slice(3, 9), slice(18, 21), slice(21, 27)
COMMANDED, LAG = slice(18, 27), slice(0, 9)


def to_lag(low: Tensor) -> Tensor:
    """Replace the measured pose by its difference to the commanded one; [.., P] in physical units."""
    return torch.cat([low[..., TCP] - low[..., TARGET], low[..., TCP_ROTATION] - low[..., TARGET_ROTATION], low[..., 9:]], -1)


def from_lag(low: Tensor) -> Tensor:
    """Undo `to_lag`."""
    return torch.cat([low[..., TCP] + low[..., TARGET], low[..., TCP_ROTATION] + low[..., TARGET_ROTATION], low[..., 9:]], -1)


def rotate(rotation: Tensor, change: Tensor) -> Tensor:
    """Add euler angles `change` [.., 3] (rad, R = Rz Ry Rx) to a rotation given as rot6d [.., 6]; the contract's action semantics."""
    first, second = rotation[..., :3], rotation[..., 3:]
    third_z = first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]
    roll = torch.atan2(second[..., 2], third_z) + change[..., 0]
    pitch = torch.asin((-first[..., 2]).clamp(-1, 1)) + change[..., 1]
    yaw = torch.atan2(first[..., 1], first[..., 0]) + change[..., 2]
    sx, cx, sy, cy, sz, cz = (f(angle) for angle in (roll, pitch, yaw) for f in (torch.sin, torch.cos))
    columns = [cy * cz, cy * sz, -sy, sx * sy * cz - cx * sz, sx * sy * sz + cx * cz, sx * cy]
    return torch.stack(columns, -1)


class CommandedPose(nn.Module):
    """The commanded pose after an action, in the standardised units of the latent; statistics are the world model's."""

    def __init__(self, max_delta_m: float, max_delta_rad: float, leash_m: float, low_size: int) -> None:
        super().__init__()
        self.max_delta_m, self.max_delta_rad, self.leash_m = max_delta_m, max_delta_rad, leash_m
        self.register_buffer("mean", torch.zeros(low_size))
        self.register_buffer("std", torch.ones(low_size))

    def measure(self, low: Tensor) -> None:
        """Set the statistics from proprio with lag [N, P]."""
        self.mean.copy_(low.mean(0))
        self.std.copy_(low.std(0).clamp_min(1e-3))

    def standardise(self, low: Tensor) -> Tensor:
        """Proprio with lag [.., P] in units of its deviation on the play."""
        return (low - self.mean) / self.std

    def restore(self, standard: Tensor) -> Tensor:
        """Undo `standardise`."""
        return standard * self.std + self.mean

    def forward(self, standard: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised proprio with lag [.., P] and action [.., A] -> standardised commanded pose [.., 9], and the lag [.., 9] that an arm
        which does not move would then have."""
        low = self.restore(standard)
        target, lag = low[..., TARGET], low[..., TCP]
        lead = action[..., :3] * self.max_delta_m - lag  # of the new target before the measured position
        lead = lead * (self.leash_m / lead.norm(dim=-1, keepdim=True).clamp_min(1e-6)).clamp_max(1)
        rotation = rotate(low[..., TARGET_ROTATION], action[..., 3:6] * self.max_delta_rad)
        moved = torch.cat([target + lag + lead, rotation], -1)
        held = low[..., COMMANDED] + low[..., LAG] - moved
        return (moved - self.mean[COMMANDED]) / self.std[COMMANDED], (held - self.mean[LAG]) / self.std[LAG]

    def close(self, lag: Tensor, share: Tensor) -> Tensor:
        """Standardised lag [.., 9] once the arm has gone `share` [.., 9] of the way to the commanded pose."""
        arrived = -self.mean[LAG] / self.std[LAG]
        return lag + share * (arrived - lag)
