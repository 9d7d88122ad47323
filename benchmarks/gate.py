"""What the safety gate costs per control tick: `python benchmarks/gate.py [--ticks 20000] [--json FILE]`; the goal is 0.2 ms at p99.

Every tick gets a new chunk, a target that jumps about and, where named, joints: more than a running graph asks of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from diwa_core.contract import Contract
from diwa_core.control.limits import load_limits
from diwa_core.control.motion import ActionLimiter, MotionFilter
from diwa_ros.gate import Chunk, ChunkGate

GOAL_MS = 0.2
JOINTS = np.array([0.0, 0.2, 0.0, -2.2, 0.0, 2.4, 0.8])
CENTRE = np.array([0.5, 0.0, 0.3, 0, 0, 0])


def make_chunk_gate(rng: np.random.Generator) -> Callable[[int], object]:
    """Accept a chunk, pick the action of the tick and limit it: a robot that is driven by actions."""
    contract = Contract()
    step_ns = round(1e9 / contract.rate_hz)
    gate, limiter = ChunkGate(contract.identity, step_ns), ActionLimiter(load_limits("fr3", contract), contract)
    actions = rng.uniform(-1.5, 1.5, (256, 4, 7)).astype(np.float32)

    def tick(index: int) -> object:
        now_ns = index * step_ns
        gate.accept(Chunk(now_ns, step_ns, actions[index % 256], False, "p", contract.identity), now_ns)
        return limiter.limit(gate.command_at(now_ns).action)

    return tick


def make_motion_filter(rng: np.random.Generator, measured: bool, joints: bool) -> Callable[[int], object]:
    """Follow a target that jumps about, passing it at some rate: an arm at 100 Hz."""
    motion = MotionFilter(load_limits("fr3", Contract()), 0.01)
    motion.reset(CENTRE)
    targets, rates = CENTRE + rng.uniform(-0.3, 0.3, (256, 6)), rng.uniform(-0.3, 0.3, (256, 6))

    def tick(index: int) -> object:
        where = motion.coordinates if measured else None
        return motion.follow(targets[index // 5 % 256], rates[index // 5 % 256], where, JOINTS if joints else None)

    return tick


def measure(tick: Callable[[int], object], count: int) -> dict[str, list[float]]:
    """p50, p99 and maximum in milliseconds of `count` ticks, after a warm-up: by the clock, and of this process alone."""
    for index in range(200):
        tick(index)
    gc.collect()
    gc.freeze()
    wall_ns, cpu_ns = np.empty(count), np.empty(count)
    for index in range(count):
        begin_ns, begin_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        tick(200 + index)
        cpu_ns[index] = time.thread_time_ns() - begin_cpu_ns
        wall_ns[index] = time.perf_counter_ns() - begin_ns
    spent = {"clock": wall_ns, "process": cpu_ns}
    return {name: [float(value) / 1e6 for value in (*np.percentile(ns, (50, 99)), ns.max())] for name, ns in spent.items()}


def main() -> None:
    """Measure, print the table, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ticks", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    parts = {
        "actions: chunk, splice, fr3 limits": make_chunk_gate(rng),
        "poses: workspace, speed, acceleration, jerk": make_motion_filter(rng, measured=False, joints=False),
        "poses: with leash and joint margins": make_motion_filter(rng, measured=True, joints=True),
    }
    results = {name: measure(tick, args.ticks) for name, tick in parts.items()}
    table = Table("gate", "by the", "p50 ms", "p99 ms", "max ms", f"p99 <= {GOAL_MS} ms")
    for name, spent in results.items():
        for by, (p50, p99, worst) in spent.items():
            table.add_row(name, by, f"{p50:.3f}", f"{p99:.3f}", f"{worst:.3f}", "yes" if p99 <= GOAL_MS else "no")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
