"""The graph moves a simulated FR3 through the real client and protocol; what the robot does shows as a state and is resumed by hand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from diwa_interfaces.msg import ActionChunk, ControllerStatus, ExecutedAction
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.node import Node
from ros_support import private_graph
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import Trigger

from diwa_core.contract import Contract
from diwa_ros.graph import load_graph
from diwa_ros.messages import CAMERA, LATCHED, from_pose, reliable, to_duration, to_float32
from diwa_ros.up import GraphRunner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]
ADDRESS = f"127.61.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}"  # runs side by side do not meet
PATIENCE_S = 90.0  # a busy machine slows the robot's own time down
STEP_NS = round(1e9 / Contract().rate_hz)
UP = np.array([0, 0, 0.2, 0, 0, 0, 1], np.float32)


class Probe(Node):
    """Plays the policy and the operator."""

    def __init__(self) -> None:
        super().__init__("policy")
        self.contract = Contract()
        self.status: ControllerStatus | None = None
        self.reasons: list[str] = []
        self.poses: list[np.ndarray] = []
        self.executed: list[ExecutedAction] = []
        self.joints: JointState | None = None
        self.images: dict[str, int] = {}
        self.targets = 0
        self.diagnostics: dict[str, str] = {}
        self.action: np.ndarray | None = None
        self.chunks = self.create_publisher(ActionChunk, "action_chunk", reliable(5))
        self.create_subscription(ControllerStatus, "controller/status", self.take_status, LATCHED)
        self.create_subscription(PoseStamped, "current_pose", lambda m: self.poses.append(from_pose(m)), reliable(10))
        self.create_subscription(PoseStamped, "target_pose", lambda m: setattr(self, "targets", self.targets + 1), reliable(10))
        self.create_subscription(ExecutedAction, "executed_action", self.executed.append, reliable(10))
        self.create_subscription(JointState, "joint_states", lambda m: setattr(self, "joints", m), reliable(10))
        self.create_subscription(DiagnosticArray, "/diagnostics", self.take_diagnostics, reliable(10))
        for stream in self.contract.images:
            self.create_subscription(Image, stream.topic, self.make_counter(stream.name), CAMERA)
        self.create_timer(4 / 30, self.publish_chunk)

    def make_counter(self, name: str) -> Callable:
        return lambda message: self.images.update({name: self.images.get(name, 0) + 1})

    def take_status(self, message: ControllerStatus) -> None:
        self.status = message
        self.reasons.append(message.reason)

    def take_diagnostics(self, message: DiagnosticArray) -> None:
        self.diagnostics.update({status.name: status.message for status in message.status})

    def publish_chunk(self) -> None:
        """Eight actions from now on, as a policy with long chunks."""
        if self.action is not None:
            self.send(np.tile(self.action, (8, 1)))

    def send(self, actions: np.ndarray) -> None:
        message = ActionChunk(checkpoint_id="test", contract_id=self.contract.identity, horizon=len(actions), action_dim=7)
        message.header.stamp = self.get_clock().now().to_msg()
        message.step_period = to_duration(STEP_NS)
        message.actions = to_float32(actions)
        self.chunks.publish(message)

    @property
    def state(self) -> str:
        return self.status.state_name if self.status is not None else "none"

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline_s, f"waited for {what}; state {self.state}: {self.status and self.status.reason}"
            rclpy.spin_once(self, timeout_sec=0.05)

    def call(self, service_type: type, name: str, request: object) -> object:
        client = self.create_client(service_type, name)
        self.wait(client.service_is_ready, name)
        future = client.call_async(request)
        self.wait(future.done, f"an answer of {name}")
        return future.result()

    def trigger(self, name: str) -> Trigger.Response:
        return self.call(Trigger, f"controller/{name}", Trigger.Request())

    def insist(self, name: str) -> None:
        """Call until it is accepted, then wait for IDLE: on a busy machine the robot may seem silent in between."""
        self.wait(lambda: self.trigger(name).success, f"{name} to be accepted")
        self.wait(lambda: self.state == "IDLE", "IDLE")

    def set_fault(self, fault: str) -> None:
        value = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=fault)
        request = SetParameters.Request(parameters=[ParameterMessage(name="fault", value=value)])
        response = self.call(SetParameters, "fake_fr3/set_parameters", request)
        assert response.results[0].successful, response.results[0].reason

    def stream(self, action: np.ndarray) -> None:
        self.action = action
        self.wait(lambda: self.state == "ACTIVE", "ACTIVE")

    def end_stream(self) -> None:
        self.action = None
        self.send(np.zeros((0, 7), np.float32))
        self.wait(lambda: self.state == "IDLE", "IDLE")


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    folder = tmp_path_factory.mktemp("franka")
    robot = yaml.safe_load((ROOT / "config" / "fake_fr3.yaml").read_text()) | {"address": ADDRESS, "connect_timeout_s": 3.0}
    (folder / "robot.yaml").write_text(yaml.safe_dump(robot))
    nodes = [
        {"name": "fake_fr3", "parameters": {"robot": str(folder / "robot.yaml")}},
        {"name": "franka_controller", "parameters": {"backend": "franky", "robot": str(folder / "robot.yaml"), "stop_after_s": 5.0}},
    ]
    (folder / "graph.yaml").write_text(yaml.safe_dump({"nodes": nodes}))
    with private_graph(), GraphRunner(load_graph(str(folder / "graph.yaml")).resolve(), folder / "logs"):
        node = Probe()
        node.wait(lambda: node.state == "IDLE", "IDLE")
        yield node
        node.destroy_node()


@pytest.fixture(autouse=True)
def healthy(probe: Probe) -> Iterator[None]:
    """Every test begins with an idle robot and leaves one."""
    probe.wait(lambda: probe.state == "IDLE", "IDLE")
    yield
    probe.action = None


def test_actions_of_the_graph_move_the_arm(probe: Probe) -> None:
    probe.wait(lambda: len(probe.poses) > 2, "poses")
    before = probe.poses[-1]
    probe.stream(UP)
    probe.wait(lambda: probe.poses[-1][2] > before[2] + 0.03, "the arm to rise")
    probe.end_stream()
    assert any(message.source == ExecutedAction.SOURCE_POLICY and message.action[2] == pytest.approx(0.2) for message in probe.executed)
    assert probe.joints.name == [*probe.contract.arm_joints, *probe.contract.finger_joints]
    assert len(probe.joints.velocity) == 9 and probe.targets > 2
    probe.wait(lambda: all(probe.images.get(stream.name, 0) > 2 for stream in probe.contract.images), "pictures")


def test_stop_and_resume(probe: Probe) -> None:
    probe.stream(-UP)
    assert probe.trigger("stop").success
    probe.wait(lambda: probe.state == "USER_STOPPED", "USER_STOPPED")
    commands = probe.status.commands
    probe.wait(lambda: probe.status.commands == commands, "no further command")
    probe.action = None
    probe.insist("resume")


def test_a_reflex_is_shown_and_recovered_on_request_only(probe: Probe) -> None:
    probe.stream(UP)
    probe.set_fault("reflex")
    probe.wait(lambda: probe.state == "REFLEX", "REFLEX")
    assert "cartesian_reflex" in probe.status.reason
    assert not probe.trigger("resume").success
    probe.action = None
    probe.insist("recover")
    probe.set_fault("none")


def test_a_user_stop_lasts_until_it_is_released_and_resumed(probe: Probe) -> None:
    probe.stream(-UP)
    probe.set_fault("user_stop")
    probe.wait(lambda: probe.state == "USER_STOPPED", "USER_STOPPED")
    probe.action = None
    refused = probe.trigger("resume")
    assert not refused.success and "Release it" in refused.message
    probe.set_fault("none")
    assert probe.state == "USER_STOPPED"
    probe.insist("resume")


def test_a_lost_link_is_mended(probe: Probe) -> None:
    probe.set_fault("link_loss")
    probe.wait(lambda: probe.state == "DISCONNECTED", "DISCONNECTED")
    probe.wait(lambda: probe.state == "IDLE", "IDLE")
    probe.set_fault("none")


def test_a_robot_that_never_answers_is_named(probe: Probe) -> None:
    probe.set_fault("mute")
    probe.wait(lambda: probe.status.reason.find("did not answer") > 0, "the reason")
    assert probe.state == "DISCONNECTED"
    probe.set_fault("none")
    probe.wait(lambda: probe.state == "IDLE", "IDLE")


def test_home_is_refused_while_a_policy_runs_and_goes_home_afterwards(probe: Probe) -> None:
    probe.stream(UP)
    probe.wait(lambda: not probe.trigger("home").success, "a refusal")
    probe.end_stream()
    probe.wait(lambda: probe.trigger("home").success, "the arm to be released")
    probe.reasons.clear()
    probe.wait(lambda: probe.state == "HOLD" or "going home" in probe.status.reason, "going home")
    probe.wait(lambda: probe.state == "IDLE", "IDLE")
    assert np.array(probe.joints.position[:7]) == pytest.approx(load_home(), abs=0.05)
    assert "the robot is silent" not in probe.reasons  # it asked for no commands on its way


def load_home() -> list[float]:
    return yaml.safe_load((ROOT / "config" / "fake_fr3.yaml").read_text())["home_joints_rad"]
