"""Diffusion policy in the latent space of the world model: schedule, denoiser, sampling, behaviour cloning, checkpoints."""

from diwa_core.policy.behaviour_cloning import BCConfig, chunk_targets, train_policy
from diwa_core.policy.diffusion import Chain, DiffusionPolicy, PolicyConfig
from diwa_core.policy.store import load_policy, save_policy

__all__ = ["BCConfig", "Chain", "DiffusionPolicy", "PolicyConfig", "chunk_targets", "load_policy", "save_policy", "train_policy"]
