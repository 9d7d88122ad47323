"""What fine-tuning beside the running robot costs it: missed ticks and latencies of the 30 Hz loop without and with it at work.

`python benchmarks/finetune_node.py [--minutes 2] [--checkpoint checkpoints] [--json FILE]`. One skill runs all the time, in real time,
the simulation rendering; the second half begins when fine-tuning computes. Latencies are as in benchmarks/runtime.py.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import rclpy
from diwa_interfaces.action import Finetune, RunSkill
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rich.console import Console
from runtime import SETTLE_S, START_LIMIT_S, Measurement, Observer, read_cpu_s, show

from diwa_core.errors import SetupError
from diwa_core.sim.demos import generate_demonstrations
from diwa_ros.demo import find_quiet_domain
from diwa_ros.graph import load_graph
from diwa_ros.up import GraphRunner

LOGS = Path("runs") / "benchmark_finetune_node"
LEARNING_LIMIT_S = 300.0  # until fine-tuning computes: it takes what the robot leaves
ENDLESS = 100_000  # steps and iterations


class Benchmark:
    """A graph with the fine-tuning node, a skill that runs on it, and what is measured meanwhile."""

    def __init__(self, checkpoint: Path, skill: str, folder: Path) -> None:
        self.checkpoint, self.skill = checkpoint, skill
        given = {"checkpoint": str(checkpoint), "runs": str(folder / "runs")}
        processes = load_graph("deploy").resolve({"checkpoint": str(checkpoint)})
        processes += [process for process in load_graph("loop").resolve(given) if process.name == "finetune"]
        os.environ.setdefault("ROS_DOMAIN_ID", str(find_quiet_domain()))
        os.environ.update({name: value for process in processes for name, value in process.extra_environment.items()})
        self.graph = GraphRunner(processes, LOGS)

    def run(self, store: Path, seconds: float) -> list[Measurement]:
        """Measure for `seconds` without, then with fine-tuning from `store`. Raises SetupError when something does not come up."""
        rclpy.init()
        try:
            with self.graph:
                self.node, self.executor = rclpy.create_node("benchmark"), SingleThreadedExecutor()
                self.executor.add_node(self.node)
                self.observer = Observer(self.node)
                self.start_skill()
                alone = self.measure("robot alone", seconds)
                goal = self.start_learning(store)
                beside = self.measure("robot and fine-tuning", seconds)
                cancelled = goal.cancel_goal_async()
                self.spin(cancelled.done, START_LIMIT_S, "the cancelling of the fine-tuning")
                return [alone, beside]
        finally:
            rclpy.try_shutdown()

    def start_skill(self) -> None:
        """Let the robot move, endlessly."""
        client = ActionClient(self.node, RunSkill, "run_skill")
        self.spin(client.server_is_ready, START_LIMIT_S, "action run_skill")
        goal = client.send_goal_async(RunSkill.Goal(skill=self.skill, max_steps=ENDLESS))
        self.spin(goal.done, START_LIMIT_S, "an answer of run_skill")
        self.spin(lambda: len(self.observer.published_ns["chunk"]) > 0, START_LIMIT_S, "an action chunk")

    def start_learning(self, store: Path) -> object:
        """Send the goal and wait until the first candidate was judged, so that learning is well under way."""
        client, judged = ActionClient(self.node, Finetune, "finetune"), []
        self.spin(client.server_is_ready, START_LIMIT_S, "action finetune")
        goal = Finetune.Goal(skill=self.skill, stores=[str(store)], iterations=ENDLESS, name="benchmark")
        sent = client.send_goal_async(goal, lambda message: judged.append(message.feedback.imagined == message.feedback.imagined))
        self.spin(sent.done, START_LIMIT_S, "an answer of finetune")
        if not sent.result().accepted:
            raise SetupError(f"finetune: the goal was refused; logs: {LOGS}")
        self.spin(lambda: any(judged), LEARNING_LIMIT_S, "a first iteration of the fine-tuning")
        return sent.result()

    def measure(self, name: str, seconds: float) -> Measurement:
        """Listen for `seconds`."""
        result = Measurement(name, f"checkpoint {self.checkpoint}", seconds)
        for length_s in (SETTLE_S, seconds):
            self.observer.clear()
            used_s, begin_s = {name: read_cpu_s(pid) for name, pid in self.graph.pids.items()}, time.monotonic()
            self.spin(lambda end_s=begin_s + length_s: time.monotonic() >= end_s, length_s + 5, "")
        for node, pid in self.graph.pids.items():
            result.cpu_percent[node] = round(100 * (read_cpu_s(pid) - used_s[node]) / (time.monotonic() - begin_s), 1)
        result.memory_mib = dict.fromkeys(result.cpu_percent, float("nan"))
        self.observer.summarise(result)
        return result

    def spin(self, until: Callable[[], bool], limit_s: float, what: str) -> None:
        """Serve the node until `until` holds."""
        end_s = time.monotonic() + limit_s
        while not until():
            if time.monotonic() > end_s or self.graph.poll():
                raise SetupError(f"benchmark: expected {what} within {limit_s:g} s, found none; logs: {LOGS}")
            self.executor.spin_once(timeout_sec=0.1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="length of each of the two measurements")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints"), help="folder with world_model/, policies/, classifiers/")
    parser.add_argument("--skill", default="open_drawer")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"{os.cpu_count()} cores, load average before the start {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="diwa_finetune_node_") as folder:
        store = Path(folder) / "demos"
        generate_demonstrations(str(store), 8, seed=3, skills=(options.skill,))
        results = Benchmark(options.checkpoint.absolute(), options.skill, Path(folder)).run(store, 60 * options.minutes)
    for result in results:
        show(result, console)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2))


if __name__ == "__main__":
    main()
