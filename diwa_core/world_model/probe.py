"""A small read-out from latents to the simulator's joints and lights: it measures a world model, it never trains one.

Letters: N samples, S scene entries (slider, drawer, button, switch, bulb, LED).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diwa_core.data.sequences import SequenceIndex, WindowSampler
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.rssm import State

SCENE = ("slider", "drawer", "button", "switch", "bulb", "led")
JOINTS, LIGHTS = [0, 1, 2, 3], [4, 5]


def readout(model: WorldModel, state: State) -> Tensor:
    """What the probe sees of a state [.., R]: the decoded embedding of residual models, the whole feature of others."""
    return state.z if model.config.latent == "residual" else state.feature


class SceneProbe(nn.Module):
    """MLP from a read-out to joints (metres) and light probabilities."""

    def __init__(self, inputs: int, hidden: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, len(SCENE)))
        for name in ("input_mean", "input_std"):
            self.register_buffer(name, torch.zeros(inputs))
        self.register_buffer("joint_mean", torch.zeros(len(JOINTS)))
        self.register_buffer("joint_std", torch.ones(len(JOINTS)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Standardised joints and light logits [.., S]."""
        return self.net((inputs - self.input_mean) / self.input_std)

    @torch.no_grad()
    def scene(self, inputs: Tensor) -> np.ndarray:
        """Joints in metres and light probabilities, numpy [.., S]."""
        out = self(inputs.float())
        joints = out[..., JOINTS] * self.joint_std + self.joint_mean
        return torch.cat([joints, out[..., LIGHTS].sigmoid()], -1).cpu().numpy()


@torch.no_grad()
def filter_windows(model: WorldModel, data, index: SequenceIndex, chunk: int = 256) -> State:
    """States [B, T, ..] of windows of play, filtered where observed and open loop elsewhere."""
    parts = []
    for start in range(0, len(index.frames), chunk):
        part = SequenceIndex(*(getattr(index, name)[start : start + chunk] for name in ("frames", "first", "observed")))
        batch = data.batch(part, model.device)
        embeddings = batch.get("embeddings")
        if embeddings is None:
            flat = {view: image.flatten(0, 1) for view, image in batch["images"].items()}
            embeddings = model.embed(batch["low"].flatten(0, 1), flat).unflatten(0, batch["low"].shape[:2])
        generator = torch.Generator(model.device).manual_seed(start)
        initial = model.rssm.initial(len(part.frames))
        parts.append(model.rssm.unroll(initial, batch["actions"], embeddings, batch["first"], batch["observed"], generator)[0])
    return State(torch.cat([p.h for p in parts]), torch.cat([p.z for p in parts]))


def train_probe(
    model: WorldModel, data, scene_obs: np.ndarray, seed: int = 0, windows: int = 2500, length: int = 40, steps: int = 3000
) -> SceneProbe:
    """Fit a probe on filtered latents of training play; scene_obs [frames, 24] are the labels."""
    index = WindowSampler(data.episodes, windows, length, (length, length), seed).sample(0)
    states = filter_windows(model, data, index)
    inputs = readout(model, states)[:, 4:].flatten(0, 1)
    labels = torch.from_numpy(scene_obs[index.frames[:, 4:].reshape(-1), : len(SCENE)].astype(np.float32)).to(inputs.device)
    torch.manual_seed(seed)
    probe = SceneProbe(inputs.shape[-1]).to(inputs.device)
    probe.input_mean.copy_(inputs.mean(0))
    probe.input_std.copy_(inputs.std(0).clamp_min(1e-3))
    probe.joint_mean.copy_(labels[:, JOINTS].mean(0))
    probe.joint_std.copy_(labels[:, JOINTS].std(0).clamp_min(1e-3))
    optimizer = torch.optim.AdamW(probe.parameters(), 1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randint(len(inputs), (512,), generator=generator).to(inputs.device)
        out, target = probe(inputs[pick]), labels[pick]
        joints = F.smooth_l1_loss(out[:, JOINTS], (target[:, JOINTS] - probe.joint_mean) / probe.joint_std, beta=0.1)
        lights = F.binary_cross_entropy_with_logits(out[:, LIGHTS], target[:, LIGHTS])
        optimizer.zero_grad(set_to_none=True)
        (joints + lights).backward()
        optimizer.step()
        schedule.step()
    return probe.eval().requires_grad_(False)
