"""Runs the stages of a pipeline that need it, several at a time, each as a process of its own with a log file."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from diwa_core import tether
from diwa_core.cli.progress import PROGRESS_FILE
from diwa_core.errors import DiwaError
from diwa_core.pipeline.stage import Action, Decision, Pipeline, Stage, usual_seconds

STOP_STEPS = ((signal.SIGINT, 60.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0))  # signal and seconds to save and obey
LOCK_WAIT_S = 30.0
LAST_LINES = 15
_POLL_S, _STATUS_EVERY_S = 0.1, 1.0


class StageFailed(DiwaError):
    """A stage's command did not end well."""


@dataclass
class Running:
    """A stage at work."""

    stage: Stage
    popen: subprocess.Popen
    log: Path
    log_start: int
    began: float
    progress_file: Path
    phase: tuple[str, float, float] | None = None  # name, and share and time when it was first seen

    def progress(self) -> tuple[str, float, float | None] | None:
        """Phase, share done and seconds left in it as far as its pace tells; None before the command said anything."""
        try:
            report = json.loads(self.progress_file.read_text())
            name, done = str(report["stage"]), float(report["done"])
        except (OSError, ValueError, KeyError):
            return None
        if self.phase is None or self.phase[0] != name:
            self.phase = (name, done, time.monotonic())
        _, first, seen = self.phase
        left = (time.monotonic() - seen) / (done - first) * (1 - done) if done > first else None
        return name, done, left

    def last_lines(self) -> list[str]:
        """The end of what it printed in this run."""
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace").splitlines()[-LAST_LINES:]


@dataclass
class Runner:
    """`run` brings the selected stages up to date. `workers`: processes at a time; `say` shows one line.

    should_stop() is asked all the time; `hurry()` means not to wait until stages have saved their state.
    """

    pipeline: Pipeline
    workers: int
    say: Callable[[str], None]
    should_stop: Callable[[], bool] = lambda: False
    hurry: Callable[[], bool] = lambda: False
    show_status: Callable[[str], None] = lambda text: None
    running: list[Running] = field(default_factory=list)
    pending: list[Stage] = field(default_factory=list)
    _decisions: dict[str, Decision] = field(default_factory=dict)  # of stages that wait for free cores
    _lock_file: IO | None = None

    def run(self, selected: list[Stage]) -> bool:
        """True when all of `selected` are up to date, False when should_stop() ended it before.

        Raises StageFailed with the end of the stage's output, after the other running stages were stopped.
        """
        with self._lock():
            self.pending, self._total = list(selected), len(selected)
            told = 0.0
            try:
                while self.pending or self.running:
                    if self.should_stop():
                        return False
                    self._collect()
                    self._start_ready()
                    if time.monotonic() - told > _STATUS_EVERY_S:
                        self.show_status(self.describe())
                        told = time.monotonic()
                    if self.running:
                        time.sleep(_POLL_S)
            finally:
                self._stop_all()
        return True

    # ---- starting and ending stages -----------------------------------------------------------------------------------------------

    def _start_ready(self) -> None:
        """Decide about every stage whose needs are met, and start as many as there are free cores, in order."""
        for stage in list(self.pending):
            unsettled = {other.name for other in (*self.pending, *(r.stage for r in self.running))} - {stage.name}
            decision = self._decisions.get(stage.name) or self.pipeline.decide(stage, unsettled)
            if decision.action is Action.AFTER:
                continue
            if decision.action is not Action.SKIP and sum(r.stage.cores for r in self.running) + stage.cores > self.workers:
                self._decisions[stage.name] = decision
                return  # what comes first starts first, so that a stage that wants all cores is not passed by for ever
            self.pending.remove(stage)
            self.say(f"[{self._total - len(self.pending)}/{self._total}] {stage.name}: {decision}")
            if decision.action is not Action.SKIP:
                self.pipeline.begin(stage, decision)
                self.running.append(self._launch(stage))

    def _launch(self, stage: Stage) -> Running:
        root = self.pipeline.root
        log_path, progress_file = root / "logs" / f"{stage.name}.log", root / "logs" / f"{stage.name}.progress"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        progress_file.unlink(missing_ok=True)
        self.say(f"    {stage.show(root)}")
        with log_path.open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} $ {stage.show(root)}\n")
            log.flush()
            start = log.tell()
            popen = subprocess.Popen(
                [sys.executable, "-S", "-E", tether.__file__, str(os.getpid()), *stage.argv(root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", PROGRESS_FILE: str(progress_file)},
                start_new_session=True,  # Ctrl-C reaches this process only, which then stops them
                pass_fds=(self._lock_file.fileno(),),  # what outlives a killed pipeline still holds its lock
            )
        return Running(stage, popen, log_path, start, time.monotonic(), progress_file)

    def _collect(self) -> None:
        """Stamp what has ended well; raise StageFailed for what has not."""
        for run in [run for run in self.running if run.popen.poll() is not None]:
            self.running.remove(run)
            seconds = time.monotonic() - run.began
            run.progress_file.unlink(missing_ok=True)
            if run.popen.returncode != 0:
                self.pipeline.pause(run.stage, seconds)
                raise StageFailed(self._explain(run))
            self.pipeline.finish(run.stage, seconds)
            self.say(f"    {run.stage.name}: done in {show_seconds(seconds)}")

    def _explain(self, run: Running) -> str:
        code = run.popen.returncode
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        lines = "\n".join(f"    {line}" for line in run.last_lines())
        command = run.stage.show(self.pipeline.root)
        return f"stage '{run.stage.name}' ended with {how}. Its last lines ({run.log}):\n{lines}\nThe command alone:\n    {command}"

    def _stop_all(self) -> None:
        """Ask all running stages to save and end, insist after a while, and leave no process behind."""
        for number, limit_s in STOP_STEPS:
            if number is not signal.SIGKILL and self.hurry():
                continue
            alive = [run for run in self.running if run.popen.poll() is None]
            for run in alive:
                run.popen.send_signal(number)
            if alive:
                self.say(f"stopping {', '.join(run.stage.name for run in alive)} ({number.name})")
            deadline = time.monotonic() + limit_s
            while any(run.popen.poll() is None for run in alive) and time.monotonic() < deadline:
                if number is not signal.SIGKILL and self.hurry():
                    break
                time.sleep(_POLL_S)
        for run in self.running:
            try:
                os.killpg(run.popen.pid, signal.SIGKILL)  # helpers that a stage may have left in its session
            except ProcessLookupError:
                pass
            if run.popen.poll() == 0:
                self.pipeline.finish(run.stage, time.monotonic() - run.began)
            else:
                self.pipeline.pause(run.stage, time.monotonic() - run.began)
        self.running.clear()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One pipeline per root. Stages that outlived a killed one are given a moment to end."""
        self.pipeline.root.mkdir(parents=True, exist_ok=True)
        path = self.pipeline.root / ".lock"
        with path.open("a") as self._lock_file:
            deadline = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self.should_stop() or time.monotonic() > deadline:
                        raise DiwaError(
                            f"{self.pipeline.root}: another `diwa pipeline`, or a stage of one, works here. Wait, or choose another --out."
                        ) from None
                    time.sleep(_POLL_S)
            yield

    # ---- time left ----------------------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """What is running, how far it is, and the time left."""
        parts = []
        for run in self.running:
            progress = run.progress()
            parts.append(run.stage.name + (f" {progress[0]} {100 * progress[1]:.0f} %" if progress else ""))
        left, unknown = self.seconds_left()
        text = f"{'at least' if unknown else 'about'} {show_seconds(left)} left" if left else "time left unknown"
        text += f", not timed yet: {', '.join(unknown)}" if unknown else ""
        return f"{'; '.join(parts)}; {text}" if parts else text

    def seconds_left(self) -> tuple[float, list[str]]:
        """Seconds until all selected stages are done, and the kinds of stages of which nothing is known.

        A stage is expected to take as long as it did before, otherwise as long as others of its kind.
        """
        usual = {stage.name: usual_seconds(self.pipeline.read_stamp(stage)) for stage in self.pipeline.stages}
        work, longest, unknown = 0.0, 0.0, []
        for stage, run in [*((run.stage, run) for run in self.running), *((stage, None) for stage in self.pending)]:
            kind = [usual[other.name] for other in self.pipeline.stages if other.group == stage.group and usual[other.name]]
            seconds = usual[stage.name] or (sum(kind) / len(kind) if kind else None)
            if run is not None:
                progress = run.progress()
                pace = progress[2] if progress else None
                spent = time.monotonic() - run.began
                seconds = max((known for known in (pace, seconds and seconds - spent) if known is not None), default=None)
            if seconds is None:
                unknown.append(stage.group)
                continue
            work += max(seconds, 0.0) * stage.cores
            longest = max(longest, seconds)
        return max(longest, work / max(self.workers, 1)), list(dict.fromkeys(unknown))


def plan(pipeline: Pipeline, selected: list[Stage]) -> list[tuple[Stage, Decision]]:
    """What `run` would do. Raises DiwaError when a selected stage needs one that is neither selected nor up to date."""
    wanted, decisions, unsettled = {stage.name for stage in selected}, [], {}
    needed = set(wanted)
    for stage in reversed(pipeline.stages):
        if stage.name in needed:
            needed |= {need.name for need in pipeline.needs(stage)}
    for stage in (stage for stage in pipeline.stages if stage.name in needed):
        decision = pipeline.decide(stage, set(unsettled))
        if decision.action is not Action.SKIP:
            unsettled[stage.name] = decision.reason
            if stage.name not in wanted:
                raise DiwaError(
                    f"stage '{stage.name}' is needed, and it would run ({decision.reason}). "
                    "Leave out --only, or bring what is needed up to date first with --until."
                )
        if stage.name in wanted:
            decisions.append((stage, decision))
    return decisions


def show_seconds(seconds: float) -> str:
    """A duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
