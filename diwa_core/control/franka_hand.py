"""The Franka Hand through franky, in a thread of its own: one command in flight, the state cached, a command without an answer reported."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Any

from diwa_core.control.franka_arm import RETRY_S, Connector, describe, import_franky
from diwa_core.control.robot_config import RobotConfig

LOGGER = logging.getLogger(__name__)
PERIOD_S = 0.05
STOP_S = 1.0
ANY_WIDTH = 1.0  # m, tolerance of a grasp: what is between the fingers has a width that nobody told us
CLOSED_WIDTH_M = 0.0


class FrankaHand:
    """The thread. `ask` says open or closed, as often as it likes; `width_m`, `problem` tell."""

    def __init__(self, config: RobotConfig) -> None:
        self.config = config.gripper
        self.address, self.connect_timeout_s = config.address, config.connect_timeout_s
        self.width_m = 0.08
        self.problem = "connecting"  # empty: all well
        self.commands = 0
        self._asked_open: bool | None = None  # what the last samples agree on
        self._sample, self._samples = None, 0
        self._connector = Connector()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="franka-hand", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def close(self, timeout_s: float = 2.0) -> None:
        """End the thread; one that hangs in the library is left behind."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def ask(self, is_open: bool) -> None:
        """One sample of what is wanted; it counts when `debounce_samples` in a row agree."""
        self._samples = self._samples + 1 if is_open == self._sample else 1
        self._sample = is_open
        if self._samples >= self.config.debounce_samples:
            self._asked_open = is_open

    def forget(self) -> None:
        """Want nothing; what is in flight goes on."""
        self._asked_open, self._sample, self._samples = None, None, 0

    def _run(self) -> None:
        franky = import_franky()
        while not self._ending.is_set():
            try:
                hand = self._connector.connect(lambda: franky.Gripper(self.address), self.connect_timeout_s, f"gripper of {self.address}")
                self._serve(hand)
            except Exception as error:
                self.problem = describe(error)
                LOGGER.warning("gripper: %s", self.problem)
            self._ending.wait(RETRY_S)

    def _serve(self, hand: Any) -> None:
        """Serve until an error. A command without an answer is reported and stopped; no other is sent before it has ended."""
        self.problem, done, running, due_s, began_s = "", None, None, 0.0, 0.0
        while not self._ending.wait(PERIOD_S):
            now_s = time.monotonic()
            if running is not None and running.wait(0.0):
                done = done if self._take_result(running) else None
                running = None
            if running is not None and now_s > due_s:
                self.problem = f"no answer to a command for {self.config.timeout_s:g} s; trying to stop it"
                due_s = now_s + self.config.timeout_s
                self._try_stop(hand)
            self.width_m = hand.state.width
            wanted = self._asked_open
            if running is None and wanted is not None and wanted != done and now_s - began_s >= self.config.dwell_s:
                running, done, began_s = self._begin(hand, wanted), wanted, now_s
                due_s = now_s + self.config.timeout_s
                self.commands += 1

    def _try_stop(self, hand: Any) -> None:
        """Stop what is in flight, which ends it; a hand that is dead does not answer that either."""
        with suppress(Exception):
            self._connector.connect(hand.stop, STOP_S, "gripper")

    def _begin(self, hand: Any, is_open: bool) -> Any:
        if is_open:
            return hand.open_async(self.config.speed_m_s)
        return hand.grasp_async(
            CLOSED_WIDTH_M, self.config.speed_m_s, self.config.force_n, epsilon_inner=ANY_WIDTH, epsilon_outer=ANY_WIDTH
        )

    def _take_result(self, running: Any) -> bool:
        """Whether a command that has ended did what it should."""
        try:
            self.problem = "" if running.get() else "the gripper did not reach what it should"
        except Exception as error:
            self.problem = describe(error)
        return not self.problem
