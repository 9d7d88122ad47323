"""`DiffusionPolicy.sample` for one feature as one TorchScript program: the same numbers in a third of the time, off Python's lock.

A chain of twenty steps is some seven hundred small operations, and calling each from Python takes longer than computing it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig

KEPT_SHAPES = 8


class Sampler(nn.Module):
    """`sample` as `forward`, which is what can be traced."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, feature: Tensor, noise: Tensor) -> Tensor:
        return self.policy.sample(feature, noise=noise)


def compile_sampler(policy: DiffusionPolicy) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of a feature [1, F] and the noise of `policy.draw_noise(1)`: the chunk [1, H, A], bit for bit as `policy.sample`.

    It has weights of its own. Its first calls are slow.
    """
    program = copy.deepcopy(_trace(policy.config)).to(policy.feature_mean.device)
    sampler = Sampler(policy)
    program.load_state_dict(dict(sampler.named_parameters()) | dict(sampler.named_buffers()))
    return program


def prepare_samplers(config: PolicyConfig, finetuned_steps: int) -> None:
    """Trace a shape, and that of its fine-tuned kind where a chain is long enough to have one, before somebody waits for it."""
    for steps in {config.finetuned_steps, min(finetuned_steps, config.denoising_steps)}:
        _trace(replace(config, finetuned_steps=steps))


@lru_cache(KEPT_SHAPES)
def _trace(config: PolicyConfig) -> torch.jit.ScriptModule:
    """The program of one shape. Traced once: a trace is never given back to the system, a copy of it is."""
    sampler = Sampler(DiffusionPolicy(config)).eval().requires_grad_(False)
    noise = sampler.policy.draw_noise(1, torch.Generator().manual_seed(0))
    with warnings.catch_warnings(action="ignore"):  # that the batch size is fixed; that torch.compile is newer: it needs a C++ compiler
        return torch.jit.trace(sampler, (torch.zeros(1, config.feature_size), noise), check_trace=False)
