"""A Franka as the controller's robot: actions become a target pose that the arm's own thread streams; what it says becomes topics.

No callback in here calls franky: arm and hand have threads of their own, which are told and asked (diwa_core.control.franka_arm).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from geometry_msgs.msg import PoseStamped, WrenchStamped
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger

from diwa_core.contract import Contract, hold_action
from diwa_core.control.franka_arm import STALE_S, ArmState, FrankaArm, Phase
from diwa_core.control.franka_hand import FrankaHand
from diwa_core.control.limits import Clamp
from diwa_core.control.robot_config import RobotConfig, load_robot_config
from diwa_core.control.target import TargetIntegrator
from diwa_core.data.messages import to_euler
from diwa_core.errors import GateError
from diwa_ros.backends import Backend, Tick
from diwa_ros.diagnostics import ERROR, OK, WARN
from diwa_ros.gate import Command, State
from diwa_ros.graph import config_folder
from diwa_ros.messages import reliable, to_float64, to_pose, to_time
from diwa_ros.node import DiwaNode

REPORT_S = 0.5
STATES = {
    Phase.CONNECTING: State.CONNECTING,
    Phase.DISCONNECTED: State.DISCONNECTED,
    Phase.HOMING: State.HOLD,
    Phase.RECOVERING: State.REFLEX,
    Phase.REFLEX: State.REFLEX,
    Phase.USER_STOPPED: State.USER_STOPPED,
    Phase.FAULT: State.FAULT,
}


class FrankyBackend(Backend):
    """A Franka arm and hand through franky. It asks for commands while the arm is ready, and keeps the robot's own limits of motion."""

    LIMITS_MOTION = True

    def __init__(self, node: DiwaNode, contract: Contract, on_tick: Callable[[Tick], None]) -> None:
        """Begin to connect. Raises ConfigError on a robot's YAML with mistakes."""
        self.node, self.contract, self.on_tick = node, contract, on_tick
        self.config = read_robot(node.parameters["robot"])
        self.integrator = TargetIntegrator(self.config, contract)
        self.arm = FrankaArm(self.config)
        self.hand = FrankaHand(self.config) if self.config.gripper.present else None
        self.executed, self.executed_is_hold, self.first = hold_action(1.0), True, True
        self.published: ArmState | None = None
        self.stamp_ns = 0  # of that state
        self.refusals: str | None = None  # why too many steps in a row were cut
        self.joint_publisher = node.advertise(JointState, "joint_states", reliable(10))
        self.pose_publisher = node.advertise(PoseStamped, "current_pose", reliable(10))
        self.target_publisher = node.advertise(PoseStamped, "target_pose", reliable(10))
        self.wrench_publisher = node.advertise(WrenchStamped, "external_wrench_in_base_frame", reliable(10))
        for name in ("recover", "home"):
            node.serve(Trigger, f"controller/{name}", self.make_service(name))
        node.repeat(contract.step_s, self.begin_tick)
        node.repeat(1.0 / self.config.state_hz, self.publish_state)
        node.repeat(REPORT_S, self.report)
        self.arm.start()
        if self.hand is not None:
            self.hand.start()

    def close(self) -> None:
        """Bring the arm to rest and end the threads."""
        self.arm.close()
        if self.hand is not None:
            self.hand.close()

    # -- commands ----------------------------------------------------------------------------------------------------------------------

    def begin_tick(self) -> None:
        """Ask for the next command while the arm can carry one out."""
        if self.condition() is not None:
            self.executed, self.executed_is_hold = hold_action(self.executed[6]), True
            return
        tick = Tick(self.now_ns(), self.executed, self.executed_is_hold, self.first)
        self.first, self.executed, self.executed_is_hold = False, hold_action(self.executed[6]), True
        self.on_tick(tick)

    def send(self, stamp_ns: int, command: Command) -> Clamp:
        """Move the target and be there one step from now; the arm's thread makes a smooth path of it."""
        state = self.arm.state
        if state is None or self.condition() is not None:
            return Clamp.NONE
        action, clamps = hold_action(command.action[6]), Clamp.NONE
        measured = self.to_world(state.pose)
        if self.arm.commanded is None:
            self.integrator.start(measured)
        if not command.hold:
            action, clamps = self.integrator.apply(command.action, measured, state.joints)
        if not command.hold or self.arm.commanded is not None:
            self.arm.aim(self.integrator.to_coordinates(self.integrator.target), time.monotonic() + self.contract.step_s)
        if self.hand is not None:
            self.hand.ask(command.action[6] > 0)
        if self.integrator.in_a_row >= self.config.stop_after_refusals:
            self.refusals = f"{self.integrator.in_a_row} steps in a row met a limit ({clamps.name}); call controller/resume"
            self.stop()
        self.executed, self.executed_is_hold = action, command.hold
        return clamps

    def stop(self) -> None:
        """Bring the arm to rest now; the robot then holds itself."""
        self.arm.request("stop")
        if self.hand is not None:
            self.hand.forget()

    def resume(self) -> None:
        """Go on after a stop, from where the arm is. Raises GateError while the robot itself does not allow it."""
        self.arm.request("resume")
        self.refusals = None
        self.integrator.in_a_row = 0

    def make_service(self, name: str) -> Callable:
        """Services controller/recover and controller/home: they begin it, controller/status tells how it goes."""

        def serve(request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            if not self.node.active:
                response.message = f"controller/{name}: expected an active node, found it inactive."
                return response
            try:
                self.arm.request(name)
            except GateError as error:
                response.message = str(error)
                return response
            response.success, response.message = True, f"{name}: begun; controller/status tells how it goes"
            return response

        return serve

    # -- what the robot says -----------------------------------------------------------------------------------------------------------

    def condition(self) -> tuple[State, str] | None:
        """State and reason when the robot cannot take commands, None when it can."""
        phase, reason = self.arm.phase, self.arm.reason
        if phase in STATES:
            return STATES[phase], reason
        if self.arm.age_s > STALE_S:
            return State.DISCONNECTED, "the robot sends no new states"
        return None if self.refusals is None else (State.FAULT, self.refusals)

    def publish_state(self) -> None:
        """Joints, poses and wrench, as long as the robot sends them."""
        state = self.arm.state
        if state is None or state is self.published or self.arm.age_s > STALE_S:
            return
        self.published = state
        # The two clocks are not read at once: on a busy machine a later state could seem the older one.
        stamp_ns = self.stamp_ns = max(self.now_ns() - round(self.arm.age_s * 1e9), self.stamp_ns + 1)
        measured = self.to_world(state.pose)
        streaming = self.arm.commanded is not None
        finger_m = (self.hand.width_m if self.hand is not None else 0.0) / 2
        joints = JointState(name=[*self.contract.arm_joints, *self.contract.finger_joints])
        joints.header.stamp = to_time(stamp_ns)
        joints.position = to_float64(np.array([*state.joints, finger_m, finger_m]))
        joints.velocity = to_float64(np.array([*state.velocities, 0.0, 0.0]))
        joints.effort = to_float64(np.array([*state.torques, 0.0, 0.0]))
        self.joint_publisher.publish(joints)
        self.pose_publisher.publish(to_pose(measured, stamp_ns, "world"))
        self.target_publisher.publish(to_pose(self.integrator.target if streaming else measured, stamp_ns, "world"))
        wrench = WrenchStamped()
        wrench.header.stamp, wrench.header.frame_id = to_time(stamp_ns), "base"
        force, torque = wrench.wrench.force, wrench.wrench.torque
        force.x, force.y, force.z, torque.x, torque.y, torque.z = map(float, state.wrench)
        self.wrench_publisher.publish(wrench)

    def report(self) -> None:
        """Diagnostics: what the robot and the gripper are doing, and how even the streaming is."""
        arm, state = self.arm, self.arm.state
        condition = self.condition()
        level = OK if condition is None else WARN if condition[0] in (State.HOLD, State.CONNECTING) else ERROR
        values: dict[str, object] = {"address": self.config.address, "streaming": self.config.streaming, "recoveries": arm.recoveries}
        if state is not None:
            values |= {"mode": state.mode, "success_rate": f"{state.success_rate:.2f}", "state_age_ms": f"{arm.age_s * 1e3:.0f}"}
        if arm.periods_late_s:
            values["late_ms_p99"] = f"{np.percentile(list(arm.periods_late_s), 99) * 1e3:.1f}"
        self.node.diagnostics.report("robot", level, f"{arm.phase.value}: {arm.reason}", **values)
        self.node.diagnostics.report("limits", OK, "steps cut or refused, by limit", **self.integrator.counts)
        if self.hand is not None:
            problem = self.hand.problem
            self.node.diagnostics.report("gripper", WARN if problem else OK, problem or "works", width_m=f"{self.hand.width_m:.3f}")

    def to_world(self, pose: np.ndarray) -> np.ndarray:
        """xyz and quaternion in the base frame [7] -> xyz and euler in the world [6]."""
        base = self.config.base_in_world
        turn = base[:3, :3] @ Rotation.from_quat(pose[3:]).as_matrix()
        return np.concatenate([(base @ np.append(pose[:3], 1.0))[:3], to_euler(turn)])

    def now_ns(self) -> int:
        """ROS time."""
        return self.node.get_clock().now().nanoseconds


def read_robot(name_or_path: str) -> RobotConfig:
    """A robot's YAML by the name of a file in config/ ('robot', 'fake_fr3', also with dashes) or by its path. Raises ConfigError."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = config_folder() / f"{name_or_path.replace('-', '_')}.yaml"
    return load_robot_config(path)
