"""Who can reach the graph and who may command it: sockets, publishers, and what SROS 2 would allow."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from diwa_interfaces.msg import ActionChunk, ControllerStatus, RobotCommand, SimState
from rclpy.node import Node
from rclpy.parameter import Parameter
from ros_support import Probe, make_checkpoints, make_graph, private_graph
from std_srvs.srv import Trigger

from diwa_core.cli.main import main
from diwa_core.contract import Contract, hold_action
from diwa_core.errors import ConfigError, DiwaError
from diwa_ros.access import UNKNOWN, CommandSource, judge_publishers
from diwa_ros.finetune import FinetuneNode
from diwa_ros.franka_controller import FrankaController
from diwa_ros.graph import Process, load_graph
from diwa_ros.messages import LATCHED, reliable, to_duration, to_float32, to_time
from diwa_ros.recorder import MARKS, TOPICS, Recorder
from diwa_ros.security import node_access, write_policies
from diwa_ros.teleop import Teleop

STEP = 33_333_333
START_S = 150  # until the nodes of a graph are there, on a busy machine
NODES = ("calvin_bridge", "franka_controller", "encoder", "policy")


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """The deployed graph as processes, and a probe beside it."""
    checkpoints = make_checkpoints(tmp_path_factory.mktemp("checkpoints"))
    with private_graph(), make_graph(checkpoints, tmp_path_factory.mktemp("logs"), mode="lockstep") as runner:
        probe = Probe()
        probe.until(lambda: set(NODES) <= set(probe.node.get_node_names()), START_S)
        probe.until(lambda: [name for name, _ in probe.node.get_service_names_and_types() if name == "/policy/load"], START_S)
        yield runner, probe
        probe.close()


# -- sockets ---------------------------------------------------------------------------------------------------------------------------


def listening_addresses(pid):
    """Local addresses of the internet sockets of a process, by protocol; raises FileNotFoundError when it has ended."""
    links = (os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd"))
    inodes = {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
    found = []
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes:
                found.append((protocol, fields[1].split(":")[0]))
    return found


def is_loopback(protocol, address):
    """Whether a hexadecimal address of /proc/net is 127.0.0.0/8 or ::1."""
    if protocol.endswith("6"):
        return address == "00000000000000000000000001000000" or (address.startswith("0000000000000000FFFF0000") and address.endswith("7F"))
    return address.endswith("7F")


def test_every_socket_of_the_graph_is_on_the_loopback_interface(graph):
    runner, _ = graph
    for name, pid in runner.pids.items():
        sockets = listening_addresses(pid)
        assert sockets, f"{name} has no socket: this test looks at the wrong process"
        assert [socket for socket in sockets if not is_loopback(*socket)] == [], name


def test_the_test_of_the_sockets_can_fail():
    """A process that listens on every interface is found."""
    code = "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 0)); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert [socket for socket in listening_addresses(process.pid) if not is_loopback(*socket)]
    finally:
        process.communicate()


# -- SROS 2 ----------------------------------------------------------------------------------------------------------------------------


def resolve(names, process):
    """Absolute names of an Access."""
    own = f"/{process.name}/"
    return {own + name[2:] if name.startswith("~/") else name if name.startswith("/") else f"/{name}" for name in names}


def split_actions(names):
    """(plain names, names of actions) of topics or services."""
    actions = {name.split("/_action/")[0] for name in names if "/_action/" in name}
    return {name for name in names if "/_action/" not in name}, actions


@pytest.mark.parametrize("name", NODES)
def test_the_policies_allow_exactly_what_each_node_does(graph, name):
    """Less would break the graph under SROS 2, more would let a node do what is not its work."""
    _, probe = graph
    process = next(process for process in load_graph("deploy").resolve() if process.name == name)
    access = node_access(process)
    node = probe.node

    def found():
        queries = (
            node.get_publisher_names_and_types_by_node,
            node.get_subscriber_names_and_types_by_node,
            node.get_service_names_and_types_by_node,
            node.get_client_names_and_types_by_node,
        )
        plain, actions = zip(*(split_actions(topics(query, name)) for query in queries), strict=True)
        return [*plain, actions[0]]

    expected = [resolve(names, process) for names in access.fields()[:5]]
    probe.until(lambda: all(some <= more for some, more in zip(expected, found(), strict=True)), START_S)
    assert found() == expected


@pytest.mark.parametrize("make", [Recorder, FinetuneNode, Teleop])
def test_the_policies_of_the_nodes_beside_the_graph(graph, make, tmp_path):
    """Recorder, fine-tuning and teleoperation join a graph that runs; the recorder listens to what is published of its list."""
    runner, probe = graph
    checkpoints = next(process for process in runner.processes if process.name == "encoder").parameters["world_model"]
    values = {"checkpoints": str(Path(checkpoints).parent), "folder": str(tmp_path), "runs": str(tmp_path)}
    overrides = [Parameter(name, value=value) for name, value in values.items() if name in {p.name for p in make.PARAMETERS}]
    node = make(parameter_overrides=overrides)
    node.start()
    probe.add(node)
    try:
        name, me = node.get_name(), probe.node
        access = node_access(Process(name, name, "", True, {}, {}, {}))
        publish, subscribe, serve, call, execute = (
            resolve(names, Process(name, name, "", True, {}, {}, {})) for names in access.fields()[:5]
        )
        probe.until(lambda: serve <= topics(me.get_service_names_and_types_by_node, name), START_S)
        probe.until(lambda: publish <= topics(me.get_publisher_names_and_types_by_node, name), START_S)
        published, actions = split_actions(topics(me.get_publisher_names_and_types_by_node, name))
        assert (published, actions) == (publish, execute)
        assert split_actions(topics(me.get_service_names_and_types_by_node, name)) == (serve, execute)
        assert topics(me.get_client_names_and_types_by_node, name) == call == set()
        heard = topics(me.get_subscriber_names_and_types_by_node, name)
        assert heard <= subscribe if make is Recorder else heard == subscribe
    finally:
        probe.executor.remove_node(node)
        node.stop()


def test_the_recorder_may_hear_what_it_records():
    allowed = set(node_access(Process("recorder", "recorder", "", True, {}, {}, {})).subscribe)
    assert {*TOPICS, MARKS, *(stream.topic for stream in Contract().images)} <= allowed
    more = node_access(Process("recorder", "recorder", "", True, {"extra_topics": "speech, odometry"}, {}, {})).subscribe
    assert {"speech", "odometry"} <= set(more)


def topics(query, name):
    """Names that a node has, as the graph knows them."""
    return {topic for topic, _ in query(name, "/")}


def test_only_one_enclave_may_publish_commands_and_the_operator_may_not(tmp_path):
    write_policies(load_graph("deploy").resolve(), tmp_path)
    root = ElementTree.parse(tmp_path / "policies.xml").getroot()
    may_publish = {
        enclave.attrib["path"]
        for enclave in root.iter("enclave")
        for topics in enclave.iter("topics")
        if "publish" in topics.attrib and "action_chunk" in [topic.text for topic in topics]
    }
    assert may_publish == {"/policy"}
    assert {enclave.attrib["path"] for enclave in root.iter("enclave")} == {*(f"/{name}" for name in NODES), "/operator"}


def test_the_teleoperation_may_command_only_where_the_controller_obeys_it(tmp_path):
    assert main(["security", "deploy", "real:=true", "commands_from:=policy,teleop", "--also", "loop", "--out", str(tmp_path)]) == 0
    root = ElementTree.parse(tmp_path / "policies.xml").getroot()
    enclaves = {enclave.attrib["path"]: enclave for enclave in root.iter("enclave")}
    nodes = {"/franka_controller", "/encoder", "/policy", "/recorder", "/finetune", "/teleop", "/operator"}
    assert set(enclaves) == nodes
    may_command = {
        path
        for path, enclave in enclaves.items()
        for topics in enclave.iter("topics")
        if "publish" in topics.attrib and "action_chunk" in [topic.text for topic in topics]
    }
    assert may_command == {"/policy", "/teleop"}


def test_the_command_writes_both_files_and_says_what_comes_next(tmp_path, capsys):
    assert main(["security", "deploy", "sim:=false", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "--enclave /franka_controller" in printed and "ROS_SECURITY_STRATEGY=Enforce" in printed
    script = tmp_path / "make_keystore.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "create_enclave keystore /policy\n" in script.read_text()
    subprocess.run(["sh", "-n", script], check=True)
    robot = next(e for e in ElementTree.parse(tmp_path / "policies.xml").iter("enclave") if e.attrib["path"] == "/franka_controller")
    assert "sim/command" not in [topic.text for topic in robot.iter("topic")]


def test_an_unknown_node_and_remaps_are_not_guessed():
    process = Process("x", "unheard_of", "", True, {}, {}, {})
    with pytest.raises(ConfigError, match="expected one of calvin_bridge"):
        node_access(process)
    remapped = Process("policy", "policy", "", True, {}, {"action_chunk": "wire/action_chunk"}, {})
    assert "wire/action_chunk" in node_access(remapped).publish and "action_chunk" not in node_access(remapped).publish


# -- who may command -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "publishers, accepted, intruder, words",
    [
        ([], False, False, "nobody"),
        ([("/policy", "a")], True, False, "commands come from /policy"),
        ([("/rogue", "a")], False, True, "expected commands of /policy only, found publishers /rogue"),
        ([("/policy", "a"), ("/rogue", "b")], False, True, "/policy, /rogue"),
        ([("/policy", "a"), ("/policy", "b")], False, True, "expected one publisher"),
        ([(UNKNOWN, "a")], False, False, "not yet known"),
        ([("/policy", "a"), (UNKNOWN, "b")], False, True, UNKNOWN),
    ],
)
def test_commands_are_taken_from_the_named_publisher_alone(publishers, accepted, intruder, words):
    verdict = judge_publishers(publishers, ("/policy",))
    assert (verdict.accepted, verdict.intruder) == (accepted, intruder) and words in verdict.text


def test_two_named_nodes_may_both_be_there():
    verdict = judge_publishers([("/teleop", "a"), ("/policy", "b")], ("/policy", "/teleop"))
    assert verdict.accepted and verdict.publishers == {"/policy": "b", "/teleop": "a"}


class PublisherInfo:
    """What rclpy says about one publisher."""

    def __init__(self, name, gid):
        self.node_namespace, self.node_name, self.endpoint_gid = "/", name, [gid]


class PretendedNode:
    """Knows whatever publishers it is given."""

    def __init__(self, *publishers):
        self.publishers = publishers

    def get_namespace(self):
        return "/"

    def get_publishers_info_by_topic(self, topic):
        return self.publishers


def test_a_message_of_somebody_who_has_gone_again_is_not_taken():
    """It joined, sent and left between two looks at the graph; its messages are counted from 1."""
    node = PretendedNode(PublisherInfo("policy", 1))
    source = CommandSource(node, "/action_chunk", ("policy",))
    assert [source.takes(number) for number in (7, 8, 1, 8, 9)] == [True, True, False, False, True]
    node.publishers = (PublisherInfo("policy", 2),)  # started again: counts anew
    assert source.takes(1)
    node.publishers = ()
    assert not source.takes(2)


class Arm:
    """A controller in a namespace of its own, a pretended robot, and publishers of chunks under any name."""

    def __init__(self):
        self.probe, self.n, self.nodes = Probe(), 1000, {}
        limits = {"command_sources": "brain", "hold_after_s": 2.0, "stop_after_s": 10.0, "robot_timeout_s": 60.0, "max_clock_jump_s": 10.0}
        overrides = [Parameter(name, value=value) for name, value in limits.items()]
        self.controller = FrankaController(namespace="arm", parameter_overrides=overrides)
        self.probe.add(self.controller)
        self.controller.start()
        self.states = self.probe.node.create_publisher(SimState, "arm/sim/state", reliable(10))
        self.commands = self.probe.hear(RobotCommand, "arm/sim/command")
        self.statuses = self.probe.hear(ControllerStatus, "arm/controller/status", LATCHED)
        self.probe.until(lambda: self.states.get_subscription_count() and self.controller.count_subscribers("sim/command"))
        self.until(lambda: self.state == "IDLE")

    @property
    def state(self):
        return self.statuses[-1].state_name if self.statuses else ""

    def tick(self):
        self.n += 1
        state = SimState(tick=self.n, applied_action=hold_action(1.0))
        state.header.stamp = to_time(self.n * STEP)
        self.states.publish(state)

    def until(self, condition):
        """Tick until it holds."""

        def tick_and_look():
            if not condition():
                self.tick()
                self.probe.spin(0.03)
            return condition()

        self.probe.until(tick_and_look, 30)

    def publisher(self, name):
        """A publisher of chunks that the controller has found, with the name of its node."""
        self.nodes[name] = Node(name, namespace="arm")
        publisher = self.nodes[name].create_publisher(ActionChunk, "action_chunk", reliable(5))
        source = self.controller.source
        self.probe.until(lambda: publisher.get_subscription_count() and f"/arm/{name}" in source.look().publishers, 30)
        return publisher

    def leave(self, name):
        """The node goes; waits until the controller knows."""
        self.nodes.pop(name).destroy_node()
        self.probe.until(lambda: f"/arm/{name}" not in self.controller.source.look().publishers, 30)

    def send(self, publisher, value):
        chunk = ActionChunk(checkpoint_id="p" * 64, contract_id=Contract().identity, step_period=to_duration(STEP), horizon=4, action_dim=7)
        chunk.header.stamp, chunk.actions = to_time(self.n * STEP), to_float32(np.full((4, 7), value))
        publisher.publish(chunk)

    def close(self):
        self.probe.executor.remove_node(self.controller)
        self.controller.stop()
        for node in self.nodes.values():
            node.destroy_node()
        self.probe.close()


@pytest.fixture
def arm(graph):
    arm = Arm()
    yield arm
    arm.close()


def test_a_second_publisher_of_commands_holds_the_arm_until_somebody_resumes(arm):
    brain = arm.publisher("brain")
    arm.until(lambda: arm.send(brain, 0.5) or (arm.commands and arm.state == "ACTIVE"))
    rogue = arm.publisher("rogue")
    arm.until(lambda: arm.send(rogue, 1.0) or arm.state == "FAULT")
    count = len(arm.commands)
    assert all(command.action[0] == 0.5 for command in arm.commands)
    assert "/arm/brain, /arm/rogue" in arm.statuses[-1].reason
    assert arm.probe.diagnostics["franka_controller: command source"][0] == b"\x02"
    refused = arm.probe.call(Trigger, "arm/controller/resume")
    assert not refused.success and "/arm/rogue" in refused.message
    arm.leave("rogue")
    assert arm.probe.call(Trigger, "arm/controller/resume").success
    assert len(arm.commands) == count
    arm.until(lambda: arm.send(brain, 0.25) or len(arm.commands) > count)
    assert arm.commands[-1].action[0] == 0.25


def test_a_stranger_is_not_obeyed_even_when_it_is_alone(arm):
    stranger = arm.publisher("stranger")
    dropped = arm.controller.gate.drops
    arm.until(lambda: arm.send(stranger, 1.0) or dropped.foreign > 3)
    assert not arm.commands and arm.state == "IDLE"
    assert "expected commands of /arm/brain only" in arm.probe.diagnostics["franka_controller: command source"][1]


def test_the_diagnostics_show_from_whom_commands_are_taken(arm):
    brain = arm.publisher("brain")
    arm.until(lambda: arm.send(brain, 0.5) or arm.commands)
    check = arm.controller.diagnostics.checks["command source"]
    assert check.message == "commands come from /arm/brain" and len(check.values["/arm/brain"]) == 32


def test_a_controller_that_obeys_nobody_does_not_start(graph):
    controller = FrankaController(parameter_overrides=[Parameter("command_sources", value=" , ")])
    with pytest.raises(DiwaError, match="expected the name of a node"):
        controller.start()
    controller.stop()
