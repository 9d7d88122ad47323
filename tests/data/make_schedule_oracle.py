"""Writes schedule_oracle.json: what the diffusers library (run with 0.35.2) computes for our schedule and samplers, in float64.

Run by hand, in any environment that has diffusers: `python tests/data/make_schedule_oracle.py`. The tests only read the JSON.
"""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

STEPS, SHAPE = 20, (2, 2, 3)
COMMON = {"num_train_timesteps": STEPS, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "prediction_type": "epsilon"}


def fake_noise_prediction(noisy: torch.Tensor, k: int) -> torch.Tensor:
    """Any smooth function of chunk and step that makes the clean sample leave [-1, 1] now and then."""
    return torch.tanh(0.7 * noisy + k / STEPS) * 1.5


def run(scheduler: DDPMScheduler | DDIMScheduler, noise: torch.Tensor, eta: float = 1.0) -> list:
    """States from noise to clean sample. Every step's own variance noise is replaced by ours."""
    states = [noise[0]]
    for i, k in enumerate(scheduler.timesteps.tolist()):
        if isinstance(scheduler, DDPMScheduler):
            with mock.patch.object(scheduling_ddpm, "randn_tensor", return_value=noise[i + 1]):
                state = scheduler.step(fake_noise_prediction(states[-1], k), k, states[-1]).prev_sample
        else:
            drawn = {"eta": eta, "variance_noise": noise[i + 1] if eta else None}
            state = scheduler.step(fake_noise_prediction(states[-1], k), k, states[-1], use_clipped_model_output=True, **drawn).prev_sample
        states.append(state)
    return torch.stack(states).tolist()


def main() -> None:
    """Compute and write the file."""
    torch.set_default_dtype(torch.float64)
    noise = torch.tensor(np.random.default_rng(0).normal(size=(STEPS + 1, *SHAPE)))
    ddpm = DDPMScheduler(variance_type="fixed_small", **COMMON)
    ddpm.set_timesteps(STEPS)
    result = {
        "betas": ddpm.betas.tolist(),
        "alphas_cumprod": ddpm.alphas_cumprod.tolist(),
        "noise": noise.tolist(),
        "ddpm": run(ddpm, noise),
    }
    clean, k = torch.tensor(np.random.default_rng(1).uniform(-1, 1, SHAPE)), torch.tensor([3, 17])
    result["add_noise"] = {"clean": clean.tolist(), "k": k.tolist(), "noisy": ddpm.add_noise(clean, noise[0], k).tolist()}
    for count, eta in ((5, 0.0), (10, 0.0), (20, 0.0), (5, 0.6), (10, 1.0)):
        ddim = DDIMScheduler(timestep_spacing="trailing", **COMMON)
        ddim.set_timesteps(count)
        result[f"ddim_{count}_{eta}"] = {"timesteps": ddim.timesteps.tolist(), "states": run(ddim, noise, eta=eta)}
    Path(__file__).with_name("schedule_oracle.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
