"""Speed of the play table: env steps per CPU-second with and without pictures, reset time, scaling over processes.

`python benchmarks/sim.py [--steps 400]` prints a table; goals are those of the project.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from diwa_core.sim.experts import Expert
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.skills import SKILLS, start_state


def time_steps(image_size: int | None, steps: int, seed: int = 0) -> tuple[float, float]:
    """CPU seconds and wall seconds for `steps` environment steps under experts of all skills."""
    table = PlayTable(image_size=image_size)
    cpu = wall = 0.0
    for number in range(steps // 40):
        skill = SKILLS[number % len(SKILLS)]
        table.reset(options={"state": start_state(skill, number, seed, "train")})
        expert = Expert(skill, np.random.default_rng(number))
        expert.start(table.robot_obs, table.scene_obs)
        actions = []
        for _ in range(40):
            actions.append(expert.act(table.robot_obs, table.target_pose))
            table.apply(actions[-1])
        table.reset(options={"state": start_state(skill, number, seed, "train")})
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        for action in actions:
            table.step(action)
        cpu, wall = cpu + time.process_time() - cpu_start, wall + time.perf_counter() - wall_start
    table.close()
    return cpu, wall


def time_resets(count: int = 40) -> float:
    """CPU milliseconds per reset without pictures."""
    table = PlayTable(image_size=None)
    start = time.process_time()
    for number in range(count):
        table.reset(seed=number)
    elapsed = time.process_time() - start
    table.close()
    return 1e3 * elapsed / count


def time_processes(processes: int, steps: int) -> float:
    """Wall-clock steps per second of `processes` tables with both views, start-up not counted."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        walls = [wall for _, wall in pool.starmap(time_steps, [(64, steps, seed) for seed in range(processes)])]
    return sum(steps / wall for wall in walls)


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = max(40, parser.parse_args().steps // 40 * 40)
    table = Table("measure", "value", "goal", title="play table, TinyRenderer")
    for name, size, goal in (("without pictures", None, ">= 500"), ("two views, 64 px", 64, ">= 110"), ("two views, 200 px", 200, "")):
        cpu, _ = time_steps(size, steps)
        table.add_row(f"steps per CPU-second, {name}", f"{steps / cpu:.0f}", goal)
    table.add_row("reset, CPU ms", f"{time_resets():.1f}", "< 100")
    one, two = time_processes(1, steps), time_processes(2, steps)
    table.add_row("steps/s, one process, two views", f"{one:.0f}", "")
    table.add_row("steps/s, two processes, two views", f"{two:.0f}", "")
    table.add_row("scaling 1 -> 2 processes", f"{two / one:.2f}x", "near 2x")
    Console().print(table)


if __name__ == "__main__":
    main()
