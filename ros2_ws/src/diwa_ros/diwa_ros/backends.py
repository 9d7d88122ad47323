"""What the controller drives: the simulated robot on the bridge's topics, or nothing at all (dry run)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from diwa_interfaces.msg import RobotCommand, SimState
from geometry_msgs.msg import PoseStamped
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import JointState

from diwa_core.contract import Contract, hold_action
from diwa_core.control.limits import Clamp
from diwa_ros.gate import Command, State
from diwa_ros.messages import reliable, to_float64, to_ns, to_pose, to_time
from diwa_ros.node import DiwaNode

START_POSE = np.array([0.0259, -0.2313, 0.5713, 3.0905, -0.0291, 1.5001])  # of the dry run, m and rad
START_JOINTS = (-1.2178, 1.0399, 2.1198, -2.3421, -0.8702, 1.6412, 0.5534)
OPEN_WIDTH_M = 0.08


@dataclass(frozen=True)
class Tick:
    """A robot asks for a command. stamp_ns: of the tick; executed: float32 [7], applied over the step that ended at the tick."""

    stamp_ns: int
    executed: np.ndarray
    executed_is_hold: bool
    first_of_episode: bool


class Backend:
    """A robot. It calls `on_tick` whenever it wants a command and takes at most one `send` for each tick."""

    LIMITS_MOTION = False  # it keeps the robot's limits itself, on every pose it commands; otherwise the controller does, on every action

    def send(self, stamp_ns: int, command: Command) -> Clamp:
        """Carry out `command` from `stamp_ns` on, for one step; returns what limits of its own changed of it."""
        raise NotImplementedError

    def condition(self) -> tuple[State, str] | None:
        """State and reason when the robot itself cannot take commands, None when it can."""
        return None

    def stop(self) -> None:
        """Bring the robot to rest now; without commands it rests anyway."""

    def resume(self) -> None:
        """Go on after a stop. Raises GateError while the robot does not allow it."""

    def close(self) -> None:
        """Let the robot go."""


class CalvinBackend(Backend):
    """The simulated robot behind calvin_bridge."""

    def __init__(self, node: DiwaNode, contract: Contract, on_tick: Callable[[Tick], None]) -> None:
        self.on_tick = on_tick
        self.publisher = node.advertise(RobotCommand, "sim/command", reliable(1))
        node.listen(SimState, "sim/state", self.take_state, reliable(10))

    def take_state(self, message: SimState) -> None:
        """A tick of the bridge."""
        executed = np.array(message.applied_action, np.float32)
        self.on_tick(Tick(to_ns(message.header.stamp), executed, message.applied_is_hold, message.first_of_episode))

    def send(self, stamp_ns: int, command: Command) -> Clamp:
        """Publish sim/command."""
        message = RobotCommand(action=command.action, hold=command.hold)
        message.header.stamp = to_time(stamp_ns)
        self.publisher.publish(message)
        return Clamp.NONE


class DryRunBackend(Backend):
    """No robot: a target that follows every command exactly, to try a policy on live cameras."""

    def __init__(self, node: DiwaNode, contract: Contract, on_tick: Callable[[Tick], None]) -> None:
        self.node, self.contract, self.on_tick = node, contract, on_tick
        self.pose = START_POSE.copy()
        self.executed, self.executed_is_hold = hold_action(1.0), True
        self.first = True
        self.joint_publisher = node.advertise(JointState, "joint_states", reliable(10))
        self.pose_publisher = node.advertise(PoseStamped, "current_pose", reliable(10))
        self.target_publisher = node.advertise(PoseStamped, "target_pose", reliable(10))
        node.repeat(contract.step_s, self.begin_tick)

    def begin_tick(self) -> None:
        """Publish where the arm would be, and ask for the next command."""
        stamp_ns = self.node.get_clock().now().nanoseconds
        joints = JointState(name=[*self.contract.arm_joints, *self.contract.finger_joints])
        joints.header.stamp = to_time(stamp_ns)
        finger_m = OPEN_WIDTH_M / 2 if self.executed[6] > 0 else 0.0
        joints.position = to_float64(np.array([*START_JOINTS, finger_m, finger_m]))
        self.joint_publisher.publish(joints)
        self.pose_publisher.publish(to_pose(self.pose, stamp_ns, "world"))
        self.target_publisher.publish(to_pose(self.pose, stamp_ns, "world"))
        tick = Tick(stamp_ns, self.executed, self.executed_is_hold, self.first)
        self.first, self.executed, self.executed_is_hold = False, hold_action(self.executed[6]), True
        self.on_tick(tick)

    def send(self, stamp_ns: int, command: Command) -> Clamp:
        """Integrate the command on the target."""
        self.executed, self.executed_is_hold = command.action, command.hold
        if command.hold:
            self.executed = hold_action(command.action[6])
            return Clamp.NONE
        self.pose[:3] += command.action[:3] * self.contract.max_delta_m
        euler = self.pose[3:] + command.action[3:6] * self.contract.max_delta_rad
        self.pose[3:] = Rotation.from_euler("xyz", euler).as_euler("xyz")
        return Clamp.NONE


BACKENDS = {"calvin": CalvinBackend, "dry_run": DryRunBackend}
