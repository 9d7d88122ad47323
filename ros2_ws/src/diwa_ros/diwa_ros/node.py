"""The base class of every node: lifecycle, parameter table, diagnostics, loud configuration and a clean end."""

from __future__ import annotations

import functools
import gc
import signal
import sys
import traceback
from collections.abc import Callable

import rclpy
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.logging import get_logger
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile
from rclpy.service import Service
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription
from rclpy.timer import Timer

from diwa_core.errors import DiwaError
from diwa_core.realtime import come_first
from diwa_ros.diagnostics import ERROR, OK, Diagnostics
from diwa_ros.parameters import Parameter, ParameterTable

SPIN_S = 0.05  # longest wait of the executor: how late a signal is seen
COMMON_PARAMETERS = (
    Parameter("autostart", True, "Configure and activate the node when it starts; false leaves that to a lifecycle manager."),
    Parameter(
        "realtime_priority", 0, "SCHED_FIFO priority of the node where the system allows one; 0, and always in lockstep: none.", 0, 99
    ),
)


class DiwaNode(LifecycleNode):
    """A lifecycle node. Subclasses give `NAME` and `PARAMETERS` and override `configure`, `activate`, `deactivate`, `cleanup`,
    which raise a DiwaError saying what was expected and what was found when they cannot do their work."""

    NAME = "diwa"
    PARAMETERS: tuple[Parameter, ...] = ()

    def __init__(self, **arguments: object) -> None:
        """Declare parameters. Raises ConfigError when one given at start is out of range."""
        super().__init__(self.NAME, **arguments)
        self.active = False
        self.configured = False
        self.failure: str | None = None
        self._releases: list[Callable[[], object]] = []
        self.parameters = ParameterTable(self, (*COMMON_PARAMETERS, *self.PARAMETERS), lambda: self.configured)
        self.diagnostics = Diagnostics(self)

    def configure(self) -> None:
        """Load models, create publishers and subscriptions."""

    def activate(self) -> None:
        """Start to act."""

    def deactivate(self) -> None:
        """Stop acting; the last message sent is the safe one."""

    def cleanup(self) -> None:
        """Release what `configure` took, so that it can run again."""

    def spin_timeout_s(self) -> float:
        """Longest wait until `tick` is called again, seconds."""
        return SPIN_S

    def tick(self) -> None:
        """Called after every wait of the executor; nodes with a deadline of their own override it."""

    def advertise(self, message_type: type, topic: str, qos: QoSProfile | int) -> Publisher:
        """A publisher that `cleanup` destroys."""
        publisher = self.create_publisher(message_type, topic, qos)
        self._releases.append(lambda: self.destroy_publisher(publisher))
        return publisher

    def listen(self, message_type: type, topic: str, callback: Callable, qos: QoSProfile | int) -> Subscription:
        """A subscription whose callback runs only while the node is active; `cleanup` destroys it."""
        subscription = self.create_subscription(message_type, topic, self.when_active(callback), qos)
        self._releases.append(lambda: self.destroy_subscription(subscription))
        return subscription

    def serve(self, service_type: type, name: str, callback: Callable) -> Service:
        """A service that `cleanup` destroys."""
        service = self.create_service(service_type, name, callback)
        self._releases.append(lambda: self.destroy_service(service))
        return service

    def repeat(self, period_s: float, callback: Callable) -> Timer:
        """A timer, active only with the node, that use_sim_time and clock jumps cannot touch; `cleanup` destroys it."""
        timer = self.create_timer(period_s, self.when_active(callback), clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._releases.append(lambda: self.destroy_timer(timer))
        return timer

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Lifecycle transition; use `configure`."""
        self.configured = True
        result = self._attempt("configure", self.configure)
        if result != TransitionCallbackReturn.SUCCESS:
            self._release()
        self.configured = result == TransitionCallbackReturn.SUCCESS
        return result

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Lifecycle transition; use `activate`."""
        super().on_activate(state)
        result = self._attempt("activate", self.activate)
        self.active = result == TransitionCallbackReturn.SUCCESS
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Lifecycle transition; use `deactivate`."""
        self.active = False
        result = self._attempt("deactivate", self.deactivate)
        super().on_deactivate(state)
        return result

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Lifecycle transition; use `cleanup`."""
        result = self._attempt("clean up", self.cleanup)
        self._release()
        self.configured = False
        return result

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Lifecycle transition from any state."""
        if self.active:
            self.on_deactivate(state)
        if self.configured:
            self.on_cleanup(state)
        return TransitionCallbackReturn.SUCCESS

    def when_active(self, callback: Callable) -> Callable:
        """Wrap a callback so that it does nothing while the node is not active."""

        @functools.wraps(callback)  # rclpy asks for the signature: a second argument is the message's information
        def call(*arguments: object) -> None:
            if self.active:
                callback(*arguments)

        return call

    def start(self) -> None:
        """Configure and activate. Raises DiwaError with the reason when the node refuses."""
        for transition in (self.trigger_configure, self.trigger_activate):
            if transition() != TransitionCallbackReturn.SUCCESS:
                raise DiwaError(self.failure or f"{self.NAME} did not start.")
        self.get_logger().info("active")

    def come_first(self) -> None:
        """Take the real-time priority that was asked for."""
        priority = self.parameters["realtime_priority"]
        in_lockstep = self.has_parameter("mode") and self.get_parameter("mode").value == "lockstep"
        if priority and not in_lockstep and not come_first(priority):
            self.get_logger().info(f"no real-time priority: {priority} is not allowed here ('ulimit -r'); a busy machine delays ticks")

    def stop(self) -> None:
        """Deactivate, clean up and destroy, from whatever state the node is in."""
        if self.configured or self.active:
            self.trigger_shutdown()
        self.destroy_node()

    def _release(self) -> None:
        while self._releases:
            self._releases.pop()()

    def _attempt(self, what: str, action: Callable[[], None]) -> TransitionCallbackReturn:
        try:
            action()
        except DiwaError as error:
            self.failure = f"{self.NAME} cannot {what}: {error}"
        except Exception:
            self.failure = f"{self.NAME} cannot {what}: {traceback.format_exc()}"
        else:
            self.failure = None
            self.diagnostics.report("lifecycle", OK, f"{what}: done")
            return TransitionCallbackReturn.SUCCESS
        self.diagnostics.report("lifecycle", ERROR, self.failure)
        return TransitionCallbackReturn.FAILURE


def spin(node: DiwaNode, should_stop: Callable[[], bool]) -> None:
    """Serve `node` on a single-threaded executor until `should_stop` or the context ends."""
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not should_stop() and rclpy.ok():
            executor.spin_once(timeout_sec=node.spin_timeout_s())
            node.tick()
    except ExternalShutdownException:
        node.get_logger().info("the context was shut down")
    finally:
        executor.remove_node(node)


def run_node(node_class: type[DiwaNode], arguments: list[str] | None = None) -> int:
    """Run one node as a process. Ctrl-C and SIGTERM end it in order; returns 1 when it cannot start or fails."""
    stops: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: stops.append(received))
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    node = None
    try:
        node = node_class()
        if node.parameters["autostart"]:
            node.start()
        prepare_process()
        node.come_first()
        spin(node, lambda: bool(stops))
    except DiwaError as error:
        get_logger(node_class.NAME).fatal(str(error))
        return 1
    finally:
        if node is not None:
            node.stop()
        rclpy.try_shutdown()
    return 0


def prepare_process() -> None:
    """Keep latency even: what lives now is never collected again, and a busy thread gives way after half a millisecond."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(0.0005)
