"""A running graph with something wrong put into it: real processes killed, stopped and flooded, messages changed on their way.

A `Relay` stands between the nodes: camera, ticks of the robot and action chunks pass through it, as they are or as a fault makes them.
Every fault is measured on the messages of the graph and by the clocks of their senders, so that this observer adds nothing.
What can go wrong is in fault_matrix.py; here is what it goes wrong with: the graph with the simulated robot, and with the fake FR3.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import yaml
from diagnostic_msgs.msg import DiagnosticStatus
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ActionChunk, ControllerStatus, ExecutedAction, PolicyStatus, RobotCommand, SimState
from diwa_interfaces.srv import LoadPolicy, ResetSim
from fault_matrix import Fault
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.action import ActionClient
from rclpy.client import Client
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.serialization import deserialize_message
from ros_support import Probe, train_constant
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import Trigger

from diwa_core.contract import Contract
from diwa_core.control.robot_config import RobotConfig, load_robot_config
from diwa_core.control.target import world_to_coordinates, wrap
from diwa_core.policy.diffusion import PolicyConfig
from diwa_core.policy.store import save_policy
from diwa_core.world_model.filter import save_world_model
from diwa_core.world_model.model import SIZES, WorldModel
from diwa_ros.graph import Process, config_folder, load_graph
from diwa_ros.messages import CAMERA, LATCHED, from_pose, reliable, to_float32, to_ns
from diwa_ros.up import GraphRunner

SKILL = "open_drawer"
ALONG = np.array([0.25, 0, 0, 0, 0, 0, -1], dtype=np.float32)  # 5 mm a step to the right: long enough a way, and no camera stands still
START_X_M = -0.18  # in sight of the cameras, so that a frozen one can be told from one that sees nothing move
MOVING = 1e-3  # of an action: less is noise
REST_NS = 500_000_000  # without a moving command: the arm rests
TOLERANCE = 1e-6  # m and rad, of sums of rounded numbers
PATIENCE_S = 60.0  # for a slow and busy machine
CALLS = {"FAULT": "controller/resume", "USER_STOPPED": "controller/resume", "REFLEX": "controller/recover"}  # what ends a state
CAMERA_TOPIC = "camera/static/image_raw"
Wire = dict[str, tuple[type, QoSProfile, str]]  # topic -> type, how it is sent, the node that sends it
Change = Callable[[object], list[object]]


def make_fault_checkpoints(folder: Path, change_scale: float = 1.0) -> Path:
    """A random world model and a policy that always moves ALONG, and the same one again to swap in.

    change_scale: how much the world model expects to change by itself; 1 drifts by more than pictures differ.
    """
    contract = Contract()
    torch.manual_seed(0)
    model = WorldModel(SIZES["small"])
    model.rssm.latent.change_scale.fill_(change_scale)
    world_model_id = save_world_model(folder / "world_model", model, contract, {})
    policy = train_constant(PolicyConfig(feature_size=model.feature_size, hidden=(64, 64, 64)), ALONG)
    for place in (folder / "policies" / SKILL, folder / "other"):
        save_policy(place, policy, contract, SKILL, world_model_id, {"place": place.name})
    return folder


class Relay:
    """Passes the messages of a wire on; `changes` maps a topic to what happens to its messages on the way: one in, any number out."""

    def __init__(self, node: Node, wire: Wire) -> None:
        self.changes: dict[str, Change] = {}
        for topic, (message_type, qos, _) in wire.items():
            publisher = node.create_publisher(message_type, topic, qos)
            pass_on = self._make_callback(topic, message_type, publisher)
            node.create_subscription(message_type, f"wire/{topic}", pass_on, qos, raw=True)

    def _make_callback(self, topic: str, message_type: type, publisher: object) -> Callable[[bytes], None]:
        def pass_on(data: bytes) -> None:
            change = self.changes.get(topic)
            for message in [data] if change is None else change(deserialize_message(data, message_type)):
                publisher.publish(message)

        return pass_on


@dataclass
class Sent:
    """A command as it was sent: when by the sender's clock, for which tick, and what."""

    time_ns: int
    stamp_ns: int
    action: np.ndarray
    hold: bool

    @property
    def moves(self) -> bool:
        """Whether it asks the arm to move."""
        return not self.hold and bool(np.abs(self.action[:6]).max() > MOVING or not np.isfinite(self.action).all())


@dataclass
class Outcome:
    """What a fault did. held_ms: from the fault to the last command that moves; noticed_ms: to the controller's first other state."""

    fault: str
    backend: str
    held_ms: float | None
    noticed_ms: float | None
    outside: int
    commands: int
    state: str
    reason: str
    at_rest: bool  # no moving command in the last while of the measurement
    resumed_by: str = ""
    states: list[str] = field(default_factory=list)


class Rig(ABC):
    """A graph of config/deploy.yaml in real time. A backend says what it consists of, what moves its arm and how the arm starts again."""

    BACKEND: str
    WIRE: ClassVar[Wire]
    CLOCK: str  # the topic whose stamps are those of the robot or, where the controller makes its own, of the camera

    def __init__(self, checkpoints: Path, log_folder: Path) -> None:
        """Start it. Needs rclpy.init."""
        self.checkpoints, self.log_folder = checkpoints, log_folder
        self.processes = {process.name: self._rewire(process) for process in self.describe()}
        self.runners = {name: GraphRunner([process], log_folder) for name, process in self.processes.items()}
        self.extra: list[subprocess.Popen] = []
        self.nodes: list[Node] = []
        self.clients: dict[str, Client] = {}
        self.probe = Probe()
        self.relay = Relay(self.probe.node, self.WIRE)
        self.sent: list[Sent] = []
        self.statuses: list[tuple[int, ControllerStatus]] = []
        self.probe.node.create_subscription(ControllerStatus, "controller/status", self._take_status, LATCHED)
        self.listen()
        self.policy = self.probe.hear(PolicyStatus, "policy/status", LATCHED)
        self.client = ActionClient(self.probe.node, RunSkill, "run_skill")
        self.goal = None
        self._find("controller/stop", Trigger)  # so that a stop is not late by the time that discovery takes
        for runner in self.runners.values():
            runner.start()

    @abstractmethod
    def describe(self) -> list[Process]:
        """The processes of the graph."""

    @abstractmethod
    def listen(self) -> None:
        """Subscribe to what moves the arm."""

    @abstractmethod
    def reset(self) -> bool:
        """Put the arm to where its motion begins; False when it cannot go there now."""

    def forget(self) -> None:
        """A measurement begins: only what is sent from now on counts."""
        del self.sent[:-1]

    def moved_at_ns(self) -> list[int]:
        """When something was sent that moves the arm."""
        return [sent.time_ns for sent in self.sent if sent.moves]

    def count_outside(self) -> int:
        """How often something was sent that no robot should be sent."""
        return count_outside(self.sent)

    @property
    def probe_name(self) -> str:
        """The node of the relay, from which alone the controller takes commands."""
        return f"probe_{os.getpid()}"

    def close(self) -> None:
        """End everything that was started."""
        self._end_extra()
        for name, runner in self.runners.items():
            if runner.poll() is None:
                self.signal(name, signal.SIGCONT)
        self.client.destroy()
        for runner in reversed(self.runners.values()):
            runner.stop()
        self.probe.close()

    # -- what faults use ---------------------------------------------------------------------------------------------------------------

    def signal(self, name: str, number: int) -> None:
        """Send a signal to the process of a node."""
        os.kill(self.runners[name].pids[name], number)

    def restart(self, name: str) -> None:
        """Start a node again whose process has ended."""
        self.runners[name].stop()
        self.runners[name] = GraphRunner([self.processes[name]], self.log_folder)
        self.runners[name].start()

    def change(self, topic: str, change: Change) -> None:
        """From now on, messages of `topic` are what `change` makes of them."""
        self.relay.changes[topic] = change

    def call(self, name: str, service_type: type = Trigger, request: object = None) -> object:
        """Call a service and return its response; again while there is none: a server that was killed seems to be there for a while."""
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            client = self._find(name, service_type)
            if self._wait(client.service_is_ready, 5.0):
                future = client.call_async(request or service_type.Request())
                if self._wait(future.done, 5.0):
                    return future.result()
            self.probe.node.destroy_client(self.clients.pop(name))
        raise AssertionError(f"{name}: no answer within {PATIENCE_S} s; {self.probe.diagnostics}")

    def add_publisher(self, name: str) -> object:
        """A second node that publishes on the command topic."""
        node = Node(name)
        self.nodes.append(node)
        return node.create_publisher(ActionChunk, "action_chunk", reliable(5))

    def prepare_flood(self) -> None:
        """Another process that is ready to publish chunks as fast as it can."""
        words = [sys.executable, __file__]
        self.extra.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True))
        watch = select.poll()
        watch.register(self.extra[-1].stdout, select.POLLIN)
        assert self._wait(lambda: bool(watch.poll(0)), PATIENCE_S), "the flooding process did not start"

    def flood(self) -> None:
        """Let it publish."""
        self.extra[-1].stdin.close()

    def load_other(self) -> LoadPolicy.Response:
        """Swap another checkpoint of the running skill in."""
        return self.call("policy/load", LoadPolicy, LoadPolicy.Request(path=str(self.checkpoints / "other")))

    def mend_everything(self) -> None:
        """Take back what `change`, `add_publisher`, `flood` and signals did; dead nodes are started again."""
        self._end_extra()
        for name, runner in self.runners.items():
            if runner.poll() is not None:
                self.restart(name)
            else:
                self.signal(name, signal.SIGCONT)

    # -- motion ------------------------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """State of the controller as last heard."""
        return self.statuses[-1][1].state_name if self.statuses else "none"

    def bring_to_motion(self, attempts: int = 1) -> str:
        """Let the policy move the arm from its start; returns what had to be done so that it moves: a call or nothing."""
        resumed_by = "by itself"
        end_s = time.monotonic() + 2 * PATIENCE_S * attempts
        while not self._try_motion():
            reason = self.statuses[-1][1].reason if self.statuses else "no status"
            assert time.monotonic() < end_s, f"no motion: {self.state}, {reason}; {self.probe.diagnostics}"
            if self.state in CALLS and self.call(call := CALLS[self.state]).success:
                resumed_by = call
        return resumed_by

    def _try_motion(self) -> bool:
        """One attempt: cancel, go to the start, run the skill; true when commands that move were sent for a while."""
        if self.goal is not None and self.goal.done() and self.goal.result().accepted:
            cancelled = self.goal.result().cancel_goal_async()
            self._wait(cancelled.done, 3.0)
        self.goal = None
        if not self.reset():
            return False
        if not self._wait(self.client.server_is_ready, PATIENCE_S) or self.state in CALLS:
            return False
        self.goal = self.client.send_goal_async(RunSkill.Goal(skill=SKILL, max_steps=10_000))
        if not self._wait(self.goal.done, 5.0) or not self.goal.result().accepted:
            return False
        before = len(self.sent)

        def moves() -> bool:
            return sum(sent.moves for sent in self.sent[before:]) > 5

        self._wait(lambda: moves() or self.state in CALLS, 10.0)
        return moves()

    def measure(self, fault: Fault) -> Outcome:
        """Put `fault` into the moving graph, wait until it shows, and say what happened. It stays in."""
        self.forget()
        heard = len(self.statuses)
        begin_ns = time.time_ns()
        fault.inject(self)

        def shows() -> bool:
            states = {self.state, *(status.state_name for _, status in self.statuses[heard:])}
            return not states.isdisjoint(fault.states) and self._complaint(fault) is not None

        self._wait(shows, PATIENCE_S)
        self.probe.spin(fault.watch_s)
        end_ns = time.time_ns()
        moved_at_ns = self.moved_at_ns()
        held_ms = max(0.0, (max(moved_at_ns, default=begin_ns) - begin_ns) / 1e6)
        noticed = [at_ns for at_ns, status in self.statuses[heard:] if status.state_name != "ACTIVE" and at_ns > begin_ns]
        newest = self.statuses[-1][1]
        shown = list(dict.fromkeys(status.state_name for _, status in self.statuses[heard:]))
        return Outcome(
            fault=fault.name,
            backend=self.BACKEND,
            held_ms=held_ms if fault.holds else None,
            noticed_ms=(noticed[0] - begin_ns) / 1e6 if noticed else None,
            at_rest=all(moved_ns < end_ns - REST_NS for moved_ns in moved_at_ns),
            outside=self.count_outside(),
            commands=len(self.sent),
            state=" → ".join(shown) if fault.controller_lives else "none: its status is silent",
            reason=(self._complaint(fault) or newest.reason) if fault.controller_lives else "",
            states=shown,
        )

    def run(self, fault: Fault, attempts: int = 1) -> Outcome:
        """Bring the arm to motion, measure the fault, mend it and bring the arm to motion again."""
        self.mend_everything()
        fault.prepare(self)
        self.bring_to_motion(attempts)
        outcome = self.measure(fault)
        self.mend_everything()
        outcome.resumed_by = "; ".join(filter(None, (fault.mended_by, self.bring_to_motion(attempts))))
        assert self._wait(lambda: not self._complaint(fault), PATIENCE_S), f"still: {self._complaint(fault)}"
        return outcome

    def _complaint(self, fault: Fault) -> str | None:
        """What the fault's diagnostic says; empty when the state alone must show the fault, None while the diagnostic finds all well."""
        if not fault.diagnostic:
            return ""
        level, message = self.probe.diagnostics.get(fault.diagnostic, (DiagnosticStatus.OK, ""))
        return f"{fault.diagnostic}: {message}" if level != DiagnosticStatus.OK else None

    def _find(self, name: str, service_type: type) -> Client:
        if name not in self.clients:
            self.clients[name] = self.probe.node.create_client(service_type, name)
        return self.clients[name]

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        end_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end_s:
                return False
            self.probe.executor.spin_once(timeout_sec=0.02)
        return True

    def _end_extra(self) -> None:
        self.relay.changes.clear()
        for node in self.nodes:
            node.destroy_node()
        self.nodes.clear()
        for process in self.extra:
            process.kill()
            process.wait()
        self.extra.clear()

    def _rewire(self, process: Process) -> Process:
        """The process with what it sends on WIRE going to the relay."""
        remaps = {topic: f"wire/{topic}" for topic, (_, _, sender) in self.WIRE.items() if sender == process.name}
        parameters = {"latent_timeout_s": 2.0} if process.name == "policy" else {}
        return replace(process, remaps=process.remaps | remaps, parameters=process.parameters | parameters)

    def _take_status(self, message: ControllerStatus, info: dict) -> None:
        self.statuses.append((info["source_timestamp"], message))


class SimulationRig(Rig):
    """The graph with the simulated robot. What moves its arm is sim/command, timed when the controller sends it."""

    BACKEND = "simulation"
    WIRE: ClassVar[Wire] = {
        CAMERA_TOPIC: (Image, reliable(5), "calvin_bridge"),
        "sim/state": (SimState, reliable(10), "calvin_bridge"),
        "action_chunk": (ActionChunk, reliable(5), "policy"),
    }
    CLOCK = "sim/state"

    def describe(self) -> list[Process]:
        """The processes of the graph."""
        return load_graph("deploy").resolve({"checkpoint": str(self.checkpoints), "commands_from": self.probe_name})

    def listen(self) -> None:
        """Subscribe to the commands."""
        self.probe.node.create_subscription(RobotCommand, "sim/command", self._take_command, reliable(50))

    def reset(self) -> bool:
        """The hand to the left, above the table and in sight."""
        state = np.zeros(39)
        state[:6], state[14] = (START_X_M, -0.2, 0.6, np.pi, 0, np.pi / 2), -1.0
        state[21:] = np.reshape([[-0.3 + 0.25 * index, -0.05, 0.46, 0, 0, 0] for index in range(3)], -1)
        reset = self.call("sim/reset", ResetSim, ResetSim.Request(state=state.tolist()))
        assert reset.success, reset.message
        return True

    def _take_command(self, message: RobotCommand, info: dict) -> None:
        action = np.array(message.action, np.float32)
        self.sent.append(Sent(info["source_timestamp"], to_ns(message.header.stamp), action, message.hold))


@dataclass
class Place:
    """Where the hand is to be and where it is, poses [6], by the controller's clock. A robot that holds itself is to be where it is."""

    time_ns: int
    target: np.ndarray
    measured: np.ndarray

    @property
    def streaming(self) -> bool:
        """Whether the robot is being commanded."""
        return not np.array_equal(self.target, self.measured)


class FakeFr3Rig(Rig):
    """The graph with the fake FR3: the real client, the real protocol and franky-sim's arm.

    No topic carries commands to that robot. What moves it is heard from the controller: executed_action, timed when the step is over,
    which is one step later than the simulation's command is sent; and target_pose, each change of which is a command too: of a step that
    a stopped robot cut off it is the only trace. Whether an executed action moves is read from its numbers, not from its source, which
    the controller does not know after a very late tick. Both are also what is held against the limits. Where the hand is measured tells
    nothing about time: on a busy machine the simulated arm lives slower than the clock and is still on its way to where it was sent.
    """

    BACKEND = "fake-fr3"
    WIRE: ClassVar[Wire] = {
        CAMERA_TOPIC: (Image, CAMERA, "fake_fr3"),
        "action_chunk": (ActionChunk, reliable(5), "policy"),
    }
    CLOCK = CAMERA_TOPIC
    ADDRESS = f"127.63.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}"  # runs side by side do not meet
    HOME_RAD = 0.05  # how near to its home joints the arm is at home

    def describe(self) -> list[Process]:
        """The processes of the graph. The robot has an address of its own; a stuck gripper is reported while there is room to move."""
        values = yaml.safe_load((config_folder() / "fake_fr3.yaml").read_text())
        values |= {"address": self.ADDRESS, "connect_timeout_s": 3.0, "gripper": values["gripper"] | {"timeout_s": 1.0}}
        path = self.log_folder / "robot.yaml"
        path.write_text(yaml.safe_dump(values))
        self.config = load_robot_config(path)
        arguments = {"checkpoint": str(self.checkpoints), "commands_from": self.probe_name, "real": True, "robot": "fake-fr3"}
        processes = load_graph("deploy").resolve(arguments)
        for process in processes:
            if "robot" in process.parameters:
                process.parameters["robot"] = str(path)
        return processes

    def listen(self) -> None:
        """Subscribe to what the controller did and where it wants the hand."""
        self.measured: dict[int, np.ndarray] = {}  # poses whose target has not come yet, by stamp
        self.places: list[Place] = []
        self.joints = np.full(7, np.nan)
        listen = self.probe.node.create_subscription
        listen(ExecutedAction, "executed_action", self._take_executed, reliable(50))
        listen(PoseStamped, "current_pose", self._take_pose, reliable(50))
        listen(PoseStamped, "target_pose", self._take_target, reliable(50))
        listen(JointState, "joint_states", self._take_joints, reliable(50))

    def reset(self) -> bool:
        """The arm to its home joints."""
        if not self._wait(lambda: self.state == "IDLE" or self.state in CALLS, 10.0) or self.state in CALLS:
            return False
        if not self._is_home() and not self.call("controller/home").success:
            return False
        return self._wait(lambda: self._is_home() and self.state == "IDLE", PATIENCE_S)

    def forget(self) -> None:
        """A measurement begins."""
        super().forget()
        del self.places[:-1]

    def moved_at_ns(self) -> list[int]:
        """Ends of steps that moved, and changes of the target."""
        changes = [after.time_ns for before, after in list_steps(self.places) if not np.array_equal(before.target, after.target)]
        return super().moved_at_ns() + changes

    def count_outside(self) -> int:
        """Also targets."""
        return super().count_outside() + count_targets_outside(self.places, self.sent, self.config)

    def set_fault(self, fault: str) -> None:
        """Make something go wrong at the robot, or well again ('none')."""
        value = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=fault)
        request = SetParameters.Request(parameters=[ParameterMessage(name="fault", value=value)])
        response = self.call("fake_fr3/set_parameters", SetParameters, request)
        assert response.results[0].successful, response.results[0].reason

    def mend_everything(self) -> None:
        """Also the robot."""
        super().mend_everything()
        self.set_fault("none")

    def _is_home(self) -> bool:
        return bool(np.abs(self.joints - self.config.home_joints_rad).max() < self.HOME_RAD)

    def _take_executed(self, message: ExecutedAction, info: dict) -> None:
        self.sent.append(Sent(info["source_timestamp"], to_ns(message.header.stamp), np.array(message.action, np.float32), False))

    def _take_pose(self, message: PoseStamped) -> None:
        self.measured[to_ns(message.header.stamp)] = from_pose(message)

    def _take_target(self, message: PoseStamped, info: dict) -> None:
        measured = self.measured.pop(to_ns(message.header.stamp), None)
        if measured is not None:
            self.places.append(Place(info["source_timestamp"], from_pose(message), measured))

    def _take_joints(self, message: JointState) -> None:
        self.joints = np.array(message.position[:7])


def count_outside(sent: list[Sent]) -> int:
    """Commands that no robot should have been sent: not finite, outside [-1, 1], a gripper in between, or two for one tick."""
    outside, last_ns = 0, None
    for command in sent:
        fits = np.isfinite(command.action).all() and np.abs(command.action).max() <= 1 and abs(command.action[6]) == 1
        outside += not fits or command.stamp_ns == last_ns
        last_ns = command.stamp_ns
    return outside


def list_steps(places: list[Place]) -> list[tuple[Place, Place]]:
    """Places that follow each other while the robot is commanded."""
    return [(before, after) for before, after in pairwise(places) if before.streaming and after.streaming]


def count_targets_outside(places: list[Place], sent: list[Sent], config: RobotConfig) -> int:
    """Targets outside the box, or further from the one before than the arm may go in the ticks between them."""
    (lower, upper), limits, outside = config.motion.box, config.motion, 0
    for place in filter(lambda place: place.streaming, places):
        coordinates = world_to_coordinates(place.target, config)
        outside += not ((coordinates >= lower - TOLERANCE) & (coordinates <= upper + TOLERANCE)).all()
    for before, after in list_steps(places):
        ticks = 1 + sum(before.time_ns < command.time_ns < after.time_ns for command in sent)  # the tick before may still be answered
        span_s = ticks * Contract().step_s
        way = after.target - before.target
        way_m, turn_rad = np.linalg.norm(way[:3]), np.linalg.norm(wrap(way[3:]))
        outside += not (way_m <= limits.max_speed_m_s * span_s + TOLERANCE and turn_rad <= limits.max_speed_rad_s * span_s + TOLERANCE)
    return outside


RIGS = {rig.BACKEND: rig for rig in (SimulationRig, FakeFr3Rig)}


def flood_command_topic() -> None:
    """What the flooding process does: valid-looking chunks without a pause, from the end of its input until it is killed."""
    import rclpy

    rclpy.init()
    node = rclpy.create_node("flood")
    message = ActionChunk(checkpoint_id="f" * 64, contract_id=Contract().identity, horizon=4, action_dim=7)
    message.actions = to_float32(np.ones((4, 7)))
    node.create_publisher(ActionChunk, "elsewhere", reliable(5)).publish(message)  # the first one takes its time
    print("ready", flush=True)
    sys.stdin.read()
    publisher = node.create_publisher(ActionChunk, "action_chunk", reliable(5))
    while True:
        message.header.stamp = node.get_clock().now().to_msg()
        publisher.publish(message)


if __name__ == "__main__":
    flood_command_topic()
