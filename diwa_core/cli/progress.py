"""Progress: bars on the terminal (nothing when the output is a file), a file for `diwa pipeline`, and stopping between two updates."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PROGRESS_FILE = "DIWA_PROGRESS_FILE"  # environment variable: where to write {"stage", "done"}, for whoever waits for this process
_WRITE_EVERY_S = 1.0

Report = Callable[[str, float], None]


@contextmanager
def stage_progress() -> Iterator[Report]:
    """Yields report(stage, share done); each new stage gets its own bar with the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    path, written = os.environ.get(PROGRESS_FILE), -_WRITE_EVERY_S
    with Progress(*columns, redirect_stdout=False, redirect_stderr=False) as bars:
        tasks: dict = {}
        lock = threading.Lock()  # both image codes report at the same time

        def report(stage: str, done: float) -> None:
            nonlocal written
            with lock:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=1.0)
                bars.update(tasks[stage], completed=done)
                if path and time.monotonic() - written > _WRITE_EVERY_S:
                    written = time.monotonic()
                    temporary = Path(path).with_suffix(".tmp")
                    temporary.write_text(json.dumps({"stage": stage, "done": done}))
                    os.replace(temporary, path)

        yield report


@contextmanager
def stop_between_updates(report: Report, save: Callable[[], None]) -> Iterator[Report]:
    """Yields `report` for a loop that calls it after every update: once SIGINT or SIGTERM came, the next call saves and stops the loop.

    So a stopped training loses nothing and no update is cut in half. A second signal stops at once. Only for the main thread.
    """
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    def report_or_stop(stage: str, done: float) -> None:
        report(stage, done)
        if asked:
            save()
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield report_or_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
