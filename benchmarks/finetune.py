"""Speed of fine-tuning in imagination: imagined steps/s with the policy in the loop, PPO updates/s, and the parts of an iteration.

Weights of a folder of checkpoints, or random ones: speed depends on their shapes alone, so a part that is missing is filled in, and said.
On a machine that is busy otherwise look at the CPU-seconds, with one thread: threads that wait for each other count as busy.
`python benchmarks/finetune.py [--device cpu] [--threads 2] [--batch 512] [--checkpoint checkpoints | --size small|paper|lowdim]`
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from diwa_core.errors import CheckpointError
from diwa_core.finetune.ppo import DenoisingPPO, PPOConfig
from diwa_core.imagination.dream import Dream
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.policy.store import load_policy
from diwa_core.reward.classifier import ClassifierConfig, SuccessClassifier
from diwa_core.reward.store import load_classifier
from diwa_core.world_model.filter import load_world_model
from diwa_core.world_model.model import SIZES, WorldModel
from diwa_core.world_model.probe import readout
from diwa_core.world_model.rssm import State

ITERATION = PPOConfig(batch=100, chunks=18, critic_warmup=0)  # 100 dreams x 18 chunks x 4 actions = 7,200 imagined steps
STARTS = 64


class Weights:
    """World model, policy and classifier; `notes` says where each is from."""

    def __init__(self, folder: Path | None, size: str, skill: str, hidden: int, autocast: bool) -> None:
        """folder: of checkpoints; None for random weights of `size` and a policy of width `hidden`."""
        self.autocast, self.notes = autocast, []
        torch.manual_seed(0)
        self.model, identity = self._load(folder, "world_model", load_world_model)
        if self.model is None:
            self.model, folder = WorldModel(SIZES[size]).eval().requires_grad_(False), None
        self.policy, _ = self._load(folder, f"policies/{skill}", lambda path: load_policy(path, world_model_id=identity))
        if self.policy is None:
            self.policy = DiffusionPolicy(PolicyConfig(self.model.feature_size, hidden=(hidden,) * 3)).eval()
        self.classifier, _ = self._load(folder, f"classifiers/{skill}", lambda path: load_classifier(path, identity))
        if self.classifier is None:
            inputs = readout(self.model, self.model.rssm.initial(1)).shape[-1]
            self.classifier = SuccessClassifier(ClassifierConfig(inputs)).eval().requires_grad_(False)
            self.classifier.threshold.fill_(1.0)  # dreams then last as long as they may

    def _load(self, folder: Path | None, name: str, load: Callable) -> tuple[torch.nn.Module | None, str]:
        """A part of the checkpoints and its identity; None where it is missing or belongs to another world model."""
        if folder is not None:
            try:
                module, checkpoint = load(folder / name)
                self.notes.append(f"{name}: {folder}, identity {checkpoint.identity[:16]}")
                return module, checkpoint.identity
            except CheckpointError as error:
                self.notes.append(f"{name}: random weights, because {error}")
                return None, ""
        self.notes.append(f"{name}: random weights")
        return None, ""

    def learner(self, config: PPOConfig, device: str) -> DenoisingPPO:
        """A fresh fine-tuning; all dreams start where the world model knows nothing yet."""
        model, classifier = self.model.to(device), copy.deepcopy(self.classifier).to(device)
        first = model.rssm.initial(STARTS)
        starts = State(first.h.contiguous(), first.z.contiguous())
        dream = Dream([model], classifier, [starts], config.batch, config.chunks, autocast=self.autocast)
        return DenoisingPPO(self.policy.to(device), dream, config, autocast=self.autocast)


def synchronise(device: str) -> None:
    """Wait for the device's queue."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Shares:
    """Seconds spent in wrapped methods; a wrapped method that is called by another one is part of that."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self._inside = device, Counter(), False

    def wrap(self, owner: object, method: str, part: str) -> None:
        """Count the time of `owner.method` as `part`."""
        call = getattr(owner, method)

        def timed(*args, **kwargs):
            if self._inside:
                return call(*args, **kwargs)
            synchronise(self.device)
            start, self._inside = time.perf_counter(), True
            result = call(*args, **kwargs)
            synchronise(self.device)
            self.seconds[part] += time.perf_counter() - start
            self._inside = False
            return result

        setattr(owner, method, timed)


def steps_per_s(learner: DenoisingPPO, device: str, least_s: float) -> tuple[float, float]:
    """Imagined environment steps per second and per CPU-second: exploring policy and dream, nothing learned."""
    config, chunks = learner.config, 0
    horizon = learner.policy.config.horizon

    def act() -> None:
        with learner.precision():
            chain = learner.policy.sample_chain(learner.feature, learner.generator, std_floor=config.std_floor)
        learner.feature = learner.env.step(chain.actions).feature

    act()
    synchronise(device)
    start, start_cpu = time.perf_counter(), time.process_time()
    while chunks < 3 or time.perf_counter() - start < least_s:
        act()
        chunks += 1
        synchronise(device)
    steps = chunks * config.batch * horizon
    return steps / (time.perf_counter() - start), steps / (time.process_time() - start_cpu)


def time_iterations(learner: DenoisingPPO, device: str, least_s: float) -> tuple[float, Counter, float]:
    """Seconds per iteration, seconds of its parts, and the actor's updates per second of the time spent on them."""
    learner.iterate()
    shares, iterations, updates = Shares(device), 0, 0
    shares.wrap(learner.env, "_imagine", "world-model step")
    shares.wrap(learner.env.classifier, "success", "classifier")
    shares.wrap(learner.policy, "sample_chain", "policy sampling")
    shares.wrap(learner, "_fit_actor", "PPO actor")
    shares.wrap(learner, "_fit_critic", "PPO critic")

    def count(*_) -> None:
        nonlocal updates
        updates += 1

    learner.actor_optimizer.register_step_post_hook(count)
    start = time.perf_counter()
    while iterations < 1 or time.perf_counter() - start < least_s:
        learner.iterate()
        iterations += 1
        synchronise(device)
    seconds = (time.perf_counter() - start) / iterations
    parts = Counter({part: spent / iterations for part, spent in shares.seconds.items()})
    parts["the rest: values, start states, bookkeeping"] = seconds - parts.total()
    return seconds, parts, updates / shares.seconds["PPO actor"]


def measure(weights: Weights, device: str, batches: list[int], least_s: float, console: Console) -> None:
    """Tables of one device."""
    table = Table("imagined environment steps, policy sampling included", "per second", "per CPU-second", title=device)
    for batch in batches:
        learner = weights.learner(replace(ITERATION, batch=batch), device)
        table.add_row(f"{batch} dreams in parallel", *(f"{speed:,.0f}" for speed in steps_per_s(learner, device, least_s)))
    console.print(table)
    learner = weights.learner(ITERATION, device)
    seconds, parts, updates = time_iterations(learner, device, least_s)
    steps = ITERATION.batch * ITERATION.chunks * learner.policy.config.horizon
    table = Table(f"iteration of {steps:,} imagined steps", f"{seconds:.2f} s")
    for part, spent in parts.most_common():
        table.add_row(part, f"{spent / seconds:.0%}")
    table.add_row(f"PPO updates/s (of {ITERATION.minibatch} states)", f"{updates:.1f}")
    console.print(table)


def main() -> None:
    """Measure every device and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", action="append", help="repeat for several (default: cpu, and cuda if there is one)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument(
        "--batch", type=int, action="append", help="dreams in parallel; repeat for several (default: 512, on a GPU also 16384)"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints"), help="folder with world_model/, policies/ and classifiers/")
    parser.add_argument("--size", choices=tuple(SIZES), help="random weights of a named size instead")
    parser.add_argument("--hidden", type=int, default=256, help="width of a random policy (the paper: 512)")
    parser.add_argument("--autocast", action="store_true", help="dream and learn in bfloat16")
    parser.add_argument("--skill", default="open_drawer")
    parser.add_argument("--seconds", type=float, default=5.0, help="least time per measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    folder = None if options.size else options.checkpoint
    weights = Weights(folder, options.size or "small", options.skill, options.hidden, options.autocast)
    precision = "bfloat16" if options.autocast else "float32"
    console.print("\n".join(weights.notes), weights.model, f"policy {weights.policy.config.hidden}", sep="\n")
    console.print(f"{options.threads} of {os.cpu_count()} cores, load average before the start {os.getloadavg()[0]:.1f}; {precision}")
    for device in options.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        batches = options.batch or ([512] if device == "cpu" else [512, 16384])
        measure(weights, device, batches, options.seconds, console)


if __name__ == "__main__":
    main()
