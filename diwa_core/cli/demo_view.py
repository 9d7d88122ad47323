"""What the terminal shows of a demo: a live table, or one line per episode where the output is not a terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from diwa_ros.demo import DemoPlan, DemoRecord, SkillRecord

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

    def refresh(self, skill: str, steps: int) -> None:
        """Lines do not move."""

    def finish_episode(self, skill: str, index: int) -> None:
        """Print the outcome."""
        result = self.record.skills[skill].results[-1]
        p50, p99 = percentiles(result.latency_ms[LATENCY])
        outcome = "success" if result.success else "failed "
        total = f"{sum(s.successes for s in self.record.skills.values())}/{sum(len(s.results) for s in self.record.skills.values())}"
        self.say(
            f"{skill:20s} {index + 1}/{self.plan.episodes}  {outcome} {result.steps:3d} steps  {LATENCY} {p50} / {p99} ms  so far {total}"
        )

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

    def refresh(self, skill: str, steps: int) -> None:
        """Redraw with the running episode's steps."""
        self.show(skill, steps)

    def finish_episode(self, skill: str, index: int) -> None:
        """Redraw with the outcome."""
        self.show()

    def show(self, running: str = "", steps: int = 0) -> None:
        """Draw the table now."""
        self.live.update(make_table(self.record, self.plan.episodes, running, steps), refresh=True)


def make_view(console: Console, plan: DemoPlan) -> LineView:
    """The view that fits the output."""
    return TableView(console, plan) if console.is_terminal else LineView(console, plan)


def make_table(record: DemoRecord, episodes: int, running: str = "", steps: int = 0) -> Table:
    """Skills, outcomes and latencies so far; the skill `running` is `steps` policy steps into its next episode."""
    table = Table("skill", "episodes (steps)", f"{LATENCY} p50 / p99 ms", "success", title_justify="left", caption_justify="left")
    for name, skill in record.skills.items():
        values = [value for result in skill.results for value in result.latency_ms[LATENCY]]
        p50, p99 = percentiles(values)
        share = f"{skill.successes}/{len(skill.results)}" if skill.results else ""
        table.add_row(name, _outcomes(skill, episodes, steps if name == running else None), f"{p50} / {p99}" if values else "", share)
    done = [result for skill in record.skills.values() for result in skill.results]
    p50, p99 = percentiles(record.latencies_ms[LATENCY])
    table.add_section()
    table.add_row("all", "", f"{p50} / {p99}" if done else "", f"{sum(r.success for r in done)}/{len(done)}")
    if record.run_s:
        table.caption = f"{record.ticks / record.run_s:.0f} ticks/s, {record.run_s:.0f} s"
    return table


def percentiles(values: list[float]) -> tuple[str, str]:
    """p50 and p99 as text, a dash without values."""
    return tuple(f"{value:.1f}" for value in np.percentile(values, (50, 99))) if values else ("-", "-")


def _outcomes(skill: SkillRecord, episodes: int, steps: int | None) -> str:
    """A tick or cross with the steps of each episode, then the running one, then dots."""
    cells = [f"[green]✓ {r.steps:2d}[/]" if r.success else f"[red]✗ {r.steps:2d}[/]" for r in skill.results]
    if steps is not None and len(cells) < episodes:
        cells.append(f"[yellow]▸ {steps:2d}[/]")
    return "  ".join(cells + ["·   "] * (episodes - len(cells)))
