"""A running graph with something wrong put into it: real processes killed, stopped and flooded, messages changed on their way.

A `Relay` stands between the nodes: camera, ticks of the robot and action chunks pass through it, as they are or as a fault makes them.
Every fault is measured on the messages of the graph and by the clocks of their senders, so that this observer adds nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ActionChunk, ControllerStatus, PolicyStatus, RobotCommand, SimState
from diwa_interfaces.srv import LoadPolicy, ResetSim
from rclpy.action import ActionClient
from rclpy.node import Node
from rclpy.serialization import deserialize_message
from ros_support import Probe, train_constant
from sensor_msgs.msg import Image
from std_srvs.srv import Trigger

from diwa_core.contract import Contract
from diwa_core.control.limits import MotionLimits, load_limits
from diwa_core.policy.diffusion import PolicyConfig
from diwa_core.policy.store import save_policy
from diwa_core.world_model.filter import save_world_model
from diwa_core.world_model.model import SIZES, WorldModel
from diwa_ros.graph import Process, load_graph
from diwa_ros.messages import LATCHED, reliable, to_float32, to_ns, to_time
from diwa_ros.up import GraphRunner

SKILL = "open_drawer"
ALONG = np.array([0.25, 0, 0, 0, 0, 0, -1], dtype=np.float32)  # 5 mm a step to the right: long enough a way, and no camera stands still
START_X_M = -0.4
MOVING = 1e-3  # of an action: less is noise
REST_NS = 500_000_000  # without a moving command: the arm rests
PATIENCE_S = 60.0  # for a slow and busy machine
WIRE = {  # topic -> type, depth, the node that sends it
    "camera/static/image_raw": (Image, 5, "calvin_bridge"),
    "sim/state": (SimState, 10, "calvin_bridge"),
    "action_chunk": (ActionChunk, 5, "policy"),
}
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
    """Passes the messages of WIRE on; `changes` maps a topic to what happens to its messages on the way: one in, any number out."""

    def __init__(self, node: Node) -> None:
        self.changes: dict[str, Change] = {}
        for topic, (message_type, depth, _) in WIRE.items():
            publisher = node.create_publisher(message_type, topic, reliable(depth))
            pass_on = self._make_callback(topic, message_type, publisher)
            node.create_subscription(message_type, f"wire/{topic}", pass_on, reliable(depth), raw=True)

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


class SimulationRig:
    """The graph of config/deploy.yaml with the simulated robot, in real time."""

    BACKEND = "simulation"

    def __init__(self, checkpoints: Path, log_folder: Path) -> None:
        """Start it and wait until every node is there. Needs rclpy.init."""
        self.checkpoints, self.log_folder = checkpoints, log_folder
        self.limits: MotionLimits = load_limits("simulation", Contract())
        self.processes = {process.name: wire(process) for process in self.describe()}
        self.runners = {name: GraphRunner([process], log_folder) for name, process in self.processes.items()}
        self.extra: list[subprocess.Popen] = []
        self.nodes: list[Node] = []
        self.probe = Probe()
        self.relay = Relay(self.probe.node)
        self.sent: list[Sent] = []
        self.statuses: list[tuple[int, ControllerStatus]] = []
        listen = self.probe.node.create_subscription
        listen(RobotCommand, "sim/command", self._take_command, reliable(50))
        listen(ControllerStatus, "controller/status", self._take_status, LATCHED)
        self.policy = self.probe.hear(PolicyStatus, "policy/status", LATCHED)
        self.client = ActionClient(self.probe.node, RunSkill, "run_skill")
        self.goal = None
        for runner in self.runners.values():
            runner.start()

    def describe(self) -> list[Process]:
        """The processes of the graph."""
        return load_graph("deploy").resolve({"checkpoint": str(self.checkpoints), "commands_from": self.probe_name})

    @property
    def probe_name(self) -> str:
        """The node of the relay, from which alone the controller takes commands."""
        return f"probe_{os.getpid()}"

    def close(self) -> None:
        """End everything that was started."""
        self.mend_everything()
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
        client = self.probe.node.create_client(service_type, name)
        end_s = time.monotonic() + PATIENCE_S
        try:
            while time.monotonic() < end_s:
                if self._wait(client.service_is_ready, 5.0):
                    future = client.call_async(request or service_type.Request())
                    if self._wait(future.done, 5.0):
                        return future.result()
        finally:
            self.probe.node.destroy_client(client)
        raise AssertionError(f"{name}: no answer within {PATIENCE_S} s; {self.probe.diagnostics}")

    def add_publisher(self, name: str) -> object:
        """A second node that publishes on the command topic."""
        node = Node(name)
        self.nodes.append(node)
        return node.create_publisher(ActionChunk, "action_chunk", reliable(5))

    def flood(self) -> None:
        """Another process that publishes chunks as fast as it can; returns once it does."""
        self.extra.append(subprocess.Popen([sys.executable, __file__], start_new_session=True))
        self.probe.until(lambda: self.probe.node.count_publishers("action_chunk") > 1, PATIENCE_S)

    def load_other(self) -> LoadPolicy.Response:
        """Swap another checkpoint of the running skill in."""
        return self.call("policy/load", LoadPolicy, LoadPolicy.Request(path=str(self.checkpoints / "other")))

    def mend_everything(self) -> None:
        """Take back what `change`, `add_publisher`, `flood` and signals did; dead nodes are started again."""
        self.relay.changes.clear()
        for node in self.nodes:
            node.destroy_node()
        self.nodes.clear()
        for process in self.extra:
            process.kill()
            process.wait()
        self.extra.clear()
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
        """Put the arm to the left and let the policy move it; returns what had to be done so that it moves: a call or nothing."""
        resumed_by = "by itself"
        end_s = time.monotonic() + 2 * PATIENCE_S * attempts
        while not self._try_motion():
            assert time.monotonic() < end_s, f"no motion: {self.state}, {self.statuses[-1][1].reason}; {self.probe.diagnostics}"
            if self.state in ("FAULT", "USER_STOPPED") and self.call("controller/resume").success:
                resumed_by = "controller/resume"
        return resumed_by

    def _try_motion(self) -> bool:
        """One attempt: cancel, reset the scene, run the skill; true when commands that move were sent for a while."""
        if self.goal is not None and self.goal.done() and self.goal.result().accepted:
            cancelled = self.goal.result().cancel_goal_async()
            self._wait(cancelled.done, 3.0)
        self.goal = None
        state = np.zeros(39)
        state[:6], state[14] = (START_X_M, -0.2, 0.6, np.pi, 0, np.pi / 2), -1.0
        state[21:] = np.reshape([[-0.3 + 0.25 * index, -0.05, 0.46, 0, 0, 0] for index in range(3)], -1)
        reset = self.call("sim/reset", ResetSim, ResetSim.Request(state=state.tolist()))
        assert reset.success, reset.message
        if not self._wait(self.client.server_is_ready, PATIENCE_S) or self.state in ("FAULT", "USER_STOPPED"):
            return False
        self.goal = self.client.send_goal_async(RunSkill.Goal(skill=SKILL, max_steps=10_000))
        if not self._wait(self.goal.done, 5.0) or not self.goal.result().accepted:
            return False
        before = len(self.sent)

        def moves() -> bool:
            return sum(sent.moves for sent in self.sent[before:]) > 5

        self._wait(lambda: moves() or self.state in ("FAULT", "USER_STOPPED"), 10.0)
        return moves()

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        end_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end_s:
                return False
            self.probe.executor.spin_once(timeout_sec=0.02)
        return True

    def measure(self, fault: Fault) -> Outcome:
        """Put `fault` into the moving graph, wait until it shows, and say what happened. It stays in."""
        del self.sent[:-1]
        heard = len(self.statuses)
        begin_ns = time.time_ns()
        fault.inject(self)
        self._wait(lambda: self.state in fault.states, PATIENCE_S)
        self.probe.spin(fault.watch_s)
        end_ns = time.time_ns()
        moving = [sent.time_ns for sent in self.sent if sent.moves]
        held_ms = max(0.0, (max(moving, default=begin_ns) - begin_ns) / 1e6)
        noticed = [at_ns for at_ns, status in self.statuses[heard:] if status.state_name != "ACTIVE" and at_ns > begin_ns]
        newest = self.statuses[-1][1]
        shown = list(dict.fromkeys(status.state_name for _, status in self.statuses[heard:]))
        return Outcome(
            fault=fault.name,
            backend=self.BACKEND,
            held_ms=held_ms if fault.holds else None,
            noticed_ms=(noticed[0] - begin_ns) / 1e6 if noticed else None,
            at_rest=all(sent < end_ns - REST_NS for sent in moving),
            outside=count_outside(self.sent),
            commands=len(self.sent),
            state=" → ".join(shown) if fault.controller_lives else "none: its status is silent",
            reason=newest.reason if fault.controller_lives else "",
            states=shown,
        )

    def run(self, fault: Fault, attempts: int = 1) -> Outcome:
        """Bring the arm to motion, measure the fault, mend it and bring the arm to motion again."""
        self.mend_everything()
        self.bring_to_motion(attempts)
        outcome = self.measure(fault)
        self.mend_everything()
        outcome.resumed_by = "; ".join(filter(None, (fault.mended_by, self.bring_to_motion(attempts))))
        return outcome

    def _take_command(self, message: RobotCommand, info: dict) -> None:
        action = np.array(message.action, np.float32)
        self.sent.append(Sent(info["source_timestamp"], to_ns(message.header.stamp), action, message.hold))

    def _take_status(self, message: ControllerStatus, info: dict) -> None:
        self.statuses.append((info["source_timestamp"], message))


def wire(process: Process) -> Process:
    """The process with what it sends on WIRE going to the relay."""
    remaps = {topic: f"wire/{topic}" for topic, (_, _, sender) in WIRE.items() if sender == process.name}
    parameters = {"latent_timeout_s": 2.0} if process.name == "policy" else {}
    return replace(process, remaps=process.remaps | remaps, parameters=process.parameters | parameters)


def count_outside(sent: list[Sent]) -> int:
    """Commands that no robot should have been sent: not finite, outside [-1, 1], a gripper in between, or two for one tick."""
    outside, last_ns = 0, None
    for command in sent:
        fits = np.isfinite(command.action).all() and np.abs(command.action).max() <= 1 and abs(command.action[6]) == 1
        outside += not fits or command.stamp_ns == last_ns
        last_ns = command.stamp_ns
    return outside


# -- the faults ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One way to go wrong. states: one of which the controller must show; holds: whether the arm must come to rest."""

    name: str
    inject: Callable[[SimulationRig], object]
    states: tuple[str, ...] = ("HOLD", "FAULT")
    mended_by: str = ""
    holds: bool = True
    controller_lives: bool = True
    watch_s: float = 1.5  # how long is watched after the state has shown

    def __str__(self) -> str:
        return self.name


def set_actions(message: ActionChunk, actions: np.ndarray) -> list[ActionChunk]:
    """The chunk with other actions [H, A]; an empty one ends its stream and stays."""
    if message.horizon:
        message.horizon, message.action_dim = actions.shape
        message.actions = to_float32(actions)
    return [message]


def poison(message: ActionChunk) -> list[ActionChunk]:
    """NaN in one action and infinity in another."""
    actions = np.zeros((4, 7), np.float32)
    actions[1, 2], actions[2, 0] = np.nan, np.inf
    return set_actions(message, actions)


def shift(message: object, seconds: float) -> list[object]:
    """The message with another stamp."""
    message.header.stamp = to_time(to_ns(message.header.stamp) + round(seconds * 1e9))
    return [message]


def freeze() -> Change:
    """Every picture becomes the first one."""
    first: list[Image] = []

    def repeat(message: Image) -> list[Image]:
        first.append(message)
        message.data = first[0].data
        return [message]

    return repeat


def cut_network(rig: SimulationRig) -> None:
    """Nothing passes any more."""
    for topic in WIRE:
        rig.change(topic, lambda message: [])


def intrude(rig: SimulationRig) -> None:
    """A second node sends chunks that the gate would take: the right contract, checkpoint and time, full speed."""
    publisher = rig.add_publisher("intruder")

    def send_twice(message: ActionChunk) -> list[ActionChunk]:
        copy = ActionChunk(checkpoint_id=message.checkpoint_id, contract_id=message.contract_id, step_period=message.step_period)
        copy.header = message.header
        publisher.publish(set_actions(replace_horizon(copy), np.full((4, 7), 1.0, np.float32))[0])
        return [message]

    rig.change("action_chunk", send_twice)


def replace_horizon(message: ActionChunk) -> ActionChunk:
    """Mark a chunk as one that is not empty."""
    message.horizon = 1
    return message


FAULTS = (
    Fault("policy killed", lambda rig: rig.signal("policy", signal.SIGKILL), mended_by="policy started again"),
    Fault("policy hung", lambda rig: rig.signal("policy", signal.SIGSTOP), mended_by="policy goes on"),
    Fault("encoder killed", lambda rig: rig.signal("encoder", signal.SIGKILL), mended_by="encoder started again"),
    Fault("camera frozen", lambda rig: rig.change("camera/static/image_raw", freeze()), mended_by="pictures change again"),
    Fault("camera unplugged", lambda rig: rig.change("camera/static/image_raw", lambda message: []), mended_by="pictures come again"),
    Fault("NaN or infinite action", lambda rig: rig.change("action_chunk", poison), mended_by="finite actions"),
    Fault(
        "huge action",
        lambda rig: rig.change("action_chunk", lambda message: set_actions(message, np.full((4, 7), 1e6, np.float32))),
        mended_by="actions near [-1, 1]",
    ),
    Fault("action from the past", lambda rig: rig.change("action_chunk", lambda m: shift(m, -2.0)), mended_by="fresh chunks"),
    Fault(
        "chunk of the wrong shape",
        lambda rig: rig.change("action_chunk", lambda message: set_actions(message, np.zeros((4, 6), np.float32))),
        mended_by="chunks of 7 numbers",
    ),
    Fault("clock jump", lambda rig: rig.change("sim/state", lambda message: shift(message, 5.0)), mended_by="the clock is right again"),
    Fault("network cut", cut_network, states=("HOLD", "FAULT", "DISCONNECTED"), mended_by="the network is back"),
    Fault("user stop", lambda rig: rig.call("controller/stop"), states=("USER_STOPPED",)),
    Fault(
        "controller killed",
        lambda rig: rig.signal("franka_controller", signal.SIGKILL),
        states=("ACTIVE",),
        mended_by="controller started again",
        controller_lives=False,
    ),
    Fault(
        "bridge killed", lambda rig: rig.signal("calvin_bridge", signal.SIGKILL), states=("DISCONNECTED",), mended_by="bridge started again"
    ),
    Fault("DDS peer flooding the command topic", lambda rig: rig.flood(), mended_by="the peer is gone"),
    Fault("second publisher on the command topic", intrude, mended_by="the publisher is gone"),
    Fault("swap during motion", lambda rig: rig.load_other(), states=("ACTIVE",), holds=False),
)


RIGS = {rig.BACKEND: rig for rig in (SimulationRig,)}


def flood_command_topic() -> None:
    """What the flooding process does: valid-looking chunks without a pause, until it is killed."""
    import rclpy

    rclpy.init()
    node = rclpy.create_node("flood")
    publisher = node.create_publisher(ActionChunk, "action_chunk", reliable(5))
    message = ActionChunk(checkpoint_id="f" * 64, contract_id=Contract().identity, horizon=4, action_dim=7)
    message.actions = to_float32(np.ones((4, 7)))
    while True:
        message.header.stamp = node.get_clock().now().to_msg()
        publisher.publish(message)


if __name__ == "__main__":
    flood_command_topic()
