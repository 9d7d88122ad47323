"""Runs the processes of a graph without launch: starts them in order, notices a death, stops them in reverse order, leaves no orphan."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from diwa_core import tether
from diwa_core.errors import SetupError
from diwa_ros.graph import Process

LOGGER = logging.getLogger(__name__)
STOP_STEPS = ((signal.SIGINT, 5.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0))  # signal and seconds to obey it
LAST_LINES = 12
_POLL_S = 0.05


@dataclass(frozen=True)
class Exit:
    """A process that ended. `code` is negative for a signal."""

    name: str
    code: int
    required: bool
    log: Path
    last_lines: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """Which node, how it ended and where to read on."""
        how = f"exit code {self.code}" if self.code >= 0 else f"signal {signal.Signals(-self.code).name}"
        return f"node '{self.name}' ended with {how}; log: {self.log}"


@dataclass
class _Child:
    process: Process
    popen: subprocess.Popen
    log: Path
    reader: threading.Thread | None = None
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))


def command_line(process: Process, python: str = sys.executable) -> list[str]:
    """The node as a process of this interpreter."""
    return [python, "-m", f"diwa_ros.{process.executable}", "--ros-args", *process.ros_arguments]


class GraphRunner:
    """A context manager around a running graph.

    One log file per node in `log_folder`; `echo(name, line)` sees every line as well. `command` turns a process into words to execute.
    """

    def __init__(
        self,
        processes: list[Process],
        log_folder: str | Path,
        echo: Callable[[str, str], None] | None = None,
        command: Callable[[Process], list[str]] = command_line,
    ) -> None:
        self.processes = processes
        self.command = command
        self.log_folder = Path(log_folder)
        self.echo = echo
        self._children: list[_Child] = []
        self._reported: set[str] = set()

    def __enter__(self) -> GraphRunner:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pids(self) -> dict[str, int]:
        """Process identifiers by node name."""
        return {child.process.name: child.popen.pid for child in self._children}

    def start(self) -> None:
        """Start every process in order. The thread that calls this must outlive the graph: its end counts as the parent's death."""
        self.log_folder.mkdir(parents=True, exist_ok=True)
        try:
            for process in self.processes:
                self._children.append(self._launch(process))
        except OSError as error:
            self.stop()
            raise SetupError(f"cannot start a node: {error}.") from error

    def poll(self) -> Exit | None:
        """The next process that ended and was not reported yet, required ones first."""
        ended = [child for child in self._children if child.popen.poll() is not None and child.process.name not in self._reported]
        if not ended:
            return None
        child = max(ended, key=lambda child: child.process.required)
        self._reported.add(child.process.name)
        if child.reader:
            child.reader.join(timeout=1.0)
        return Exit(child.process.name, child.popen.returncode, child.process.required, child.log, tuple(child.last_lines))

    def wait(self, should_stop: Callable[[], bool]) -> Exit | None:
        """Block until a required process ends (returned) or `should_stop` answers true (None). Other deaths are only logged."""
        while not should_stop():
            death = self.poll()
            if death and death.required:
                return death
            if death:
                LOGGER.warning("%s; the graph goes on without it", death.sentence)
            time.sleep(_POLL_S)
        return None

    def stop(self, in_a_hurry: Callable[[], bool] = lambda: False) -> dict[str, int]:
        """Stop in reverse order and return exit codes by name: SIGINT, SIGTERM, SIGKILL, each with its time limit.

        `in_a_hurry` goes straight to SIGKILL.
        """
        for child in reversed(self._children):
            for number, limit_s in STOP_STEPS:
                if child.popen.poll() is not None:
                    break
                if number != signal.SIGKILL and in_a_hurry():
                    continue
                if number != signal.SIGINT:
                    LOGGER.warning("node '%s' did not stop in time: %s", child.process.name, number.name)
                child.popen.send_signal(number)
                self._await_end(child, limit_s, in_a_hurry if number != signal.SIGKILL else lambda: False)
            _sweep_group(child.popen.pid)
            if child.reader:
                child.reader.join(timeout=1.0)
        return {child.process.name: child.popen.returncode for child in self._children}

    def _launch(self, process: Process) -> _Child:
        environment = {**os.environ, **process.extra_environment, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-S", "-E", tether.__file__, str(os.getpid()), *self.command(process)]
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process only, which then stops them in order
            text=True,
            errors="replace",
        )
        child = _Child(process, popen, self.log_folder / f"{process.name}.log")
        child.reader = threading.Thread(target=self._read, args=(child, popen.stdout), name=f"log-{process.name}", daemon=True)
        child.reader.start()
        return child

    def _read(self, child: _Child, stream: IO[str]) -> None:
        with stream, child.log.open("w", buffering=1) as log:
            for line in stream:
                log.write(line)
                child.last_lines.append(line.rstrip())
                if self.echo:
                    self.echo(child.process.name, line.rstrip())

    @staticmethod
    def _await_end(child: _Child, limit_s: float, in_a_hurry: Callable[[], bool]) -> None:
        deadline = time.monotonic() + limit_s
        while child.popen.poll() is None and time.monotonic() < deadline and not in_a_hurry():
            time.sleep(_POLL_S)


def _sweep_group(group: int) -> None:
    """Kill what a node may have left behind in its session."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing was left: the usual case
