"""Records the topics of the contract as serialized bytes: start, stop, marks, the last seconds on request or on a fault.

What is written, and when, is decided in diwa_core/data/bag_recorder.py; this node finds the topics, hands their messages over and reports.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future as WorkFuture
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diwa_interfaces.action import RecordEpisode
from diwa_interfaces.msg import ControllerStatus, EpisodeMark, EpisodeReport, LatentState, PolicyStatus, RecorderStatus, SimState, Surprise
from diwa_interfaces.srv import MarkEpisode, SaveRecent, StartRecording, StopRecording
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message, serialize_message
from rclpy.subscription import Subscription
from rclpy.task import Future

from diwa_core.data.bag_audit import MAX_LOSS, rated_topics
from diwa_core.data.bag_format import UNMARKED, Episode
from diwa_core.data.bag_recorder import BagRecorder, ClosedBag, Packet, RecorderSettings
from diwa_core.data.bag_writer import COMPRESSIONS
from diwa_core.errors import DataError, DiwaError
from diwa_ros.contracts import CONTRACT, MODE, read_contract
from diwa_ros.definitions import describe_topic, message_class
from diwa_ros.diagnostics import ERROR, OK, WARN
from diwa_ros.messages import LATCHED, reliable, to_time
from diwa_ros.node import DiwaNode, run_node
from diwa_ros.parameters import Parameter

TOPICS = (  # besides the contract's cameras
    "joint_states",
    "current_pose",
    "target_pose",
    "sim/state",
    "sim/command",
    "executed_action",
    "latent",
    "latent/candidate",
    "world_model/surprise",
    "action_chunk",
    "policy/status",
    "policy/history",
    "policy/shadow",
    "controller/status",
    "/diagnostics",
)
MARKS = "episode_mark"
DEPTH = 120  # messages the middleware keeps while this process waits for the processor
DISCOVER_S, LOOK_AGAIN = 0.25, 8  # topics without a publisher are looked for this often; those with one each `LOOK_AGAIN` times
IDENTITY_S = 1.0  # how often a latent is read for the identity of its world model
CLOSE_LIMIT_S = 20.0  # at the end of the process
FAULTS = (ControllerStatus.REFLEX, ControllerStatus.FAULT)
WORKING = (None, ControllerStatus.ACTIVE, ControllerStatus.HOLD)  # or no controller is heard


@dataclass
class Listening:
    """One subscription and what its publishers offered when it was made."""

    subscription: Subscription
    is_reliable: bool


class Recorder(DiwaNode):
    """Writes at most one bag at a time, in a thread of its own at low priority; a bag that is saved afterwards goes beside it."""

    NAME = "recorder"
    PARAMETERS = (
        CONTRACT,
        MODE,
        Parameter("folder", "runs/bags", "Folder in which bags are made."),
        Parameter("extra_topics", "", "Further topics, separated by commas; their types come from their publishers."),
        Parameter("compression", "none", "Of MCAP chunks. Images from a camera hardly shrink.", choices=tuple(COMPRESSIONS)),
        Parameter("record_at_start", False, "Start a recording when the node becomes active."),
        Parameter("name", "", "Folder name of that first bag; empty: skill and time."),
        Parameter("skill", "", "What is tried, in that first bag."),
        Parameter("max_loss", MAX_LOSS, "Share of a topic's frames that an episode may lack before it is marked bad.", 0.0, 1.0),
        Parameter("recent_s", 30.0, "Seconds kept in memory for recorder/save and for faults; 0 keeps nothing.", 0.0, 3600.0),
        Parameter("recent_mib", 512, "Memory for those seconds: with large images it is reached first.", 0, 65536),
        Parameter("save_on_fault", True, "Save those seconds when the controller reports a fault."),
        Parameter("save_on_surprise", True, "Save them when a calibrated monitor raises its alarm while the arm works (docs/monitor.md)."),
        Parameter("after_fault_s", 1.0, "What follows a fault is saved with it, for this long.", 0.0, 10.0),
        Parameter("queue_mib", 256, "Memory for messages that wait for the disk; beyond it they are dropped and counted.", 1, 65536),
        Parameter("min_free_mib", 256, "Recording stops before the disk has less than this left.", 0, 1048576),
    )

    def configure(self) -> None:
        """Make the folder and find the topics. Raises ConfigError or DataError."""
        values = self.parameters
        contract = read_contract(values["contract"])
        settings = RecorderSettings(
            Path(values["folder"]),
            values["compression"],
            values["queue_mib"] << 20,
            values["recent_s"],
            values["recent_mib"] << 20,
            values["min_free_mib"] << 20,
            values["max_loss"],
            values["mode"] == "real_time",
        )
        self.recorder = BagRecorder(settings, contract)
        self.extra = [name.strip().removeprefix("/") for name in values["extra_topics"].split(",") if name.strip()]
        self.wanted = [*dict.fromkeys([*(stream.topic for stream in contract.images), *TOPICS, MARKS, *self.extra])]
        self.listening: dict[str, Listening] = {}
        self.readers = {
            "/sim/state": self.read_sim_state,
            "/controller/status": self.read_controller_status,
            "/policy/status": self.read_policy_status,
            "/latent": self.read_latent,
            "/world_model/surprise": self.read_surprise,
        }
        self.looks = 0
        self.state, self.detail, self.bag, self.skill = RecorderStatus.STATE_IDLE, "ready", "", ""
        self.sim_episode: int | None = None
        self.controller_state: int | None = None
        self.fault: tuple[float, str] | None = None  # when to save, why
        self.next_surprise_s = 0.0  # until then an alarm is part of one that has been saved
        self.identity_s = 0.0
        self.goal: ServerGoalHandle | None = None
        self.ended: Future | None = None  # of the goal
        self.mark_publisher = self.advertise(EpisodeMark, MARKS, reliable(10))
        self.report_publisher = self.advertise(EpisodeReport, "recorder/episode", reliable(10))
        self.status_publisher = self.advertise(RecorderStatus, "recorder/status", LATCHED)
        self.serve(StartRecording, "recorder/start", self.start_recording)
        self.serve(StopRecording, "recorder/stop", self.stop_recording)
        self.serve(MarkEpisode, "recorder/mark", self.mark_episode)
        self.serve(SaveRecent, "recorder/save", self.save_recent)
        self.action_server = ActionServer(
            self, RecordEpisode, "record", self.execute, goal_callback=self.judge_goal, cancel_callback=self.cancel
        )
        self.recorder.add_topic(describe_topic(f"/{MARKS}", "diwa_interfaces/msg/EpisodeMark", [reliable(10)]))
        self.discover()
        self.repeat(DISCOVER_S, self.discover)
        self.repeat(0.1, self.watch)
        self.repeat(1.0, self.publish_status)

    def activate(self) -> None:
        """Start to listen and, if asked to, to record. Raises DataError."""
        if self.parameters["record_at_start"]:
            self.begin(self.parameters["name"], self.parameters["skill"])
        self.publish_status()

    def deactivate(self) -> None:
        """Close the bag."""
        if self.recorder.recording:
            self.end(UNMARKED).result(CLOSE_LIMIT_S)
        self.publish_status()

    def cleanup(self) -> None:
        """Stop listening."""
        for listening in self.listening.values():
            self.destroy_subscription(listening.subscription)
        self.listening.clear()
        self.action_server.destroy()

    # -- topics ------------------------------------------------------------------------------------------------------------------------

    def discover(self) -> None:
        """Subscribe to what is published, as its publishers offer it."""
        self.looks += 1
        for topic in self.wanted:
            known = self.listening.get(topic)
            if known and self.looks % LOOK_AGAIN:
                continue
            publishers = [info for info in self.get_publishers_info_by_topic(topic) if info.node_name != self.get_name() or topic == MARKS]
            if not publishers:
                continue
            offers = [info.qos_profile for info in publishers]
            is_reliable = all(offer.reliability == ReliabilityPolicy.RELIABLE for offer in offers)
            if known is None or (known.is_reliable and not is_reliable):
                try:
                    self.subscribe(topic, publishers[0].topic_type, offers, is_reliable)
                except DiwaError as error:
                    self.diagnostics.report(f"topic {topic}", ERROR, str(error))

    def subscribe(self, topic: str, type_name: str, offers: list[QoSProfile], is_reliable: bool) -> None:
        """Listen to the serialized messages of a topic; its name in the bag is that in a graph without a namespace."""
        name = "/" + topic.removeprefix("/")
        self.recorder.add_topic(describe_topic(name, type_name, offers))
        is_latched = all(offer.durability == DurabilityPolicy.TRANSIENT_LOCAL for offer in offers)
        qos = QoSProfile(
            depth=DEPTH,
            history=HistoryPolicy.KEEP_LAST,
            reliability=ReliabilityPolicy.RELIABLE if is_reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if is_latched else DurabilityPolicy.VOLATILE,
        )
        old = self.listening.pop(topic, None)
        if old:
            self.destroy_subscription(old.subscription)
        take = self.take_mark if topic == MARKS else partial(self.take, name, is_latched, self.readers.get(name))
        subscription = self.create_subscription(message_class(type_name), topic, lambda data, info: take(data, info), qos, raw=True)
        self.listening[topic] = Listening(subscription, is_reliable)

    def take(self, name: str, is_latched: bool, read: callable, data: bytes, info: dict) -> None:
        """One serialized message."""
        if not self.active:
            return
        if read is not None:
            read(data)
        now_ns = time.time_ns()
        self.recorder.take(Packet(name, info["received_timestamp"] or now_ns, info["source_timestamp"] or now_ns, data), is_latched)

    def take_mark(self, data: bytes, info: dict) -> None:
        """A mark by the operator or by an oracle. This node's own ones are in the bag already."""
        message = deserialize_message(data, EpisodeMark)
        if not self.active or message.source == self.get_name():
            return
        self.take(f"/{MARKS}", False, None, data, info)
        try:
            ended = self.recorder.mark(message.outcome, message.skill, message.note)
        except DiwaError as error:
            self.diagnostics.report("mark", WARN, str(error))
            return
        self.diagnostics.report("mark", OK, "taken")
        self.announce(ended)

    def read_sim_state(self, data: bytes) -> None:
        """A reset of the simulation ends the episode: no step leads over it."""
        episode = deserialize_message(data, SimState).episode
        if self.sim_episode not in (None, episode) and self.recorder.recording and self.recorder.recording.audit.received:
            self.announce(self.recorder.recording.end_episode(UNMARKED, note="the simulation was reset"))
        self.sim_episode = episode

    def read_controller_status(self, data: bytes) -> None:
        """A fault is saved with what led to it."""
        message = deserialize_message(data, ControllerStatus)
        is_new = self.controller_state is not None and message.state in FAULTS and self.controller_state not in FAULTS
        self.controller_state = message.state
        if is_new and self.parameters["save_on_fault"]:
            self.fault = time.monotonic() + self.parameters["after_fault_s"], f"{message.state_name}: {message.reason}"

    def read_surprise(self, data: bytes) -> None:
        """An alarm of the world-model monitor is saved like a fault; further ones within the same seconds belong to it."""
        message, now_s = deserialize_message(data, Surprise), time.monotonic()
        if not message.alarm or now_s < self.next_surprise_s or self.controller_state not in WORKING:
            return
        if self.parameters["save_on_surprise"]:
            self.next_surprise_s = now_s + self.parameters["recent_s"]
            self.fault = now_s + self.parameters["after_fault_s"], f"the world model was surprised: {message.worst}"

    def read_policy_status(self, data: bytes) -> None:
        """Which checkpoints act."""
        message = deserialize_message(data, PolicyStatus)
        self.recorder.note_checkpoint("policy", message.checkpoint_id)
        self.recorder.note_checkpoint("world_model", message.world_model_id)

    def read_latent(self, data: bytes) -> None:
        """Which world model filters, where no policy says so."""
        if time.monotonic() >= self.identity_s:
            self.identity_s = time.monotonic() + IDENTITY_S
            self.recorder.note_checkpoint("world_model", deserialize_message(data, LatentState).world_model_id)

    # -- recording ---------------------------------------------------------------------------------------------------------------------

    def begin(self, name: str, skill: str) -> Path:
        """Start a bag. Raises DataError."""
        folder = self.recorder.start(name, skill)
        self.skill = skill
        self.set_state(RecorderStatus.STATE_RECORDING, f"recording {folder}", str(folder))
        return folder

    def end(self, outcome: str) -> WorkFuture[ClosedBag]:
        """Close the bag; everybody hears of it when it is whole. Raises DataError."""
        closed = self.recorder.stop(outcome)
        self.set_state(RecorderStatus.STATE_CLOSING, f"closing {self.bag}")
        closed.add_done_callback(lambda _: self.conclude(closed.result()))
        return closed

    def conclude(self, bag: ClosedBag) -> None:
        """Report a closed bag and its last episode; called by the writing thread, or by `watch` after an error."""
        if bag.error:
            self.set_state(RecorderStatus.STATE_FAILED, bag.error)
            self.diagnostics.report("recording", ERROR, bag.error)
        else:
            bad = [episode for episode in bag.episodes if episode.bad]
            words = f"{len(bag.episodes)} episodes, {len(bad)} bad" if bad else f"{len(bag.episodes)} episodes"
            self.set_state(RecorderStatus.STATE_IDLE, f"closed {bag.folder}: {words}")
            self.diagnostics.report("recording", OK, "closed")
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(bag)
        if bag.last:
            self.report_episode(bag.last)
        self.wake()

    def watch(self) -> None:
        """Notice a recording that ended by itself, messages that were dropped, a fault that is to be saved, and the goal's time."""
        recording = self.recorder.recording
        if recording and recording.closed.done():
            self.recorder.recording = None
            self.conclude(recording.closed.result())
        elif recording and recording.dropped:
            self.diagnostics.report("queue", WARN, "messages were dropped: writing did not keep up", dropped=recording.dropped)
        elif recording:
            self.diagnostics.report("queue", OK, "nothing dropped")
        if self.fault and time.monotonic() >= self.fault[0]:
            reason, self.fault = self.fault[1], None
            self.save(0.0, reason)
        if self.goal is not None and recording:
            self.goal.publish_feedback(self.feedback())
            limit_s = self.goal.request.duration_s
            if limit_s and time.monotonic() - recording.begin_s >= limit_s:
                self.end(UNMARKED)

    def save(self, seconds: float, reason: str) -> WorkFuture[Path]:
        """Save the last seconds; the outcome is in the log and on /diagnostics."""
        saved: WorkFuture[Path] = WorkFuture()
        try:
            saved = self.recorder.save_recent(seconds, reason)
        except DiwaError as error:
            saved.set_exception(error)

        def tell(done: WorkFuture[Path]) -> None:
            error = done.exception()
            text = f"not saved: {error}" if error else f"saved {done.result()}: {reason or 'asked for'}"
            self.diagnostics.report("recent", ERROR if error else OK, text)
            self.get_logger().info(text)

        saved.add_done_callback(tell)
        return saved

    # -- services and the action -------------------------------------------------------------------------------------------------------

    def start_recording(self, request: StartRecording.Request, response: StartRecording.Response) -> StartRecording.Response:
        """recorder/start."""
        try:
            if not self.active:
                raise DataError("recorder: expected an active node, found it inactive. Activate it first.")
            response.bag = str(self.begin(request.name, request.skill))
            response.success, response.message = True, f"recording {response.bag}"
        except DiwaError as error:
            response.message = str(error)
        return response

    async def stop_recording(self, request: StopRecording.Request, response: StopRecording.Response) -> StopRecording.Response:
        """recorder/stop; answers when the bag is whole."""
        try:
            bag = await self.work(self.end(request.outcome))
            response.success, response.message, response.bag = not bag.error, bag.error or self.detail, str(bag.folder)
            response.episodes = [to_report(episode) for episode in bag.episodes]
        except DiwaError as error:
            response.message = str(error)
        return response

    async def mark_episode(self, request: MarkEpisode.Request, response: MarkEpisode.Response) -> MarkEpisode.Response:
        """recorder/mark: the mark goes into the bag and to everybody else."""
        try:
            ended = self.mark(request.outcome, request.skill, request.note)
            self.announce(ended)
            episode = await self.work(ended)
            response.success, response.message, response.episode = True, describe_episode(episode), to_report(episode)
        except DiwaError as error:
            response.message = str(error)
        return response

    def mark(self, outcome: str, skill: str, note: str) -> WorkFuture[Episode]:
        """Publish a mark and end the episode with it. Raises DataError."""
        message = EpisodeMark(outcome=outcome, skill=skill, source=self.get_name(), note=note)
        message.header.stamp = self.get_clock().now().to_msg()
        now_ns = time.time_ns()
        if self.recorder.recording:
            self.recorder.take(Packet(f"/{MARKS}", now_ns, now_ns, serialize_message(message)))
        ended = self.recorder.mark(outcome, skill, note)
        self.mark_publisher.publish(message)
        return ended

    async def save_recent(self, request: SaveRecent.Request, response: SaveRecent.Response) -> SaveRecent.Response:
        """recorder/save; answers when the bag is whole."""
        try:
            response.bag = str(await self.work(self.save(request.seconds, request.reason)))
            response.success, response.message = True, f"saved {response.bag}"
        except DiwaError as error:
            response.message = str(error)
        return response

    def judge_goal(self, goal: RecordEpisode.Goal) -> GoalResponse:
        """One recording at a time."""
        if not self.active or self.recorder.recording or self.goal is not None:
            self.get_logger().error("record: expected an active recorder without a recording, found it otherwise; the goal is refused.")
            return GoalResponse.REJECT
        return GoalResponse.ACCEPT

    def cancel(self, goal: ServerGoalHandle) -> CancelResponse:
        """Stop early; the bag is kept."""
        if self.recorder.recording:
            self.end(UNMARKED)
        return CancelResponse.ACCEPT

    async def execute(self, goal: ServerGoalHandle) -> RecordEpisode.Result:
        """The action `record`: until marked, timed out or cancelled."""
        result = RecordEpisode.Result()
        try:
            result.bag = str(self.begin(goal.request.name, goal.request.skill))
        except DiwaError as error:
            result.message = str(error)
            goal.abort()
            return result
        self.goal, self.ended = goal, Future(executor=self.executor)
        bag: ClosedBag = await self.ended
        self.goal, self.ended = None, None
        result.success, result.message = not bag.error, bag.error or self.detail
        result.episodes = [to_report(episode) for episode in bag.episodes]
        if goal.is_cancel_requested:
            goal.canceled()
        elif bag.error:
            goal.abort()
        else:
            goal.succeed()
        return result

    def feedback(self) -> RecordEpisode.Feedback:
        """How far the running recording is."""
        recording = self.recorder.recording
        return RecordEpisode.Feedback(
            duration_s=time.monotonic() - recording.begin_s,
            messages=recording.writer.counts.total,
            dropped=recording.dropped,
            bytes=recording.writer.bytes_written,
        )

    def work(self, done: WorkFuture) -> Future:
        """What a coroutine of the executor can wait for, from what a thread does."""
        waiting = Future(executor=self.executor)

        def finish(finished: WorkFuture) -> None:
            error = finished.exception()
            if error is not None:
                waiting.set_exception(error)
            else:
                waiting.set_result(finished.result())
            self.wake()

        done.add_done_callback(finish)
        return waiting

    def wake(self) -> None:
        """Let the executor look at coroutines again."""
        if self.executor is not None:  # None once the process stops spinning
            self.executor.wake()

    # -- reports -----------------------------------------------------------------------------------------------------------------------

    def announce(self, ended: WorkFuture[Episode]) -> None:
        """Publish and log an episode when it is ended; the goal ends with its first one."""

        def tell(done: WorkFuture[Episode]) -> None:
            if done.exception() is None:
                self.report_episode(done.result())

        ended.add_done_callback(tell)
        if self.goal is not None and self.recorder.recording:
            self.end(UNMARKED)

    def report_episode(self, episode: Episode) -> None:
        """Publish one episode; a bad one is a warning."""
        self.report_publisher.publish(to_report(episode))
        text = describe_episode(episode)
        if episode.bad:
            self.get_logger().warning(text)
        else:
            self.get_logger().info(text)

    def set_state(self, state: str, detail: str, bag: str = "") -> None:
        """Change what the status says, and say it."""
        self.state, self.detail, self.bag = state, detail, bag or self.bag
        self.get_logger().info(detail)
        self.publish_status()

    def publish_status(self) -> None:
        """Say where the recorder stands."""
        recording = self.recorder.recording
        status = RecorderStatus(state=self.state, bag=self.bag, skill=self.skill, detail=self.detail, topics=sorted(self.listening))
        status.header.stamp = self.get_clock().now().to_msg()
        status.recent_s = self.recorder.recent.seconds
        if recording:
            progress = self.feedback()
            status.duration_s, status.messages, status.dropped = progress.duration_s, progress.messages, progress.dropped
            status.bytes, status.episode = progress.bytes, recording.episode
        self.status_publisher.publish(status)
        missing = [name for name in rated_topics(self.recorder.contract) if name.removeprefix("/") not in self.listening]
        level, text = (WARN, f"without a publisher: {', '.join(missing)}") if missing else (OK, "all topics of the contract are published")
        self.diagnostics.report("topics", level, text)


def to_report(episode: Episode) -> EpisodeReport:
    """Episode -> its message."""
    topics = sorted({*episode.received, *episode.expected, *episode.dropped})
    return EpisodeReport(
        index=episode.index,
        outcome=episode.outcome,
        skill=episode.skill,
        note=episode.note,
        begin=to_time(episode.begin_ns),
        end=to_time(episode.end_ns),
        bad=episode.bad,
        reason=episode.reason,
        topics=topics,
        received=[episode.received.get(topic, 0) for topic in topics],
        expected=[episode.expected.get(topic, 0) for topic in topics],
        missing=[episode.missing.get(topic, 0) for topic in topics],
        dropped=[episode.dropped.get(topic, 0) for topic in topics],
    )


def describe_episode(episode: Episode) -> str:
    """One line for people."""
    judgement = f"BAD: {episode.reason}" if episode.bad else "complete"
    return f"episode {episode.index}: {episode.outcome or 'not marked'}, {episode.duration_s:.1f} s, {judgement}"


def main() -> int:
    """Run the node as a process; returns the exit code."""
    return run_node(Recorder)


if __name__ == "__main__":
    sys.exit(main())
