"""Hot swaps in a row on the running graph in real time: missed ticks, action steps at the border and within chunks, memory.

`python benchmarks/swap.py [--swaps 1000] [--checkpoint FOLDER] [--json FILE]`. Base and fine-tuned policy of a skill take turns in one run;
every swap passes all gates and is awaited until it has taken over. The same graph without swaps is measured first, because a busy
machine misses ticks too. Action steps are those of `executed_action`: what the arm really did, after the controller's gate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import rclpy
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ExecutedAction, LatentState, SimState, SwapEvent
from rclpy.action import ActionClient
from rich.console import Console
from rich.table import Table
from runtime import SETTLE_S, read_memory_mib

from diwa_core.contract import Contract
from diwa_core.errors import DiwaError, SetupError
from diwa_ros.graph import load_graph
from diwa_ros.messages import reliable, to_ns
from diwa_ros.swap_client import SwapClient
from diwa_ros.up import GraphRunner

SKILL = "open_drawer"
START_LIMIT_S = 120.0
SETTLE_SWAPS = 20  # allocations of the first swaps are not growth
MAX_STEPS = 100_000


@dataclass
class Phase:
    """What was seen over some ticks. Steps: largest change of a motion component from one executed action to the next."""

    ticks: int = 0
    missed_ticks: int = 0
    overslept_ticks: int = 0
    largest_step: dict[str, float] = field(default_factory=dict)
    steps_p99: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Result:
    """Both phases and what only swaps have. Memory in MiB of the policy process, after the first SETTLE_SWAPS."""

    swaps: int
    refused: int
    rolled_back: int
    without_swaps: Phase
    with_swaps: Phase
    swap_s: list[float]
    memory_mib: list[float]

    @property
    def growth_mib(self) -> float:
        """Of the memory from the first to the last tenth of the swaps."""
        tenth = max(1, len(self.memory_mib) // 10)
        return float(np.mean(self.memory_mib[-tenth:]) - np.mean(self.memory_mib[:tenth]))


class Observer:
    """Keeps what the graph publishes while the client waits for its answers."""

    def __init__(self, client: SwapClient) -> None:
        self.states: list[tuple[int, int]] = []  # stamp and missed ticks
        self.executed: list[ExecutedAction] = []
        self.has_latent = False
        self.step_ns = round(1e9 / Contract().rate_hz)
        client.node.create_subscription(SimState, "sim/state", self.take_state, reliable(100))
        client.node.create_subscription(ExecutedAction, "executed_action", self.executed.append, reliable(100))
        client.node.create_subscription(LatentState, "latent", lambda _: setattr(self, "has_latent", True), reliable(1))

    def take_state(self, message: SimState) -> None:
        """Stamp and count are enough."""
        self.states.append((to_ns(message.header.stamp), message.missed_ticks))

    def take_phase(self) -> Phase:
        """Summarise what came since the last call."""
        states, executed = np.array(self.states), self.executed[:]
        del self.states[:-1], self.executed[:-1]
        overslept = int((np.diff(states[:, 0]) > 1.5 * self.step_ns).sum())
        phase = Phase(len(states) - 1, int(states[-1, 1] - states[0, 1]), overslept)
        steps: dict[str, list[float]] = {"within a chunk": [], "border of one policy": [], "border of a swap": []}
        for before, after in itertools.pairwise(executed):
            if before.source == after.source == ExecutedAction.SOURCE_POLICY:
                size = np.abs(np.array(after.action[:6]) - np.array(before.action[:6])).max()
                steps[self.name_pair(before, after)].append(float(size))
        for name, sizes in steps.items():
            if sizes:
                phase.counts[name] = len(sizes)
                phase.largest_step[name], phase.steps_p99[name] = max(sizes), float(np.percentile(sizes, 99))
        return phase

    @staticmethod
    def name_pair(before: ExecutedAction, after: ExecutedAction) -> str:
        """Where in the stream of chunks a step lies."""
        if before.checkpoint_id != after.checkpoint_id:
            return "border of a swap"
        return "within a chunk" if before.observation_stamp == after.observation_stamp else "border of one policy"


def find_pair(checkpoint: Path) -> list[Path]:
    """Base and fine-tuned policy of SKILL. Raises SetupError when one is missing."""
    pair = [checkpoint / kind / SKILL for kind in ("policies", "finetuned")]
    for path in pair:
        if not path.exists():
            raise SetupError(
                f"expected a policy at {path}, found none. Give --checkpoint a folder with world_model/, policies/, finetuned/."
            )
    return pair


def measure(swaps: int, baseline_s: float, checkpoint: Path, log_folder: Path) -> Result:
    """Bring the graph up, run one endless skill, then swap. Raises SetupError when the graph does not come up or ends."""
    pair = find_pair(checkpoint)
    processes = load_graph("deploy").resolve({"checkpoint": str(checkpoint), "skill": SKILL})
    os.environ.update({name: value for process in processes for name, value in process.extra_environment.items()})
    rclpy.init()
    try:
        with GraphRunner(processes, log_folder) as graph, SwapClient() as client:
            observer = Observer(client)
            action_client = ActionClient(client.node, RunSkill, "run_skill")

            def spin(until: Callable[[], bool], limit_s: float) -> None:
                end_s = time.monotonic() + limit_s
                while not until():
                    if time.monotonic() > end_s or graph.poll():
                        raise SetupError(f"the graph did not do what was expected within {limit_s:g} s; logs: {log_folder}")
                    client.executor.spin_once(timeout_sec=0.1)

            spin(lambda: action_client.server_is_ready() and observer.has_latent, START_LIMIT_S)
            goal = action_client.send_goal_async(RunSkill.Goal(skill=SKILL, max_steps=MAX_STEPS))
            spin(lambda: goal.done() and any(e.source == ExecutedAction.SOURCE_POLICY for e in observer.executed), START_LIMIT_S)
            settled_s = time.monotonic() + SETTLE_S
            spin(lambda: time.monotonic() > settled_s, SETTLE_S + 5)
            observer.take_phase()
            ended = goal.result().get_result_async()
            begin_s = time.monotonic()
            spin(lambda: time.monotonic() - begin_s > baseline_s, baseline_s + 5)
            result = Result(swaps, 0, 0, observer.take_phase(), Phase(), [], [])
            swap_in_turns(client, pair, result, lambda: read_memory_mib(graph.pids["policy"]))
            result.with_swaps = observer.take_phase()
            if ended.done():
                raise SetupError(f"the run ended before the swaps did: {ended.result().result.message}; logs: {log_folder}")
            result.rolled_back = sum(event.event == SwapEvent.ROLLED_BACK for event in client.read_history())
            action_client.destroy()
    finally:
        rclpy.try_shutdown()
    return result


def swap_in_turns(client: SwapClient, pair: list[Path], result: Result, read_memory: Callable[[], float]) -> None:
    """The swaps; a refusal is counted and printed."""
    for number in range(result.swaps):
        begin_s = time.monotonic()
        try:
            client.load(pair[(number + 1) % 2], SKILL, max_difference=2.0)
        except DiwaError as error:
            result.refused += 1
            print(f"swap {number}: {error}", flush=True)
        result.swap_s.append(time.monotonic() - begin_s)
        if number >= SETTLE_SWAPS or result.swaps <= SETTLE_SWAPS:
            result.memory_mib.append(read_memory())


def show(result: Result, console: Console) -> None:
    """Two small tables."""
    console.print(f"{result.swaps} swaps, {result.refused} refused, {result.rolled_back} rolled back (of the last 100)")
    table = Table("", "ticks", "missed", "overslept")
    for name, phase in (("without swaps", result.without_swaps), ("with swaps", result.with_swaps)):
        table.add_row(name, *map(str, (phase.ticks, phase.missed_ticks, phase.overslept_ticks)))
    console.print(table)
    table = Table("action step (largest motion component)", "steps", "p99", "largest")
    phase = result.with_swaps
    for name, largest in phase.largest_step.items():
        table.add_row(name, str(phase.counts[name]), f"{phase.steps_p99[name]:.3f}", f"{largest:.3f}")
    console.print(table)
    p50, p99 = np.percentile(result.swap_s, (50, 99))
    console.print(f"from the call to the takeover: {p50:.2f} s (p99 {p99:.2f} s)")
    memory = f"{result.memory_mib[0]:.0f} MiB at first, {max(result.memory_mib):.0f} at most, {result.growth_mib:+.1f} over the swaps"
    console.print(f"memory of the policy node: {memory}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--baseline", type=float, default=20.0, help="seconds without swaps before")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints"), help="folder with world_model/, policies/ and finetuned/")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"{os.cpu_count()} cores, load average before the start {os.getloadavg()[0]:.1f}")
    result = measure(options.swaps, options.baseline, options.checkpoint, Path("runs") / "benchmark_swap")
    show(result, console)
    if options.json:
        options.json.write_text(json.dumps(asdict(result) | {"growth_mib": result.growth_mib}, indent=2))


if __name__ == "__main__":
    main()
