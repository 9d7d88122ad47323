"""What the terminal shows of a demo: a live table, or one line per episode where the output is not a terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from diwa_ros.demo import DemoPlan, DemoRecord
    from diwa_ros.evaluator import GraphResult

LATENCY = "camera → chunk"


class LineView:
    """One line per episode."""

    def __init__(self, console: Console, plan: DemoPlan) -> None:
        self.console, self.plan = console, plan
        self.record: DemoRecord | None = None

    def __enter__(self) -> LineView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def begin(self, record: DemoRecord) -> None:
        """Keep the record and say how long the start took."""
        self.record = record
        domain = os.environ.get("ROS_DOMAIN_ID", "0")
        size = f"{len(record.skills)} skills x {self.plan.episodes} episodes"
        self.say(f"diwa demo: graph ready after {record.ready_s:.0f} s; {size}; look in with ROS_DOMAIN_ID={domain} ros2 topic list")
        if note := describe_sides(record):
            self.say(f"diwa demo: {note}")

    def refresh(self, skill: str, side: str, steps: int) -> None:
        """Lines do not move."""

    def finish_episode(self, skill: str, side: str, index: int) -> None:
        """Print the outcome."""
        result = self.record.skills[skill].results[side][-1]
        p50, p99 = percentiles(result.latency_ms[LATENCY])
        outcome = "success" if result.success else "failed "
        latency, total = f"{LATENCY} {p50} / {p99} ms", f"so far {count_successes(self.record, side)}"
        self.say(f"{skill:20s} {side:10s} {index + 1}/{self.plan.episodes}  {outcome} {result.steps:3d} steps  {latency}  {total}")

    def say(self, line: str) -> None:
        """One line."""
        self.console.print(line)


class TableView(LineView):
    """A table that follows the run."""

    def __init__(self, console: Console, plan: DemoPlan) -> None:
        super().__init__(console, plan)
        self.live = Live(console=console, auto_refresh=False)

    def __exit__(self, *_: object) -> None:
        if self.live.is_started:
            self.show()
            self.live.stop()

    def begin(self, record: DemoRecord) -> None:
        """Draw the empty table."""
        super().begin(record)
        self.live.start()
        self.show()

    def refresh(self, skill: str, side: str, steps: int) -> None:
        """Redraw with the running episode's steps."""
        self.show((skill, side), steps)

    def finish_episode(self, skill: str, side: str, index: int) -> None:
        """Redraw with the outcome."""
        self.show()

    def show(self, running: tuple[str, str] | None = None, steps: int = 0) -> None:
        """Draw the table now."""
        self.live.update(make_table(self.record, self.plan.episodes, running, steps), refresh=True)


def make_view(console: Console, plan: DemoPlan) -> LineView:
    """The view that fits the output."""
    return TableView(console, plan) if console.is_terminal else LineView(console, plan)


def make_table(record: DemoRecord, episodes: int, running: tuple[str, str] | None = None, steps: int = 0) -> Table:
    """Skills, outcomes of base and fine-tuned policy, latencies so far; (skill, side) `running` is `steps` steps into its next episode."""
    sides = list(dict.fromkeys(side for skill in record.skills.values() for side in skill.results))
    table = Table("skill", *(f"{side}: steps" for side in sides), f"{LATENCY}\np50 / p99 ms", title_justify="left", caption_justify="left")
    for name, skill in record.skills.items():
        cells = [_outcomes(skill.results.get(side), episodes, steps if (name, side) == running else None) for side in sides]
        values = [value for results in skill.results.values() for result in results for value in result.latency_ms[LATENCY]]
        table.add_row(name, *cells, " / ".join(percentiles(values)) if values else "")
    p50, p99 = percentiles(record.latencies_ms[LATENCY])
    table.add_section()
    table.add_row("successes", *(count_successes(record, side) for side in sides), f"{p50} / {p99}")
    if record.run_s:
        table.caption = f"{record.ticks / record.run_s:.0f} ticks/s, {record.run_s:.0f} s"
    return table


def count_successes(record: DemoRecord, side: str) -> str:
    """Successes of episodes so far, over the skills that have the side."""
    results = [result for skill in record.skills.values() for result in skill.results.get(side, [])]
    return f"{sum(result.success for result in results)}/{len(results)}"


def describe_sides(record: DemoRecord) -> str:
    """Which skills run without a fine-tuned policy; empty where all have one."""
    alone = [name for name, skill in record.skills.items() if not skill.compared]
    if not alone:
        return ""
    which = ", ".join(alone) if len(alone) < len(record.skills) else "any of the skills"
    return f"no fine-tuned policy of {which} in the checkpoint folder (finetuned/<skill>): base only there."


def percentiles(values: list[float]) -> tuple[str, str]:
    """p50 and p99 as text, a dash without values."""
    return tuple(f"{value:.1f}" for value in np.percentile(values, (50, 99))) if values else ("-", "-")


def _outcomes(results: list[GraphResult] | None, episodes: int, steps: int | None) -> str:
    """A tick or cross with the steps of each episode, then the running one, then dots; a dash for a side that does not run."""
    if results is None:
        return "-"
    cells = [f"[green]✓ {r.steps:2d}[/]" if r.success else f"[red]✗ {r.steps:2d}[/]" for r in results]
    if steps is not None and len(cells) < episodes:
        cells.append(f"[yellow]▸ {steps:2d}[/]")
    return "  ".join(cells + ["·   "] * (episodes - len(cells)))
