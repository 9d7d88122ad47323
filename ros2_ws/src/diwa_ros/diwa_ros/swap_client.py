"""A client of the swap services on a running graph: what `diwa swap` and the benchmark call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import rclpy
from diwa_interfaces.msg import PolicyHistory, SwapEvent
from diwa_interfaces.srv import LoadPolicy
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from std_srvs.srv import Trigger

from diwa_core.errors import GateError, SetupError
from diwa_ros.messages import LATCHED


class SwapClient:
    """Use it as a context manager, or call `close`; it owns its node and executor and needs rclpy.init."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        """`timeout_s`: longest wait for any answer; a swap answers when it has taken over."""
        self.timeout_s = timeout_s
        self.node = rclpy.create_node("swap_client")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.newest: PolicyHistory | None = None
        self.node.create_subscription(PolicyHistory, "policy/history", lambda message: setattr(self, "newest", message), LATCHED)
        self.load_client = self.node.create_client(LoadPolicy, "policy/load")
        self.rollback_client = self.node.create_client(Trigger, "policy/rollback")

    def __enter__(self) -> SwapClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the graph."""
        self.executor.remove_node(self.node)
        self.node.destroy_node()

    def load(
        self, path: str | Path, skill: str = "", world_model: str | Path = "", shadow: bool = False, max_difference: float = 0.0
    ) -> LoadPolicy.Response:
        """Swap in the checkpoint at `path`, or let it shadow; `path` empty ends the shadow.

        Raises GateError with the gate that refused it, SetupError when the policy node does not answer.
        """
        paths = [str(Path(one).absolute()) if one else "" for one in (path, world_model)]  # the node may have been started elsewhere
        request = LoadPolicy.Request(path=paths[0], skill=skill, world_model=paths[1], shadow=shadow)
        request.max_action_difference = float(max_difference)
        response = self._call(self.load_client, request)
        if not response.success:
            raise GateError(response.message)
        return response

    def roll_back(self) -> str:
        """Undo the last swap; returns what the node says. Raises GateError when there is nothing to undo."""
        response = self._call(self.rollback_client, Trigger.Request())
        if not response.success:
            raise GateError(response.message)
        return response.message

    def read_history(self) -> list[SwapEvent]:
        """The last swaps, oldest first. Raises SetupError when the policy node is not there."""
        self._until(lambda: self.newest is not None, "topic policy/history")
        return list(self.newest.events)

    def _call(self, client: Client, request: object) -> object:
        self._until(client.service_is_ready, f"service {client.srv_name}")
        future = client.call_async(request)
        self._until(future.done, f"an answer of {client.srv_name}")
        return future.result()

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + self.timeout_s
        while not condition():
            if time.monotonic() > end_s:
                raise SetupError(f"policy node: expected {what} within {self.timeout_s:g} s, found none. Is the graph up (diwa up deploy)?")
            self.executor.spin_once(timeout_sec=0.05)


@contextmanager
def open_client(timeout_s: float) -> Iterator[SwapClient]:
    """A client in a process that has no ROS of its own."""
    rclpy.init()
    try:
        with SwapClient(timeout_s) as client:
            yield client
    finally:
        rclpy.try_shutdown()
