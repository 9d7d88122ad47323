"""Training frames/s and imagined steps/s of the named world-model sizes, beside what the machine's arithmetic would allow.

The bound is the model's matrix work divided by the speed of a large matrix product of the same precision, measured in the same run.
`python benchmarks/world_model.py [--device cuda] [--threads 1] [--sizes small paper]`
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from diwa_core.world_model.model import SIZES, WorldModel

SEQUENCE = {"small": (64, 56), "lowdim": (64, 56), "paper": (4, 50)}  # batch, frames; the paper's 50 x 50 does not fit a short CPU run


def synchronise(device: str) -> None:
    """Wait for the device's queue."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_call(function, device: str, least_s: float = 4.0) -> float:
    """Mean seconds per call, after one warm-up call."""
    function()
    synchronise(device)
    calls, start = 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - start < least_s:
        function()
        calls += 1
        synchronise(device)
    return (time.perf_counter() - start) / calls


def matrix_flops_per_s(device: str, dtype: torch.dtype) -> float:
    """Speed of a 1024 x 1024 x 1024 product (8192 on a GPU)."""
    n = 8192 if device.startswith("cuda") else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / time_call(lambda: a @ a, device, 1.0)


def make_batch(model: WorldModel, batch: int, frames: int, device: str) -> dict:
    """Random data of the shapes training uses."""
    result = {
        "actions": torch.rand(batch, frames, 7, device=device),
        "first": torch.zeros(batch, frames, dtype=torch.bool, device=device),
        "observed": torch.arange(frames, device=device).expand(batch, frames) < (16 if model.config.frozen_embedding else frames),
    }
    result["first"][:, 0] = True
    if model.config.frozen_embedding:
        result["embeddings"] = torch.randn(batch, frames, model.embedding_size, device=device)
    else:
        result["low"] = torch.randn(batch, frames, 27, device=device)
        size = (batch, frames, 64, 64, 3)
        result["images"] = {view: torch.randint(0, 255, size, dtype=torch.uint8, device=device) for view in model.config.views}
    return result


def measure(size: str, device: str, autocast: bool) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    model = WorldModel(SIZES[size]).to(device)
    batch, frames = SEQUENCE[size]
    data = make_batch(model, batch, frames, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def train() -> None:
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=autocast):
            loss, _, _ = model.loss(data, model.rssm.initial(batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    dreams = 512 if device == "cpu" else 8192
    with torch.no_grad():
        state, action = model.rssm.initial(dreams).detach(), torch.rand(dreams, 7, device=device)
        imagine_s = time_call(lambda: model.rssm.imagine(state, action), device)
    with FlopCounterMode(display=False) as counter:
        model.rssm.imagine(state, action)
    imagine_flops = counter.get_total_flops()
    train_s = time_call(train, device)
    with FlopCounterMode(display=False) as counter:
        train()
    speed = matrix_flops_per_s(device, torch.bfloat16 if autocast else torch.float32)
    f32 = matrix_flops_per_s(device, torch.float32)
    return (
        f"{size:7s} training {batch * frames / train_s:8.0f} frames/s (bound {batch * frames * speed / counter.get_total_flops():8.0f}); "
        f"imagined {dreams / imagine_s:9.0f} steps/s at {dreams} dreams (bound {dreams * f32 / imagine_flops:9.0f})"
    )


def main() -> None:
    """Print one line per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--no-autocast", action="store_true", help="train in float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    precision = "float32" if args.no_autocast else "bfloat16"
    print(f"device {args.device}, {args.threads} threads, training in {precision}, imagining in float32")
    for size in args.sizes:
        print(measure(size, args.device, not args.no_autocast))


if __name__ == "__main__":
    main()
