"""The simulated robot and its cameras on the topics of the graph, in real time or in lock-step (docs/architecture.md)."""

from __future__ import annotations

import sys
import time

import numpy as np
from diwa_interfaces.msg import RobotCommand, SimState
from diwa_interfaces.srv import ResetSim
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import Image, JointState

from diwa_core.contract import hold_action
from diwa_core.errors import ConfigError, ContractError, DiwaError
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.skills import start_states
from diwa_core.sim.state import SceneState
from diwa_ros.contracts import CONTRACT, MODE, read_contract
from diwa_ros.diagnostics import OK, WARN
from diwa_ros.images import make_image
from diwa_ros.messages import reliable, to_float64, to_ns, to_pose, to_time
from diwa_ros.node import SPIN_S, DiwaNode, run_node
from diwa_ros.parameters import Parameter

STEADY_S = 5.0  # ticks on time for this long: the clock is well again
RESEND_S = 0.5  # a resting lock-step world sends its tick again, for those who joined late
STREAM_GAP_TICKS = 30  # a pause longer than this is an end of the command stream, not missed ticks


class CalvinBridge(DiwaNode):
    """Steps the play table and publishes every tick. In real time a tick whose command is late is held and counted."""

    NAME = "calvin_bridge"
    PARAMETERS = (
        CONTRACT,
        MODE,
        Parameter("skill", "", "Skill whose first start state of `seed` the simulation begins in; empty: all closed, arm neutral."),
        Parameter("seed", 0, "Seed of that start state.", 0),
        Parameter("step_budget_s", 0.012, "Real time, no commands: stepping and rendering begin this long before a tick.", 0.001, 0.03),
    )

    def configure(self) -> None:
        """Build the simulation. Raises ConfigError when the contract asks for pictures it cannot render."""
        self.contract = read_contract(self.parameters["contract"])
        sizes = {(stream.height, stream.width) for stream in self.contract.images}
        if len(sizes) != 1 or len(set(sizes.pop())) != 1:
            found = ", ".join(f"{s.name} {s.height} x {s.width}" for s in self.contract.images)
            raise ConfigError(f"contract images: expected one square size for all views of the play table, found {found}.")
        self.env = PlayTable(self.contract.images[0].height, tuple(stream.name for stream in self.contract.images))
        self.lockstep = self.parameters["mode"] == "lockstep"
        self.step_ns = round(1e9 / self.contract.rate_hz)
        self.tick_number, self.episode = 0, 0
        self.first_of_episode, self.applied_is_hold = True, True
        self.missed_ticks, self.overslept, self.last_command_tick = 0, 0, None
        image_qos = reliable(5)
        self.image_publishers = {s.name: self.advertise(Image, s.topic, image_qos) for s in self.contract.images}
        self.joint_publisher = self.advertise(JointState, "joint_states", reliable(10))
        self.pose_publisher = self.advertise(PoseStamped, "current_pose", reliable(10))
        self.target_publisher = self.advertise(PoseStamped, "target_pose", reliable(10))
        self.state_publisher = self.advertise(SimState, "sim/state", reliable(10))
        self.listen(RobotCommand, "sim/command", self.take_command, reliable(1))
        self.serve(ResetSim, "sim/reset", self.reset)
        if self.lockstep:
            self.repeat(RESEND_S, self.resend)

    def activate(self) -> None:
        """Publish the first tick."""
        skill = self.parameters["skill"]
        self.env.reset(options={"state": start_states(skill, 1, self.parameters["seed"])[0] if skill else SceneState()})
        self.applied = hold_action(self.env.robot_obs[14])
        self.anchor_ns = self.get_clock().now().nanoseconds
        self.anchor_s, self.anchor_tick = time.monotonic(), self.tick_number
        self.begin_tick()

    def cleanup(self) -> None:
        """Disconnect the physics."""
        self.env.close()

    # -- ticks -------------------------------------------------------------------------------------------------------------------------

    def begin_tick(self) -> None:
        """Observe the world as it is now and publish it as the next tick."""
        self.observation, self.scene_obs = self.env.observation(), self.env.scene_obs
        self.publish_tick()

    def publish_tick(self) -> None:
        """Count and send the prepared observation."""
        self.tick_number += 1
        self.stepped = False
        self.sent_s = time.monotonic()
        if self.lockstep:
            self.stamp_ns = round(self.tick_number * 1e9 / self.contract.rate_hz)
        else:
            self.stamp_ns = self.anchor_ns + (self.tick_number - 1 - self.anchor_tick) * self.step_ns
        self.send()

    def send(self) -> None:
        """Publish everything of the present tick, the state first: the controller relays it."""
        observation, stamp = self.observation, to_time(self.stamp_ns)
        state = SimState(tick=self.tick_number, episode=self.episode, missed_ticks=self.missed_ticks)
        state.header.stamp = stamp
        state.applied_action, state.applied_is_hold = self.applied, self.applied_is_hold
        state.first_of_episode, state.scene_obs = self.first_of_episode, self.scene_obs
        self.state_publisher.publish(state)
        for stream in self.contract.images:
            frame_id = f"camera_{stream.name.removeprefix('rgb_')}"
            self.image_publishers[stream.name].publish(make_image(observation.images[stream.name], self.stamp_ns, frame_id))
        robot_obs = observation.robot_obs
        joints = JointState(name=[*self.contract.arm_joints, *self.contract.finger_joints])
        joints.header.stamp = stamp
        joints.position = to_float64(np.array([*robot_obs[7:14], robot_obs[6] / 2, robot_obs[6] / 2]))
        self.joint_publisher.publish(joints)
        self.pose_publisher.publish(to_pose(robot_obs[:6], self.stamp_ns, "world"))
        self.target_publisher.publish(to_pose(observation.target_pose, self.stamp_ns, "world"))

    def resend(self) -> None:
        """Lock-step at rest: send the tick again; whoever has it ignores the copy."""
        if time.monotonic() - self.sent_s >= RESEND_S:
            self.sent_s = time.monotonic()
            self.send()

    def step(self, action: np.ndarray, is_hold: bool) -> None:
        """Apply one action and prepare the observation of the next tick."""
        self.env.apply(action)
        self.applied, self.applied_is_hold, self.first_of_episode = np.asarray(action, np.float32), is_hold, False
        self.observation, self.scene_obs = self.env.observation(), self.env.scene_obs
        self.stepped = True

    def take_command(self, message: RobotCommand) -> None:
        """Apply a command for the present tick; one for another tick is too late or from before a reset."""
        self.count_missed(to_ns(message.header.stamp))
        if to_ns(message.header.stamp) != self.stamp_ns or self.stepped:
            return
        action = hold_action(message.action[6]) if message.hold else message.action
        try:
            self.step(action, message.hold)
        except ContractError as error:
            self.diagnostics.report("sim/command", WARN, f"refused: {error}")
            return
        self.diagnostics.report("sim/command", OK, "accepted")
        if self.lockstep:
            self.publish_tick()

    def count_missed(self, stamp_ns: int) -> None:
        """A gap in the stamps of a command stream, or a command whose tick has passed, is a missed tick."""
        last, self.last_command_tick = self.last_command_tick, stamp_ns
        if self.lockstep or last is None:
            return
        gap = round((stamp_ns - last) / self.step_ns) - 1
        late = stamp_ns < self.stamp_ns or self.stepped
        self.missed_ticks += late + (gap if 0 < gap < STREAM_GAP_TICKS else 0)

    # -- real time ---------------------------------------------------------------------------------------------------------------------

    def deadline_s(self) -> float:
        """Monotonic time at which the next tick is due."""
        return self.anchor_s + (self.tick_number - self.anchor_tick) * self.contract.step_s

    def patience_s(self) -> float:
        """Monotonic time until which a command is awaited: the next tick in a stream of commands, earlier at rest (even pictures)."""
        streaming = self.last_command_tick is not None and self.stamp_ns - self.last_command_tick < STREAM_GAP_TICKS * self.step_ns
        return self.deadline_s() - (0.0 if streaming else self.parameters["step_budget_s"])

    def spin_timeout_s(self) -> float:
        """Until the next tick, or until the arm must be held for want of a command."""
        if self.lockstep_or_resting():
            return SPIN_S
        due_s = self.deadline_s() if self.stepped else self.patience_s()
        return min(SPIN_S, max(0.0, due_s - time.monotonic()))

    def tick(self) -> None:
        """Real time: hold when no command came, publish when the tick is due, and begin a new clock when a tick was overslept."""
        if self.lockstep_or_resting():
            return
        now_s = time.monotonic()
        if not self.stepped and now_s >= self.patience_s():
            self.step(hold_action(self.applied[6]), is_hold=True)
            now_s = time.monotonic()
        late_s = now_s - self.deadline_s()
        if self.stepped and late_s >= 0:
            if late_s > self.contract.step_s:
                self.restart_clock(now_s)
            elif now_s - self.anchor_s > STEADY_S:
                self.diagnostics.report("clock", OK, "ticks are on time", missed_ticks=self.missed_ticks)
            self.publish_tick()

    def restart_clock(self, now_s: float) -> None:
        """A tick was overslept: count periods from now, so that stamps stay true."""
        self.anchor_ns, self.anchor_s, self.anchor_tick = self.get_clock().now().nanoseconds, now_s, self.tick_number
        self.overslept += 1
        self.diagnostics.report("clock", WARN, "a tick was late by more than a period: the machine is too slow", overslept=self.overslept)

    def lockstep_or_resting(self) -> bool:
        """Whether the clock drives nothing now."""
        return not self.active or self.lockstep

    # -- reset -------------------------------------------------------------------------------------------------------------------------

    def reset(self, request: ResetSim.Request, response: ResetSim.Response) -> ResetSim.Response:
        """Service sim/reset: put the scene into a start state; the next tick is the first of a new episode."""
        try:
            if not self.active:
                raise ConfigError("sim/reset: expected an active bridge, found it inactive. Activate it first.")
            self.env.reset(options={"state": read_start(request)})
        except DiwaError as error:
            response.success, response.message = False, str(error)
            return response
        self.episode += 1
        self.first_of_episode, self.applied_is_hold, self.last_command_tick = True, True, None
        self.applied = hold_action(self.env.robot_obs[14])
        self.observation, self.scene_obs, self.stepped = self.env.observation(), self.env.scene_obs, True
        if self.lockstep:
            self.publish_tick()
        response.success, response.message, response.episode = True, "reset", self.episode
        response.scene_obs = self.scene_obs
        return response


def read_start(request: ResetSim.Request) -> SceneState:
    """The start state a ResetSim request names. Raises ConfigError or ContractError."""
    if len(request.state) == 0:
        if request.index < 0 or request.seed < 0:
            raise ConfigError(f"sim/reset: expected index and seed of 0 or more, found {request.index} and {request.seed}.")
        return start_states(request.skill, request.index + 1, request.seed, request.split or "evaluation")[request.index]
    values = np.array(request.state, dtype=np.float64)
    if values.shape != (39,) or not np.isfinite(values).all():
        raise ContractError(f"sim/reset state: expected 39 finite values (robot_obs, scene_obs), found {values.shape}.")
    robot, scene = values[:15], values[15:]
    slider, drawer, switch = float(scene[0]), float(scene[1]), float(scene[3])
    return SceneState(robot[:6], float(robot[14]), slider, drawer, switch, bool(scene[5]), scene[6:].reshape(3, 6))


def main() -> int:
    """Run the node as a process; returns the exit code."""
    return run_node(CalvinBridge)


if __name__ == "__main__":
    sys.exit(main())
