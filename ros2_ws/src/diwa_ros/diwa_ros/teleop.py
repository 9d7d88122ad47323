"""Teleoperation for play: keyboard or sensor_msgs/Joy to actions through the controller's gate, and the operator's marks.

The same node drives the simulation and the arm. Its clock is executed_action, which the controller sends once for every tick.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty

from diwa_interfaces.msg import ActionChunk, EpisodeMark, ExecutedAction
from sensor_msgs.msg import Joy

from diwa_core.errors import ConfigError
from diwa_ros.contracts import CONTRACT, read_contract
from diwa_ros.diagnostics import ERROR, OK
from diwa_ros.messages import reliable, to_ns
from diwa_ros.node import DiwaNode, run_node
from diwa_ros.parameters import Parameter
from diwa_ros.pilot import HELP, JoyPilot, KeyPilot, load_joy_map
from diwa_ros.teleop_stream import OperatorStream

KEYS_S = 0.01  # how often the terminal is read


class Teleop(DiwaNode):
    """Commands one step per tick while the dead-man is held. Letting go, silence of the joystick or the end of the node holds the arm."""

    NAME = "teleop"
    PARAMETERS = (
        CONTRACT,
        Parameter("source", "joy", "keyboard: keys of this terminal; joy: the topic joy.", choices=("keyboard", "joy")),
        Parameter("joy_map", "gamepad", "gamepad, spacemouse, or a YAML file of diwa_ros.pilot.JoyMap."),
        Parameter("speed", 0.5, "Share of full speed.", 0.05, 1.0),
        Parameter("key_hold_s", 0.2, "How long one key press counts: the dead-man of the keyboard.", 0.05, 0.5),
        Parameter("joy_timeout_s", 0.3, "A joystick silent for so long has let go.", 0.05, 1.0),
        Parameter("skill", "", "What is being shown; recorded with every action and mark.", live=True),
    )

    def configure(self) -> None:
        """Raises ConfigError on an unknown joystick map, or a keyboard that is no terminal."""
        values = self.parameters
        self.terminal: list | None = None
        if values["source"] == "keyboard":
            if not sys.stdin.isatty():
                raise ConfigError("source keyboard: expected a terminal, found none. Start the node in one: python -m diwa_ros.teleop.")
            self.pilot: KeyPilot | JoyPilot = KeyPilot(values["speed"], values["key_hold_s"])
        else:
            self.pilot = JoyPilot(load_joy_map(values["joy_map"]), values["speed"], values["joy_timeout_s"])
            self.listen(Joy, "joy", self.take_joy, reliable(5))
        self.stream = OperatorStream(self.advertise(ActionChunk, "action_chunk", reliable(5)), read_contract(values["contract"]))
        self.mark_publisher = self.advertise(EpisodeMark, "episode_mark", reliable(10))
        self.listen(ExecutedAction, "executed_action", self.take_executed, reliable(10))

    def activate(self) -> None:
        """Take the terminal."""
        if self.parameters["source"] == "keyboard":
            self.terminal = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
            print(HELP, flush=True)

    def deactivate(self) -> None:
        """Let go of the arm and give the terminal back."""
        self.stream.end()
        if self.terminal is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.terminal)
            self.terminal = None

    def spin_timeout_s(self) -> float:
        """A terminal wants to be read often."""
        return KEYS_S if self.terminal is not None else super().spin_timeout_s()

    def tick(self) -> None:
        """Read the keys, send the marks, and let go at once when the operator has."""
        if not self.active:
            return
        while self.terminal is not None and select.select([sys.stdin], [], [], 0)[0]:
            for key in os.read(sys.stdin.fileno(), 64).decode(errors="replace"):  # sys.stdin would read ahead, and select not know
                self.pilot.press(key, time.monotonic())
        for outcome in self.pilot.pop_marks():
            mark = EpisodeMark(outcome=outcome, skill=self.parameters["skill"], source="operator")
            mark.header.stamp = self.get_clock().now().to_msg()
            self.mark_publisher.publish(mark)
            self.get_logger().info(f"marked: {outcome}")
        if self.pilot.intent(time.monotonic()) is None:
            self.stream.end()

    def take_joy(self, message: Joy) -> None:
        """The joystick; one that does not fit the map moves nothing."""
        try:
            self.pilot.take(message.axes, message.buttons, time.monotonic())
        except ConfigError as error:
            self.diagnostics.report("joy", ERROR, str(error))
            return
        self.diagnostics.report("joy", OK, "read")

    def take_executed(self, message: ExecutedAction) -> None:
        """The controller is at a new tick: the end of the step that it reports."""
        action = self.pilot.intent(time.monotonic())
        if action is not None:
            self.stream.send(to_ns(message.header.stamp) + self.stream.step_ns, action, self.parameters["skill"])


def main() -> int:
    """Run the node as a process; returns the exit code."""
    return run_node(Teleop)


if __name__ == "__main__":
    sys.exit(main())
