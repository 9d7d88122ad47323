"""A client of the controller and of the policy on a running graph: what `diwa robot` calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rclpy
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ControllerStatus
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from std_srvs.srv import Trigger

from diwa_core.errors import GateError, SetupError
from diwa_ros.messages import LATCHED


class RobotClient:
    """Owns its node and executor and needs rclpy.init. Raises SetupError when an answer does not come within `timeout_s`."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self.timeout_s = timeout_s
        self.node = rclpy.create_node("robot_client")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.status: ControllerStatus | None = None
        self.node.create_subscription(ControllerStatus, "controller/status", lambda message: setattr(self, "status", message), LATCHED)

    def close(self) -> None:
        """Leave the graph."""
        self.executor.remove_node(self.node)
        self.node.destroy_node()

    def read_status(self) -> ControllerStatus:
        """State, reason and counters of the controller."""
        self.until(lambda: self.status is not None, "topic controller/status")
        return self.status

    def tell(self, what: str) -> str:
        """Call controller/<what>; returns what it says. Raises GateError when it refuses."""
        client = self.node.create_client(Trigger, f"controller/{what}")
        self.until(client.service_is_ready, f"service controller/{what}")
        answer = client.call_async(Trigger.Request())
        self.until(answer.done, f"an answer of controller/{what}")
        if not answer.result().success:
            raise GateError(answer.result().message)
        return answer.result().message

    def run_skill(self, skill: str, max_steps: int) -> RunSkill.Result:
        """Let the policy run; KeyboardInterrupt cancels it and the arm holds. Raises GateError when the policy refuses."""
        client = ActionClient(self.node, RunSkill, "run_skill")
        try:
            self.until(client.server_is_ready, "action run_skill")
            accepted = client.send_goal_async(RunSkill.Goal(skill=skill, max_steps=max_steps))
            self.until(accepted.done, "an answer of run_skill")
            goal = accepted.result()
            if not goal.accepted:
                raise GateError(
                    f"run_skill: refused '{skill}'. The log of the policy node says why: an unknown skill, or a run in progress."
                )
            ended = goal.get_result_async()
            try:
                self.until(ended.done, "the end of the run", None)
            except KeyboardInterrupt:
                goal.cancel_goal_async()
                self.until(ended.done, "the end of the cancelled run")
            return ended.result().result
        finally:
            client.destroy()

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float | None = -1.0) -> None:
        """Spin until it holds; None waits for ever."""
        timeout_s = self.timeout_s if timeout_s == -1.0 else timeout_s
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not condition():
            if end_s is not None and time.monotonic() > end_s:
                raise SetupError(f"robot: expected {what} within {timeout_s:g} s, found none. Is the graph up (diwa up deploy)?")
            self.executor.spin_once(timeout_sec=0.05)


@contextmanager
def open_client(timeout_s: float) -> Iterator[RobotClient]:
    """A client in a process that has no ROS of its own. Ctrl-C stays Python's, so that a run can be cancelled before it ends."""
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    client = RobotClient(timeout_s)
    try:
        yield client
    finally:
        client.close()
        rclpy.try_shutdown()
