"""A client of a running recorder: what `diwa record` calls."""

from __future__ import annotations

import time
from collections.abc import Callable

import rclpy
from diwa_interfaces.msg import EpisodeReport, RecorderStatus
from diwa_interfaces.srv import MarkEpisode, SaveRecent, StartRecording, StopRecording
from rclpy.executors import SingleThreadedExecutor

from diwa_core.errors import DataError, SetupError
from diwa_ros.messages import LATCHED, reliable


class RecorderClient:
    """Use it as a context manager; it owns its node and executor and needs rclpy.init.

    status: the newest one; reports: of episodes that ended, in order.
    """

    def __init__(self, timeout_s: float = 60.0) -> None:
        """`timeout_s`: longest wait for any answer."""
        self.timeout_s = timeout_s
        self.status: RecorderStatus | None = None
        self.reports: list[EpisodeReport] = []
        self.node = rclpy.create_node("recorder_client")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.node.create_subscription(RecorderStatus, "recorder/status", self._take_status, LATCHED)
        self.node.create_subscription(EpisodeReport, "recorder/episode", self.reports.append, reliable(10))

    def __enter__(self) -> RecorderClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.remove_node(self.node)
        self.node.destroy_node()

    def start(self, name: str = "", skill: str = "") -> StartRecording.Response:
        """Begin a bag. Raises DataError with the recorder's reason, SetupError when it does not answer."""
        return self._call(StartRecording, "recorder/start", StartRecording.Request(name=name, skill=skill))

    def stop(self, outcome: str = "") -> StopRecording.Response:
        """Close the bag; returns when it is whole. Raises as `start`."""
        return self._call(StopRecording, "recorder/stop", StopRecording.Request(outcome=outcome))

    def mark(self, outcome: str, skill: str = "", note: str = "") -> MarkEpisode.Response:
        """End the running episode. Raises as `start`."""
        return self._call(MarkEpisode, "recorder/mark", MarkEpisode.Request(outcome=outcome, skill=skill, note=note))

    def save(self, seconds: float = 0.0, reason: str = "") -> SaveRecent.Response:
        """Save the last seconds. Raises as `start`."""
        return self._call(SaveRecent, "recorder/save", SaveRecent.Request(seconds=seconds, reason=reason))

    def spin(self, timeout_s: float) -> None:
        """Listen for a moment."""
        self.executor.spin_once(timeout_sec=timeout_s)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Listen until `condition`. Raises SetupError."""
        end_s = time.monotonic() + self.timeout_s
        while not condition():
            if time.monotonic() > end_s:
                raise SetupError(f"recorder: expected {what} within {self.timeout_s:g} s, found none. Start one: diwa record.")
            self.spin(0.05)

    def _take_status(self, message: RecorderStatus) -> None:
        self.status = message

    def _call(self, service_type: type, name: str, request: object) -> object:
        client = self.node.create_client(service_type, name)
        try:
            self.wait_for(client.service_is_ready, f"service {client.srv_name}")
            future = client.call_async(request)
            self.wait_for(future.done, f"an answer of {client.srv_name}")
        finally:
            self.node.destroy_client(client)
        if not future.result().success:
            raise DataError(future.result().message)
        return future.result()
