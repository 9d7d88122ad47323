"""A stand-in for a robot and its cameras: a simulated FR3 behind the real protocol on loopback, the play table round it, faults on request.

It is a simulation in another physics and another renderer than the one the policies were trained in, not a robot (docs/franka.md).
"""

from __future__ import annotations

import sys
import time

import numpy as np
from diwa_interfaces.msg import SimState
from diwa_interfaces.srv import ResetSim
from sensor_msgs.msg import Image

from diwa_core.contract import hold_action
from diwa_core.errors import ConfigError, DiwaError, SetupError
from diwa_core.sim.skills import start_states
from diwa_core.sim.state import SceneState
from diwa_ros.calvin_bridge import STEADY_S, read_start
from diwa_ros.contracts import CONTRACT, read_contract
from diwa_ros.diagnostics import OK, WARN
from diwa_ros.franky_backend import read_robot
from diwa_ros.images import make_image
from diwa_ros.messages import CAMERA, reliable, to_time
from diwa_ros.node import DiwaNode, run_node
from diwa_ros.parameters import Parameter

FAULTS = (
    "none", "reflex", "user_stop", "safety_stop", "reject_motion", "freeze", "link_loss", "mute", "wrong_version", "gripper_abort",
    "camera_frozen", "camera_unplugged",
)  # fmt: skip


class FakeFr3(DiwaNode):
    """Serves the robot on its address; publishes both cameras and, for the oracle, the truth about the scene."""

    NAME = "fake_fr3"
    PARAMETERS = (
        CONTRACT,
        Parameter("robot", "fake_fr3", "The robot's YAML whose address, base and home are played: a name in config/ or a path."),
        Parameter("skill", "", "Skill whose first start state of `seed` the table begins in; empty: everything closed."),
        Parameter("seed", 0, "Seed of that start state.", 0),
        Parameter("fault", "none", "What goes wrong, from now on.", choices=FAULTS, live=True),
    )

    def configure(self) -> None:
        """Build the scene and open the robot's ports. Raises ConfigError or SetupError."""
        self.contract = read_contract(self.parameters["contract"])
        sizes = {(stream.height, stream.width) for stream in self.contract.images}
        if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
            raise ConfigError(f"contract images: expected one square size for all views of the fake FR3, found {sorted(sizes)}.")
        try:
            from diwa_core.sim.fake_robot import FakeRobot, Fault
            from diwa_core.sim.mujoco_table import RayCameras, TableState, add_table
        except ImportError as error:
            raise SetupError(f"{error}. Mend: .venv/bin/pip install -c constraints.txt '.[franka]'") from error
        config = read_robot(self.parameters["robot"])
        self.faults = Fault
        self.fake = FakeRobot(config.address, config.home_joints_rad, config.base_position_m, prepare=add_table)
        self.fake.__enter__()
        simulator = self.fake.simulator
        self.table = TableState(simulator.model, simulator.data)
        self.cameras = RayCameras(simulator.model, self.contract.images[0].height, self.parameters["seed"])
        self.fault, self.tick_number, self.episode, self.first, self.late_at_s = "none", 0, 0, True, 0.0
        self.image_publishers = {stream.name: self.advertise(Image, stream.topic, CAMERA) for stream in self.contract.images}
        self.state_publisher = self.advertise(SimState, "sim/state", reliable(10))
        self.serve(ResetSim, "sim/reset", self.reset)
        self.repeat(self.contract.step_s, self.publish_frame)

    def activate(self) -> None:
        """Put the table into its start."""
        skill = self.parameters["skill"]
        start = start_states(skill, 1, self.parameters["seed"])[0] if skill else SceneState()
        self.fake.world(lambda: self.table.place(start))

    def cleanup(self) -> None:
        """Close the ports."""
        self.fake.__exit__()

    def publish_frame(self) -> None:
        """One frame of both cameras."""
        self.apply_fault(self.parameters["fault"])
        taken: list[tuple] = []

        def take() -> None:
            self.table.update_lights()
            taken.append((np.array(self.fake.simulator.data.qpos), self.table.scene_obs))

        stamp_ns = self.get_clock().now().nanoseconds
        self.fake.world(take)
        positions, scene_obs = taken[0]
        self.tick_number += 1
        self.publish_state(stamp_ns, scene_obs)
        if self.fault != "camera_frozen":
            self.cameras.look(positions)
            self.pictures = {name: self.cameras.view(name) for name in self.image_publishers}
        if self.fault != "camera_unplugged":
            for name, publisher in self.image_publishers.items():
                publisher.publish(make_image(self.pictures[name], stamp_ns, f"camera_{name.removeprefix('rgb_')}"))
        self.report_pace()

    def report_pace(self) -> None:
        """Say when the simulated robot's time falls behind, and when it has kept up for a while again."""
        now_s = time.monotonic()
        if self.fake.late_s > 0:
            self.fake.late_s, self.late_at_s = 0.0, now_s
            self.diagnostics.report("pace", WARN, "the robot's time runs slower than the clock: the machine is too busy")
        elif now_s - self.late_at_s > STEADY_S:
            self.diagnostics.report("pace", OK, "real time")

    def publish_state(self, stamp_ns: int, scene_obs: np.ndarray) -> None:
        """The truth about the scene, for the oracle; the robot knows nothing of it."""
        state = SimState(tick=self.tick_number, episode=self.episode, first_of_episode=self.first, applied_is_hold=True)
        state.header.stamp = to_time(stamp_ns)
        state.applied_action, state.scene_obs = hold_action(1.0), scene_obs
        self.state_publisher.publish(state)
        self.first = False

    def apply_fault(self, fault: str) -> None:
        """Follow the parameter `fault`."""
        if fault == self.fault:
            return
        self.get_logger().warning(f"fault: {fault}")
        if self.fault != "none" and fault != "none":
            self.fake.inject(self.faults.NONE)
        self.fault = fault
        if not fault.startswith("camera"):
            self.fake.inject(self.faults(fault))

    def reset(self, request: ResetSim.Request, response: ResetSim.Response) -> ResetSim.Response:
        """Service sim/reset: put the table into a start state. The arm stays: controller/home moves it."""
        try:
            if not self.active:
                raise ConfigError("sim/reset: expected an active fake FR3, found it inactive. Activate it first.")
            start = read_start(request)
            self.fake.world(lambda: self.table.place(start))
        except DiwaError as error:
            response.success, response.message = False, str(error)
            return response
        self.episode, self.first = self.episode + 1, True
        response.success, response.episode, response.scene_obs = True, self.episode, self.table.scene_obs
        response.message = "the table is reset; call controller/home for the arm"
        return response


def main() -> int:
    """Run the node as a process; returns the exit code."""
    return run_node(FakeFr3)


if __name__ == "__main__":
    sys.exit(main())
