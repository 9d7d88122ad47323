"""The world-model monitor in the graph: what encoder, controller and recorder make of a surprise, and faults in the running graph."""

import array
import os

import numpy as np
import pytest
import torch
from diwa_interfaces.msg import ExecutedAction, Surprise
from fault_matrix import Fault
from fault_rig import ALONG, START_X_M, SimulationRig, make_fault_checkpoints
from rclpy.parameter import Parameter
from ros_support import Probe, make_checkpoints, private_graph
from std_srvs.srv import Trigger
from test_ros_nodes import Robot, Simulation

from diwa_core.errors import DiwaError
from diwa_core.sim.play_table import PlayTable
from diwa_core.sim.state import SceneState
from diwa_core.world_model.filter import LatentFilter
from diwa_core.world_model.monitor import HORIZONS, MIN_DEVIATION, Calibration, OpenLoops, group_errors, list_groups, to_tuples
from diwa_ros.encoder import Encoder
from diwa_ros.franka_controller import FrankaController
from diwa_ros.gate import Command
from diwa_ros.graph import load_graph
from diwa_ros.messages import from_floats, reliable
from diwa_ros.surprise import SurpriseRule

PATIENCE_S = 60.0
WARN = b"\x01"


@pytest.fixture(scope="module", autouse=True)
def ros():
    with private_graph():
        yield


@pytest.fixture
def start():
    """Start a node of this process with parameters beside a probe; both end with the test."""
    probe, nodes = Probe(), []

    def start_node(node_class, **parameters):
        node = node_class(parameter_overrides=[Parameter(name, value=value) for name, value in parameters.items()])
        nodes.append(node)
        probe.add(node)
        node.start()
        return node, probe

    yield start_node
    for node in nodes:
        probe.executor.remove_node(node)
        node.stop()
    probe.close()


# -- the rule --------------------------------------------------------------------------------------------------------------------------


def test_a_slowed_command_keeps_its_gripper_and_ends_by_itself():
    rule = SurpriseRule("slow", speed=0.25, clear_s=1.0)
    command = Command(np.array([1, -1, 0.5, 0, 0, 0.2, -1], np.float32), False, 0, "p", 1)
    assert rule.slow_down(command, 0.0) is command and rule.reason(0.0) == ""
    rule.hear(True, "rgb_static, 4 ahead", 10.0)
    rule.hear(True, "arm, 1 ahead", 10.5)
    rule.hear(False, "", 11.0)
    slowed = rule.slow_down(command, 11.0)
    np.testing.assert_allclose(slowed.action, [0.25, -0.25, 0.125, 0, 0, 0.05, -1])
    assert slowed.clamps == 1 | 128
    assert rule.reason(11.0) == "slowed to 25 %: the world model is surprised (rgb_static, 4 ahead)"
    assert rule.slow_down(command, 11.6) is command and not rule.reason(11.6)
    rule.hear(True, "arm, 1 ahead", 12.0)
    rule.forget()
    assert rule.slow_down(command, 12.0) is command


@pytest.mark.parametrize("reaction", ["hold", "ignore"])
def test_other_reactions_leave_commands_alone(reaction):
    rule = SurpriseRule(reaction)
    rule.hear(True, "arm, 1 ahead", 0.0)
    command = Command(np.ones(7, np.float32), False, 0, "p", 0)
    assert rule.slow_down(command, 0.0) is command and rule.holds(0.0) == (reaction == "hold")


# -- controller ------------------------------------------------------------------------------------------------------------------------


class Alarm:
    """Publishes verdicts of a monitor while `on`."""

    def __init__(self, probe):
        self.publisher, self.on = probe.node.create_publisher(Surprise, "world_model/surprise", reliable(10)), False
        self.timer = probe.node.create_timer(0.05, self.publish)
        probe.until(self.publisher.get_subscription_count, PATIENCE_S)

    def publish(self):
        if self.on:
            self.publisher.publish(Surprise(calibrated=True, alarm=True, score=2.0, worst="rgb_static, 4 ahead"))


def run_controller(start, **parameters):
    """A controller in lock-step, so that no silence of a slow machine counts, with a pretended bridge, policy and monitor."""
    node, probe = start(FrankaController, mode="lockstep", command_sources=f"probe_{os.getpid()}", surprise_clear_s=0.5, **parameters)
    return Simulation(node, probe), Alarm(probe)


def step(simulation):
    """One tick, and the command that answers it."""
    count = len(simulation.commands)
    simulation.tick(action=np.zeros(7, np.float32))
    simulation.chunk()
    simulation.probe.until(lambda: len(simulation.commands) > count, PATIENCE_S)
    return simulation.commands[-1].action


def test_surprise_slows_the_arm_and_says_so_until_it_is_over(start):
    simulation, alarm = run_controller(start, on_surprise="slow", surprise_speed=0.3)
    probe = simulation.probe
    assert step(simulation)[0] == 0.5
    alarm.on = True
    probe.until(lambda: "slowed to 30 %: the world model is surprised (rgb_static, 4 ahead)" in simulation.statuses[-1].reason, PATIENCE_S)
    assert step(simulation)[0] == pytest.approx(0.15) and simulation.state == "ACTIVE"
    simulation.tick(action=np.zeros(7, np.float32))
    probe.until(lambda: simulation.executed[-1].clamps & 128, PATIENCE_S)
    assert simulation.executed[-1].source == ExecutedAction.SOURCE_POLICY
    assert probe.diagnostics["franka_controller: surprise"][0] == WARN
    alarm.on = False
    probe.until(lambda: simulation.statuses[-1].reason == "a policy is running", PATIENCE_S)
    assert step(simulation)[0] == 0.5


def test_surprise_holds_the_arm_until_it_is_over_and_somebody_resumes(start):
    simulation, alarm = run_controller(start, on_surprise="hold")
    probe = simulation.probe
    step(simulation)
    alarm.on = True
    probe.until(lambda: simulation.state == "FAULT", PATIENCE_S)
    assert "surprised (rgb_static, 4 ahead); call controller/resume" in simulation.statuses[-1].reason
    count = len(simulation.commands)
    for _ in range(3):
        simulation.tick()
        simulation.chunk()
        probe.spin(0.05)
    assert len(simulation.commands) == count
    refused = probe.call(Trigger, "controller/resume", timeout_s=PATIENCE_S)
    assert not refused.success and "surprised" in refused.message
    alarm.on = False
    probe.until(lambda: probe.diagnostics["franka_controller: surprise"][0] != WARN, PATIENCE_S)
    assert probe.call(Trigger, "controller/resume", timeout_s=PATIENCE_S).success
    assert step(simulation)[0] == 0.5


def test_what_happens_while_the_arm_rests_is_nobodys_business(start):
    simulation, alarm = run_controller(start, on_surprise="hold")
    alarm.on = True
    simulation.probe.spin(0.5)
    alarm.on = False
    simulation.probe.spin(1.0)
    assert step(simulation)[0] == 0.5
    simulation.probe.until(lambda: simulation.state == "ACTIVE", PATIENCE_S)
    assert "FAULT" not in {status.state_name for status in simulation.statuses}


# -- encoder ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def write_calibration(path, checkpoints, limit, identity=None):
    latent_filter = LatentFilter.load(checkpoints / "world_model")
    groups, size = tuple(list_groups(latent_filter.model)), latent_filter.model.embedding_size
    row = ((1.0,) * size,) * len(HORIZONS)
    limits = ((limit,) * len(groups),) * len(HORIZONS)
    Calibration(identity or latent_filter.identity, HORIZONS, groups, row, limits, 3, 1.0).save(path)
    return str(path)


def run_encoder(start, checkpoints, ticks, **parameters):
    node, probe = start(Encoder, world_model=str(checkpoints / "world_model"), mode="lockstep", frozen_frames=100, **parameters)
    verdicts = probe.hear(Surprise, "world_model/surprise")
    probe.until(lambda: node.surprise_publisher.get_subscription_count() > 0, PATIENCE_S)
    robot = Robot(probe)
    for count in range(1, ticks + 1):
        robot.tick()
        probe.until(lambda count=count: len(verdicts) == count, PATIENCE_S)
    return node, probe, verdicts


def test_encoder_without_a_calibration_publishes_errors_and_judges_nothing(start, checkpoints):
    node, probe, verdicts = run_encoder(start, checkpoints, 6)
    last = verdicts[-1]
    assert (last.calibrated, last.alarm, last.score) == (False, False, 0.0)
    assert last.world_model_id == node.filter.identity
    assert list(last.horizons) == list(HORIZONS) and last.groups == ["commanded pose", "arm", "rgb_static", "rgb_gripper"]
    errors = from_floats(last.errors).reshape(3, 4)
    assert np.isfinite(errors[0]).all() and np.isnan(errors[1:]).all()  # warm for two frames
    probe.until(lambda: probe.diagnostics.get("encoder: monitor", (WARN, ""))[1] == "not calibrated", PATIENCE_S)


def test_encoder_raises_the_alarm_after_the_debounce(start, checkpoints, tmp_path):
    _, probe, verdicts = run_encoder(start, checkpoints, 8, monitor=write_calibration(tmp_path / "m.json", checkpoints, 1e-6))
    assert [verdict.alarm for verdict in verdicts] == [False] * 6 + [True] * 2  # warm after 4 frames, then 3 in a row
    assert verdicts[-1].calibrated and verdicts[-1].score > 1 and "ahead" in verdicts[-1].worst
    probe.until(lambda: probe.diagnostics["encoder: monitor"] == (WARN, "surprised"), PATIENCE_S)
    assert probe.call(Trigger, "encoder/reset", timeout_s=PATIENCE_S).success
    probe.until(lambda: len(verdicts) == 9 and not verdicts[-1].alarm, PATIENCE_S)


def test_encoder_refuses_a_calibration_of_another_world_model(start, checkpoints, tmp_path):
    path = write_calibration(tmp_path / "m.json", checkpoints, 1.0, "f" * 64)
    with pytest.raises(DiwaError, match=r"expected a calibration of world model .*, found one of ffff"):
        start(Encoder, world_model=str(checkpoints / "world_model"), monitor=path)


# -- the running graph -----------------------------------------------------------------------------------------------------------------


def calibrate_on_motion(checkpoints, path):
    """Calibration of the world model on the one motion that the graph makes: limits twice as high as anything in it."""
    latent_filter, table = LatentFilter.load(checkpoints / "world_model"), PlayTable()
    model, groups = latent_filter.model, list_groups(latent_filter.model)
    loops, residuals = OpenLoops(model), []
    pose = np.array([START_X_M, -0.2, 0.6, np.pi, 0, np.pi / 2])
    blocks = np.array([[-0.3 + 0.25 * index, -0.05, 0.46, 0, 0, 0] for index in range(3)])
    table.reset(options={"state": SceneState(tcp_pose=pose, gripper=-1.0, blocks=blocks)})
    for frame in range(100):  # half a metre: as far as nothing is in the way
        latent_filter.update(table.observation(), ALONG if frame else None)
        residuals.append(loops.compare(latent_filter.action, latent_filter.embedding, latent_filter.state)[0])
        table.apply(ALONG)
    table.close()
    warm = torch.stack(residuals[20:]).double().numpy()
    deviations = np.sqrt(np.square(warm).mean(0)).clip(MIN_DEVIATION)
    limits = 2 * group_errors(warm, groups, deviations).max(0).clip(0.1)
    Calibration(latent_filter.identity, HORIZONS, tuple(groups), to_tuples(deviations), to_tuples(limits), 3, 1.0).save(path)
    return path


class MonitoredRig(SimulationRig):
    """The graph with a calibrated monitor whose alarm holds the arm, and a recorder."""

    def __init__(self, checkpoints, folder):
        self.calibration, self.bags = calibrate_on_motion(checkpoints, folder / "monitor.json"), folder / "bags"
        super().__init__(checkpoints, folder)

    def describe(self):
        arguments = {"checkpoint": str(self.checkpoints), "commands_from": self.probe_name, "on_surprise": "hold"}
        graph = load_graph("deploy").resolve({**arguments, "monitor": str(self.calibration), "record": True, "bags": str(self.bags)})
        for process in graph:
            if process.name == "recorder":
                process.parameters["record_at_start"] = False
        return graph


def darken(message):
    """An eighth of the light."""
    message.data = array.array("B", (np.frombuffer(message.data, np.uint8) // 8).tobytes())
    return [message]


def weaken(message):
    """The arm goes a quarter of what it says."""
    if not message.applied_is_hold:
        message.applied_action = np.concatenate([np.array(message.applied_action[:6]) * 4, [message.applied_action[6]]]).astype(np.float32)
    return [message]


FAULTS = (
    Fault("camera dark", lambda rig: rig.change("camera/static/image_raw", darken), states=("FAULT",), mended_by="light again"),
    Fault("arm weak", lambda rig: rig.change("sim/state", weaken), states=("FAULT",), mended_by="the arm obeys"),
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_faults_in_the_running_graph_hold_the_arm_and_are_saved(tmp_path):
    """One fault of a camera and one of the dynamics; neither is seen by any other check."""
    rig = MonitoredRig(make_fault_checkpoints(tmp_path / "checkpoints", change_scale=1e-3), tmp_path)
    try:
        for fault in FAULTS:
            outcome = rig.run(fault)
            assert "the world model is surprised" in outcome.reason and outcome.at_rest and outcome.outside == 0, outcome
            assert "controller/resume" in outcome.resumed_by
        rig.probe.until(lambda: rig.bags.exists() and list(rig.bags.glob("recent_*")), PATIENCE_S)
    finally:
        rig.close()
