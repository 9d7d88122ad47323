"""Named checks of a node on /diagnostics: once a second, and at once when one changes; the log speaks only on such edges."""

from __future__ import annotations

from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from diwa_ros.messages import reliable

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


@dataclass
class Check:
    """Last known state of one named check."""

    level: bytes
    message: str
    values: dict[str, object] = field(default_factory=dict)


class Diagnostics:
    """Collects the checks of `node`; `report` publishes and logs on an edge, a steady timer publishes everything at 1 Hz."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.checks: dict[str, Check] = {}
        self.publisher = node.create_publisher(DiagnosticArray, "/diagnostics", reliable(10))
        self.timer = node.create_timer(1.0, self.publish, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def report(self, name: str, level: bytes, message: str, **values: object) -> None:
        """Set check `name`. Keep `message` free of changing numbers (they go to `values`): a new level or message is an edge."""
        previous = self.checks.get(name)
        self.checks[name] = Check(level, message, values)
        if previous and (previous.level, previous.message) == (level, message):
            return
        if previous is None and level == OK:
            return
        self._log(name, level, message)
        self.publish()

    def is_ok(self, name: str) -> bool:
        """True unless the last report of `name` was a warning or an error."""
        return name not in self.checks or self.checks[name].level == OK

    def publish(self) -> None:
        """Send all checks now."""
        message = DiagnosticArray()
        message.header.stamp = self.node.get_clock().now().to_msg()
        for name, check in self.checks.items():
            values = [KeyValue(key=key, value=str(value)) for key, value in check.values.items()]
            status = DiagnosticStatus(level=check.level, name=f"{self.node.get_name()}: {name}", message=check.message, values=values)
            message.status.append(status)
        self.publisher.publish(message)

    def _log(self, name: str, level: bytes, message: str) -> None:
        logger = self.node.get_logger()
        if level == OK:
            logger.info(f"{name}: {message}")
        elif level == WARN:
            logger.warning(f"{name}: {message}")
        else:
            logger.error(f"{name}: {message}")
