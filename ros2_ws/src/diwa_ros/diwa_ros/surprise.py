"""What the controller makes of the world-model monitor's alarms; no ROS in here. Times are seconds on a monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diwa_core.control.limits import Clamp
from diwa_ros.gate import Command

SLOW, HOLD, IGNORE = "slow", "hold", "ignore"
ON_SURPRISE = (SLOW, HOLD, IGNORE)


@dataclass
class SurpriseRule:
    """The world model is surprised from an alarm until `clear_s` after the last one.

    slow: motions are scaled by `speed` meanwhile, and it ends by itself. hold: the arm is held until controller/resume.
    """

    reaction: str = SLOW
    speed: float = 0.3
    clear_s: float = 1.0
    alarm_s: float | None = None  # when the last alarm came
    worst: str = ""

    def hear(self, alarm: bool, worst: str, now_s: float) -> None:
        """A verdict of the monitor; what was worst at the first alarm names the surprise."""
        if not alarm:
            return
        if not self.is_surprised(now_s):
            self.worst = worst
        self.alarm_s = now_s

    def forget(self) -> None:
        """The scene was reset: what surprised before is over."""
        self.alarm_s = None

    def is_surprised(self, now_s: float) -> bool:
        """Whether an alarm was heard within the last `clear_s`."""
        return self.alarm_s is not None and now_s - self.alarm_s <= self.clear_s

    def holds(self, now_s: float) -> bool:
        """Whether the arm must not move."""
        return self.reaction == HOLD and self.is_surprised(now_s)

    def reason(self, now_s: float) -> str:
        """Why the arm is slowed or held; empty while the world model is not surprised."""
        if not self.is_surprised(now_s):
            return ""
        what = f"slowed to {100 * self.speed:.0f} %: " if self.reaction == SLOW else ""
        return f"{what}the world model is surprised ({self.worst})"

    def slow_down(self, command: Command, now_s: float) -> Command:
        """The command with its motion scaled while the world model is surprised and the reaction is to slow; the gripper stays."""
        if self.reaction != SLOW or command.hold or not self.is_surprised(now_s):
            return command
        action = command.action.copy()
        action[:6] *= self.speed
        return replace(command, action=action, clamps=command.clamps | int(Clamp.SURPRISE))
