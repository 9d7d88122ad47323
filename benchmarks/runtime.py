"""The running graph in real time on this machine: latency from camera stamp to chunk and command, missed ticks, CPU per node.

`python benchmarks/runtime.py [--minutes 5] [--size small --size paper] [--checkpoint FOLDER] [--json FILE]`. Latencies are publication time
at the sender minus camera stamp, so this observer adds nothing to them; every node runs as in `diwa up deploy`, the simulation rendering.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import rclpy
import torch
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ActionChunk, ExecutedAction, LatentState, RobotCommand, SimState
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rich.console import Console
from rich.table import Table

from diwa_core.contract import Contract
from diwa_core.errors import SetupError
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.policy.store import save_policy
from diwa_core.world_model.filter import save_world_model
from diwa_core.world_model.model import SIZES, WorldModel
from diwa_ros.graph import load_graph
from diwa_ros.messages import reliable, to_ns
from diwa_ros.up import GraphRunner

SETTLE_S = 3.0  # after the first command; start-up is not what is measured
START_LIMIT_S = 60.0
STAGES = {
    "latent": "camera stamp -> latent",
    "chunk": "camera stamp -> action chunk",
    "command": "camera stamp -> command, frames with a new chunk",
    "any_command": "camera stamp -> command, all frames",
    "executed": "camera stamp -> executed action reported",
}


@dataclass
class Measurement:
    """One size: percentiles are [p50, p95, p99, max] in milliseconds, CPU is per cent of one core."""

    size: str
    weights: str
    seconds: float
    ticks: int = 0
    missed_ticks: int = 0
    overslept_ticks: int = 0
    latency_ms: dict[str, list[float]] = field(default_factory=dict)
    cpu_percent: dict[str, float] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)


class Observer:
    """Listens to the graph and keeps the publication time of every message by camera stamp."""

    def __init__(self, node: Node) -> None:
        self.published_ns: dict[str, dict[int, int]] = {stage: {} for stage in ("latent", "chunk", "command", "executed")}
        self.states: list[SimState] = []
        self.step_ns = round(1e9 / Contract().rate_hz)
        for stage, message_type, topic in (
            ("latent", LatentState, "latent"),
            ("chunk", ActionChunk, "action_chunk"),
            ("command", RobotCommand, "sim/command"),
            ("executed", ExecutedAction, "executed_action"),
        ):
            node.create_subscription(message_type, topic, self.make_callback(stage), reliable(50))
        node.create_subscription(SimState, "sim/state", self.states.append, reliable(50))

    def make_callback(self, stage: str) -> callable:
        """A callback with the middleware's time of publication."""

        def take(message: object, info: dict) -> None:
            if stage != "chunk" or (message.horizon and not message.hold):
                self.published_ns[stage].setdefault(to_ns(message.header.stamp), info["source_timestamp"])

        return take

    def clear(self) -> None:
        """Forget the start."""
        for times in self.published_ns.values():
            times.clear()
        del self.states[:-1]

    def summarise(self, measurement: Measurement) -> None:
        """Fill in latencies and ticks."""
        stamps = np.array([to_ns(state.header.stamp) for state in self.states])
        measurement.ticks = len(stamps) - 1
        measurement.missed_ticks = self.states[-1].missed_ticks - self.states[0].missed_ticks
        measurement.overslept_ticks = int((np.diff(stamps) > 1.5 * self.step_ns).sum())
        chunk_stamps = self.published_ns["chunk"]
        for stage in STAGES:
            source = self.published_ns["command" if stage == "any_command" else stage]
            chosen = {s: t for s, t in source.items() if stage != "command" or s in chunk_stamps}
            ages_ms = [(time_ns - stamp_ns) / 1e6 for stamp_ns, time_ns in chosen.items()]
            if ages_ms:
                measurement.latency_ms[stage] = [round(float(v), 2) for v in (*np.percentile(ages_ms, (50, 95, 99)), max(ages_ms))]


def make_random_checkpoint(size: str, folder: Path) -> Path:
    """A world model and a policy of the right shapes with random weights: speed does not depend on what they learned."""
    torch.manual_seed(0)
    model, contract = WorldModel(SIZES[size]), Contract()
    identity = save_world_model(folder / "world_model", model, contract, {})
    policy = DiffusionPolicy(PolicyConfig(feature_size=model.feature_size))
    save_policy(folder / "policies" / "open_drawer", policy, contract, "open_drawer", identity, {})
    return folder


def read_cpu_s(pid: int) -> float:
    """CPU seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_memory_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(size: str, weights: str, checkpoint: Path, seconds: float, log_folder: Path, **arguments: object) -> Measurement:
    """Bring the graph up, run one endless skill, and listen. Raises SetupError when the graph does not come up."""
    processes = load_graph("deploy").resolve({"checkpoint": str(checkpoint), **arguments})
    measurement = Measurement(size, weights, seconds)
    os.environ.update({name: value for process in processes for name, value in process.extra_environment.items()})
    rclpy.init()
    try:
        with GraphRunner(processes, log_folder) as graph:
            node, executor = rclpy.create_node("benchmark"), SingleThreadedExecutor()
            executor.add_node(node)
            observer = Observer(node)
            client = ActionClient(node, RunSkill, "run_skill")

            def spin(until: callable, limit_s: float) -> None:
                end_s = time.monotonic() + limit_s
                while not until():
                    if time.monotonic() > end_s or graph.poll():
                        raise SetupError(f"the graph did not come up within {limit_s:g} s; logs: {log_folder}")
                    executor.spin_once(timeout_sec=0.1)

            spin(client.server_is_ready, START_LIMIT_S)
            skill = next(path.name for path in sorted((checkpoint / "policies").iterdir()))
            goal = client.send_goal_async(RunSkill.Goal(skill=skill, max_steps=100_000))
            spin(goal.done, START_LIMIT_S)
            ended = goal.result().get_result_async()
            spin(lambda: len(observer.published_ns["chunk"]) > 0, START_LIMIT_S)
            for length_s in (SETTLE_S, seconds):
                observer.clear()
                used_s = {name: read_cpu_s(pid) for name, pid in graph.pids.items()}
                begin_s = time.monotonic()
                spin(lambda end_s=begin_s + length_s: time.monotonic() >= end_s, length_s + 5)
            if ended.done():
                raise SetupError(f"the run ended before the measurement did: {ended.result().result.message}; logs: {log_folder}")
            for name, pid in graph.pids.items():
                measurement.cpu_percent[name] = round(100 * (read_cpu_s(pid) - used_s[name]) / (time.monotonic() - begin_s), 1)
                measurement.memory_mib[name] = round(read_memory_mib(pid))
            observer.summarise(measurement)
    finally:
        rclpy.try_shutdown()
    return measurement


def show(measurement: Measurement, console: Console) -> None:
    """Two small tables."""
    console.print(f"\n[bold]{measurement.size}[/] ({measurement.weights}), {measurement.seconds:g} s in real time at 30 Hz:")
    console.print(f"{measurement.ticks} ticks, {measurement.missed_ticks} missed, {measurement.overslept_ticks} overslept")
    table = Table("milliseconds", "p50", "p95", "p99", "max")
    for stage, values in measurement.latency_ms.items():
        table.add_row(STAGES[stage], *(f"{value:.1f}" for value in values))
    console.print(table)
    table = Table("node", "CPU, % of one core", "memory, MiB")
    for name, percent in measurement.cpu_percent.items():
        table.add_row(name, f"{percent:.0f}", f"{measurement.memory_mib[name]:.0f}")
    table.add_row("together", f"{sum(measurement.cpu_percent.values()):.0f}", f"{sum(measurement.memory_mib.values()):.0f}")
    console.print(table)


def main() -> None:
    """Measure each size and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="length of each measurement")
    parser.add_argument("--size", action="append", choices=("small", "paper"), help="world model; repeat for several (default: both)")
    parser.add_argument("--checkpoint", type=Path, help="folder with world_model/ and policies/ to use instead of random weights")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    console = Console(width=110)
    load = os.getloadavg()[0]
    console.print(f"{os.cpu_count()} cores, load average before the start {load:.1f}")
    results = []
    with tempfile.TemporaryDirectory(prefix="diwa_runtime_") as folder:
        for size in options.size or ("small", "paper"):
            weights = f"checkpoint {options.checkpoint}" if options.checkpoint else "random weights"
            checkpoint = options.checkpoint or make_random_checkpoint(size, Path(folder) / size)
            results.append(measure(size, weights, checkpoint, options.minutes * 60, Path("runs") / "benchmark_runtime" / size))
            show(results[-1], console)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2))


if __name__ == "__main__":
    main()
