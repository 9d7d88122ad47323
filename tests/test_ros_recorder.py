"""The recorder node on a graph of one publisher: services, marks, the action, faults, late and unreliable publishers."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from action_msgs.msg import GoalStatus
from diwa_interfaces.action import RecordEpisode
from diwa_interfaces.msg import (
    ControllerStatus,
    EpisodeMark,
    EpisodeReport,
    ExecutedAction,
    PolicyHistory,
    RecorderStatus,
    ShadowReport,
    SimState,
    Surprise,
    SwapEvent,
)
from diwa_interfaces.srv import MarkEpisode, SaveRecent, StartRecording, StopRecording
from geometry_msgs.msg import PoseStamped
from rclpy.action import ActionClient
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from rclpy.serialization import deserialize_message
from ros_support import Probe, private_graph
from rosbags.rosbag2 import Reader
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from diwa_core.contract import Contract
from diwa_core.data.bag_audit import rated_topics
from diwa_core.data.bag_format import Recording
from diwa_core.data.bag_recover import recover_bag
from diwa_core.errors import ConfigError
from diwa_ros.definitions import message_class
from diwa_ros.messages import LATCHED, reliable, to_time
from diwa_ros.recorder import Recorder

CONTRACT = Contract()
STEP_NS, BEGIN_NS = 33_333_333, 1_000_000_000_000
TYPES = {
    **{stream.topic: Image for stream in CONTRACT.images},
    "joint_states": JointState,
    "current_pose": PoseStamped,
    "target_pose": PoseStamped,
    "executed_action": ExecutedAction,
}


@pytest.fixture(scope="module", autouse=True)
def ros():
    with private_graph():
        yield


class Graph:
    """Publishes the contract's topics, as many frames as a test wants, and knows what was sent."""

    def __init__(self, folder: Path, image_qos: object = None, **parameters: object) -> None:
        self.probe, self.frame, self.sent = Probe(), 0, {}
        self.publishers = {
            topic: self.probe.node.create_publisher(kind, topic, image_qos if image_qos and kind is Image else reliable(100))
            for topic, kind in TYPES.items()
        }
        overrides = {"folder": str(folder), "mode": "lockstep", "min_free_mib": 0, "after_fault_s": 0.1, **parameters}
        self.node = Recorder(parameter_overrides=[Parameter(name, value=value) for name, value in overrides.items()])
        self.node.start()
        self.probe.add(self.node)
        self.reports = self.probe.hear(EpisodeReport, "recorder/episode")
        self.status = self.probe.hear(RecorderStatus, "recorder/status", LATCHED)
        self.probe.until(lambda: all(publisher.get_subscription_count() for publisher in self.publishers.values()), 60)

    def send(self, frames: int, without: str = "") -> None:
        """Publish, and wait until the recorder has everything."""
        for _ in range(frames):
            self.frame += 1
            for topic, kind in TYPES.items():
                if topic == without:
                    continue
                message = kind()
                message.header.stamp = to_time(BEGIN_NS + self.frame * STEP_NS)
                if kind is Image:
                    message.height, message.width, message.encoding, message.step = 64, 64, "rgb8", 192
                    message.data = bytes([self.frame % 251]) * (64 * 192)
                self.sent.setdefault(topic, []).append(message)
                self.publishers[topic].publish(message)
            self.probe.spin(0.002)
        last = BEGIN_NS + self.frame * STEP_NS
        self.probe.until(lambda: self.newest() == last, 60)
        self.probe.spin(0.2)

    def newest(self) -> int:
        """Stamp of the newest executed action that the recorder has taken."""
        packets = (packet for packet in reversed(self.node.recorder.recent.packets) if packet.topic == "/executed_action")
        packet = next(packets, None)
        if packet is None:
            return 0
        stamp = deserialize_message(packet.data, ExecutedAction).header.stamp
        return stamp.sec * 1_000_000_000 + stamp.nanosec

    def start(self, name: str, skill: str = "") -> Path:
        answer = self.probe.call(StartRecording, "recorder/start", StartRecording.Request(name=name, skill=skill), 60)
        assert answer.success, answer.message
        return Path(answer.bag)

    def stop(self, outcome: str = "") -> StopRecording.Response:
        return self.probe.call(StopRecording, "recorder/stop", StopRecording.Request(outcome=outcome), 60)

    def close(self) -> None:
        self.node.stop()
        self.probe.close()


@pytest.fixture
def make_graph(tmp_path):
    graphs = []

    def make(**options):
        graphs.append(Graph(tmp_path / "bags", **options))
        return graphs[-1]

    yield make
    for graph in graphs:
        graph.close()


def read(bag: Path) -> tuple[dict[str, list[bytes]], Recording]:
    """Topic -> serialized messages, and our own entries."""
    found: dict[str, list[bytes]] = {}
    with Reader(bag) as reader:
        for connection, _, data in reader.messages():
            found.setdefault(connection.topic, []).append(bytes(data))
    information = yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    return found, Recording.from_custom_data(information["custom_data"])


def test_every_message_of_every_topic_is_in_the_bag(make_graph):
    graph = make_graph()
    bag = graph.start("play", "open_drawer")
    graph.send(40)
    marked = graph.probe.call(MarkEpisode, "recorder/mark", MarkEpisode.Request(outcome="success", note="neat"), 60)
    assert marked.success and not marked.episode.bad and marked.episode.skill == "open_drawer", marked
    graph.send(20)
    stopped = graph.stop("failure")
    assert stopped.success and [episode.outcome for episode in stopped.episodes] == ["success", "failure"]
    found, recording = read(bag)
    assert {topic: [deserialize_message(data, kind) for data in found[f"/{topic}"]] for topic, kind in TYPES.items()} == graph.sent
    (mark,) = found["/episode_mark"]
    assert deserialize_message(mark, EpisodeMark).outcome == "success"
    assert recording.contract == CONTRACT and not any(episode.bad for episode in recording.episodes)
    assert [report.outcome for report in graph.reports] == ["success", "failure"]
    graph.probe.until(lambda: graph.status[-1].state == RecorderStatus.STATE_IDLE)


def test_types_in_the_bag_are_those_of_the_graph(make_graph):
    graph = make_graph()
    bag = graph.start("play")
    graph.send(5)
    graph.stop()
    with Reader(bag) as reader:
        connections = {connection.topic: connection for connection in reader.connections}
        for topic, kind in TYPES.items():
            connection = connections[f"/{topic}"]
            assert message_class(connection.msgtype) is kind
            (info,) = graph.probe.node.get_publishers_info_by_topic(topic)
            assert connection.digest == str(info.topic_type_hash)
            assert connection.ext.offered_qos_profiles[0].reliability.name == "RELIABLE"


def test_an_operator_s_mark_ends_the_episode_and_is_refused_without_one(make_graph):
    graph = make_graph()
    marks = graph.probe.node.create_publisher(EpisodeMark, "episode_mark", reliable(10))
    graph.probe.until(lambda: marks.get_subscription_count(), 60)
    marks.publish(EpisodeMark(outcome="success", source="operator"))
    graph.probe.until(lambda: "found none" in graph.probe.diagnostics.get("recorder: mark", (b"", ""))[1])
    graph.start("play")
    graph.send(10)
    marks.publish(EpisodeMark(outcome="discard", skill="close_drawer", source="operator"))
    graph.probe.until(lambda: len(graph.reports) == 1)
    assert (graph.reports[0].outcome, graph.reports[0].skill, graph.reports[0].index) == ("discard", "close_drawer", 0)
    marks.publish(EpisodeMark(outcome="great", source="operator"))
    graph.probe.until(lambda: "found 'great'" in graph.probe.diagnostics["recorder: mark"][1])
    assert graph.probe.call(MarkEpisode, "recorder/mark", MarkEpisode.Request(outcome="great")).message


def test_a_topic_that_lost_frames_makes_the_episode_bad(make_graph):
    graph = make_graph()
    graph.start("play")
    graph.send(30)
    graph.send(20, without="joint_states")
    graph.send(10)
    (episode,) = graph.stop("success").episodes
    assert episode.bad and episode.reason.startswith("/joint_states: 18 of 60 frames missing")
    lost = dict(zip(episode.topics, episode.missing, strict=True))
    assert lost["/joint_states"] == 18 and lost["/executed_action"] == 0


def test_a_reset_of_the_simulation_ends_the_episode(make_graph):
    graph = make_graph()
    states = graph.probe.node.create_publisher(SimState, "sim/state", reliable(10))
    graph.probe.until(lambda: states.get_subscription_count(), 60)
    graph.start("play")
    for episode in (1, 2):
        states.publish(SimState(episode=episode))
        graph.send(5)
    episodes = graph.stop().episodes
    assert [episode.note for episode in episodes] == ["the simulation was reset", ""]


def test_a_fault_and_a_request_save_the_last_seconds(make_graph):
    graph = make_graph()
    graph.send(30)
    asked = graph.probe.call(SaveRecent, "recorder/save", SaveRecent.Request(reason="odd noise"), 60)
    found, recording = read(Path(asked.bag))
    assert len(found["/executed_action"]) == 30 and recording.notes["reason"] == "odd noise"
    status = graph.probe.node.create_publisher(ControllerStatus, "controller/status", LATCHED)
    status.publish(ControllerStatus(state=ControllerStatus.ACTIVE))
    graph.probe.until(lambda: graph.node.controller_state == ControllerStatus.ACTIVE, 60)
    status.publish(ControllerStatus(state=ControllerStatus.FAULT, state_name="FAULT", reason="policy silent"))
    graph.probe.until(lambda: "policy silent" in graph.probe.diagnostics.get("recorder: recent", (b"", ""))[1], 60)
    bags = sorted((graph.node.recorder.settings.folder).iterdir())
    assert len(bags) == 2 and max(read(bag)[1].notes["reason"] for bag in bags) == "odd noise"
    assert min(read(bag)[1].notes["reason"] for bag in bags) == "FAULT: policy silent"


def test_a_surprise_is_saved_once_while_the_arm_works(make_graph):
    graph = make_graph()
    graph.send(30)
    surprise = graph.probe.node.create_publisher(Surprise, "world_model/surprise", reliable(10))
    status = graph.probe.node.create_publisher(ControllerStatus, "controller/status", LATCHED)
    heard = []
    graph.node.readers["/world_model/surprise"] = lambda data: (graph.node.read_surprise(data), heard.append(data))
    for state, alarm in ((ControllerStatus.IDLE, True), (ControllerStatus.ACTIVE, False), (ControllerStatus.ACTIVE, True)):
        status.publish(ControllerStatus(state=state))
        graph.probe.until(lambda state=state: graph.node.controller_state == state, 60)
        assert graph.node.fault is None
        graph.probe.until(surprise.get_subscription_count, 60)
        count = len(heard)
        surprise.publish(Surprise(alarm=alarm, worst="rgb_static, 4 ahead"))
        graph.probe.until(lambda count=count: len(heard) > count, 60)
    surprise.publish(Surprise(alarm=True, worst="arm, 1 ahead"))  # part of the same
    graph.probe.until(lambda: "rgb_static, 4 ahead" in graph.probe.diagnostics.get("recorder: recent", (b"", ""))[1], 60)
    assert graph.node.fault is None and len(list(graph.node.recorder.settings.folder.iterdir())) == 1


def test_unreliable_late_and_further_topics_are_recorded(make_graph):
    graph = make_graph(image_qos=qos_profile_sensor_data, extra_topics="speech")
    bag = graph.start("play")
    late = graph.probe.node.create_publisher(String, "speech", LATCHED)
    late.publish(String(data="now"))
    graph.probe.until(lambda: "speech" in graph.node.listening, 60)
    graph.send(5)
    graph.stop()
    found, _ = read(bag)
    assert [deserialize_message(data, String).data for data in found["/speech"]] == ["now"]
    assert found[rated_topics(CONTRACT)[0]]


def test_swaps_and_shadows_are_recorded(make_graph):
    """The history was published before the recorder listened; a shadow begins while it records."""
    graph = make_graph()
    history = graph.probe.node.create_publisher(PolicyHistory, "policy/history", LATCHED)
    history.publish(PolicyHistory(events=[SwapEvent(event=SwapEvent.TOOK_OVER, skill="open_drawer", checkpoint_id="a" * 64)]))
    graph.probe.until(lambda: "/policy/history" in graph.node.recorder.latched, 60)
    bag = graph.start("play")
    shadow = graph.probe.node.create_publisher(ShadowReport, "policy/shadow", reliable(10))
    graph.probe.until(shadow.get_subscription_count, 60)
    shadow.publish(ShadowReport(skill="open_drawer", checkpoint_id="b" * 64, difference=0.25))
    graph.send(5)
    graph.stop()
    found, _ = read(bag)
    (events,) = [deserialize_message(data, PolicyHistory).events for data in found["/policy/history"]]
    (report,) = [deserialize_message(data, ShadowReport) for data in found["/policy/shadow"]]
    assert events[0].checkpoint_id == "a" * 64 and (report.checkpoint_id, report.difference) == ("b" * 64, 0.25)


def test_the_action_records_until_it_is_marked_or_cancelled(make_graph):
    graph = make_graph()
    client = ActionClient(graph.probe.node, RecordEpisode, "record")
    graph.probe.until(client.server_is_ready, 60)

    def begin():
        goal = client.send_goal_async(RecordEpisode.Goal(skill="open_drawer"))
        graph.probe.until(goal.done, 60)
        graph.probe.until(lambda: graph.node.recorder.recording is not None, 60)
        return goal.result()

    first = begin()
    ended = first.get_result_async()
    graph.send(10)
    graph.probe.call(MarkEpisode, "recorder/mark", MarkEpisode.Request(outcome="success"), 60)
    graph.probe.until(ended.done, 60)
    assert ended.result().status == GoalStatus.STATUS_SUCCEEDED
    assert [episode.outcome for episode in ended.result().result.episodes] == ["success"]
    second = begin()
    refused = client.send_goal_async(RecordEpisode.Goal())
    graph.probe.until(refused.done, 60)
    assert not refused.result().accepted
    ended = second.get_result_async()
    graph.send(5)
    graph.probe.until(second.cancel_goal_async().done, 60)
    graph.probe.until(ended.done, 60)
    assert ended.result().status == GoalStatus.STATUS_CANCELED and Path(ended.result().result.bag, "metadata.yaml").exists()


def test_a_second_start_is_refused_and_deactivation_closes_the_bag(make_graph):
    graph = make_graph()
    bag = graph.start("play")
    graph.send(5)
    again = graph.probe.call(StartRecording, "recorder/start", StartRecording.Request(name="other"))
    assert not again.success and "no recording in progress" in again.message
    graph.node.trigger_deactivate()
    assert len(read(bag)[0]["/executed_action"]) == 5
    assert "inactive" in graph.probe.call(StartRecording, "recorder/start", StartRecording.Request()).message


def test_a_wrong_compression_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'zstd'"):
        Recorder(parameter_overrides=[Parameter("compression", value="zstt")])


def test_a_killed_recorder_leaves_a_bag_that_can_be_recovered(tmp_path):
    """The process is killed while it records; a probe of this process publishes."""
    probe = Probe()
    publisher = probe.node.create_publisher(ExecutedAction, "executed_action", reliable(100))
    status = probe.hear(RecorderStatus, "recorder/status", LATCHED)
    words = [f"folder:={tmp_path}", "name:=play", "record_at_start:=true", "min_free_mib:=0"]
    command = [sys.executable, "-m", "diwa_ros.recorder", "--ros-args", *(word for given in words for word in ("-p", given))]
    process = subprocess.Popen(command)
    try:
        probe.until(lambda: publisher.get_subscription_count() and status, 120)
        sent = 0
        while not (status[-1].messages >= 100):
            sent += 1
            message = ExecutedAction()
            message.header.stamp = to_time(BEGIN_NS + sent * STEP_NS)
            publisher.publish(message)
            probe.spin(0.01)
            assert sent < 10_000
        safe = status[-1].messages  # counted a status ago
        heard = len(status)
        probe.until(lambda: len(status) > heard + 2, 60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
        process.wait()
        probe.close()
    assert recover_bag(tmp_path / "play").messages >= safe
    found, recording = read(tmp_path / "play")
    assert found["/executed_action"] and "recovered" in recording.episodes[-1].note
