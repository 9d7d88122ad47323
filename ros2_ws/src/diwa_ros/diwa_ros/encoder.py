"""Cameras, joints, poses and executed actions in; the world model's belief about every camera frame out."""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from diwa_interfaces.msg import ExecutedAction, LatentState, Surprise
from diwa_interfaces.srv import SwapWorldModel
from geometry_msgs.msg import PoseStamped
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.publisher import Publisher
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import Trigger

from diwa_core.contract import ROBOT_OBS_SIZE, TARGET_POSE_SIZE, ImageStream, Observation, hold_action
from diwa_core.data.alignment import EXECUTED, FROZEN_FRAMES, FROZEN_MOTION_M, JOINTS, POSE, TARGET, Frame, FrameAligner
from diwa_core.data.messages import SampleReader, list_sources
from diwa_core.errors import ConfigError, DiwaError
from diwa_core.world_model.filter import LatentFilter
from diwa_core.world_model.monitor import Calibration, Monitor
from diwa_ros.contracts import MODE
from diwa_ros.diagnostics import ERROR, OK, WARN
from diwa_ros.images import load_reader
from diwa_ros.messages import CAMERA, reliable, to_float32, to_time
from diwa_ros.node import DiwaNode, run_node
from diwa_ros.parameters import Parameter
from diwa_ros.policy_store import Refusal
from diwa_ros.worker import Worker

WARM_UP_FRAMES, TIMED_FRAMES = 3, 7


class Encoder(DiwaNode):
    """Aligns the streams on the camera clock and filters every frame. While a stream is bad no latent leaves; a diagnostic names it."""

    NAME = "encoder"
    PARAMETERS = (
        MODE,
        Parameter("world_model", "", "Checkpoint of the world model: a folder or a .tar."),
        Parameter(
            "monitor", "", "Calibration of the world model's monitor; empty: errors are published and nothing is judged (docs/monitor.md)."
        ),
        Parameter("device", "cpu", "Torch device, as cpu or cuda."),
        Parameter("threads", 1, "Threads of torch in this process.", 1, 64),
        Parameter(
            "camera_qos",
            "reliable",
            "reliable: nothing is lost, as in simulation; sensor_data: best effort, as most camera drivers publish.",
            choices=("reliable", "sensor_data"),
        ),
        Parameter("max_skew_s", 0.04, "How much older than a camera frame another stream's sample may be.", 0.0, 0.5),
        Parameter("stream_timeout_s", 1.0, "A stream that lags this long is missing; a gap this long restarts the filter.", 0.05, 60.0),
        Parameter("frozen_frames", FROZEN_FRAMES, "Identical pictures in a row that make a camera frozen.", 2, 10000),
        Parameter("frozen_motion_m", FROZEN_MOTION_M, "How far the hand must have moved meanwhile; 0 for real cameras.", 0.0, 1.0),
    )

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self.worker = Worker(self)
        self.create_service(
            SwapWorldModel, "encoder/world_model", self.swap_world_model, callback_group=ReentrantCallbackGroup()
        )  # answers in every state

    def configure(self) -> None:
        """Load the world model and subscribe. Raises ConfigError or CheckpointError."""
        if not self.parameters["world_model"]:
            raise ConfigError("parameter 'world_model': expected the path of a checkpoint, found nothing. Set it in the launch file.")
        torch.set_num_threads(self.parameters["threads"])
        self.filter, self.filter_ms = load_filter(self.parameters["world_model"], self.parameters["device"])
        if self.filter.model.config.scene_size:
            raise ConfigError("parameter 'world_model': expected one that sees cameras, found one that reads the simulator's scene state.")
        path = self.parameters["monitor"]
        self.calibration = Calibration.load(path, self.filter.model, self.filter.identity) if path else None
        self.monitor = self.make_monitor()
        self.paths = {self.filter.identity: self.parameters["world_model"]}
        self.other: LatentFilter | None = None  # prepared or previous
        self.other_filters = False  # whether it filters every frame too
        self.commits = False  # whether it takes over at the next frame for which it is warm
        self.contract = self.filter.contract
        names = ("max_skew_s", "stream_timeout_s", "frozen_frames", "frozen_motion_m")
        self.aligner = FrameAligner(self.contract, *(self.parameters[name] for name in names))
        self.done_ns = 0
        self.last_latent: LatentState | None = None
        self.topics = {name: source.topic for name, source in list_sources(self.contract).items()}
        read_image, reader = load_reader()
        self.samples = SampleReader(self.contract, read_image)
        self.get_logger().info(reader)
        self.latent_publisher = self.advertise(LatentState, "latent", reliable(1))
        self.surprise_publisher = self.advertise(Surprise, "world_model/surprise", reliable(10))
        self.candidate_publisher = self.advertise(LatentState, "latent/candidate", reliable(10))
        camera_qos = CAMERA if self.parameters["camera_qos"] == "sensor_data" else reliable(5)
        for stream in self.contract.images:
            self.listen(Image, stream.topic, self.make_image_callback(stream), camera_qos)
        for name, message_type in {JOINTS: JointState, POSE: PoseStamped, TARGET: PoseStamped, EXECUTED: ExecutedAction}.items():
            self.listen(message_type, self.topics[name], lambda message, name=name: self.take(name, message), reliable(10))
        self.serve(Trigger, "encoder/reset", self.reset)
        self.repeat(0.1, self.check_streams)

    # -- inputs ------------------------------------------------------------------------------------------------------------------------

    def make_image_callback(self, stream: ImageStream) -> callable:
        """A callback for one camera. A copy of the newest frame (lock-step at rest) is answered with a copy of its latent."""

        def take_image(message: Image) -> None:
            newest = self.last_latent
            is_copy = stream is self.contract.images[0] and newest is not None and message.header.stamp == newest.header.stamp
            self.take(stream.name, message)
            if is_copy:
                self.latent_publisher.publish(newest)

        return take_image

    def take(self, name: str, message: object) -> None:
        """Read one message into the aligner and filter what became complete; a bad one is reported and dropped."""
        check = self.topics[name]
        try:
            self.aligner.add(name, self.samples.stamp_ns(name, message), self.samples.value(name, message), time.monotonic())
        except DiwaError as error:
            self.diagnostics.report(check, ERROR, str(error))
            return
        if not self.diagnostics.is_ok(check) and not self.aligner.is_faulty(name):
            self.diagnostics.report(check, OK, "good again")
        for frame in self.aligner.pop():
            self.encode(frame)

    def check_streams(self) -> None:
        """Report streams that are missing, late or frozen."""
        may_rest = self.parameters["mode"] == "lockstep"
        for fault in self.aligner.find_faults(time.monotonic(), may_rest):
            self.diagnostics.report(self.topics.get(fault.stream, fault.stream), ERROR, fault.message)

    # -- filtering ---------------------------------------------------------------------------------------------------------------------

    def encode(self, frame: Frame) -> None:
        """Filter one frame and publish the belief."""
        if self.filter.frames and frame.stamp_ns - self.done_ns > self.parameters["stream_timeout_s"] * 1e9:
            self.get_logger().warning("a gap in the frames: the filter begins anew")
            self.reset_filters()
        if self.commits and (self.other.frames >= self.other.warmup_frames or self.other.frames == self.filter.frames):
            self.exchange()
        begin_s = time.monotonic()
        self.last_latent = self.filter_frame(self.filter, frame, self.latent_publisher)
        self.done_ns = frame.stamp_ns
        filter_ms = f"{(time.monotonic() - begin_s) * 1e3:.1f}"
        self.diagnostics.report("inputs", OK, "frames are filtered", filter_ms=filter_ms, skipped=self.aligner.skipped)
        if self.other_filters:
            self.filter_frame(self.other, frame, self.candidate_publisher)
        self.watch_frame(frame)

    def filter_frame(self, latent_filter: LatentFilter, frame: Frame, publisher: Publisher) -> LatentState:
        """Filter and publish; returns the message."""
        feature = latent_filter.update(frame.observation, frame.previous_action if latent_filter.frames else None)
        message = LatentState(world_model_id=latent_filter.identity, frames_since_reset=latent_filter.frames)
        message.header.stamp = to_time(frame.stamp_ns)
        message.warmup_frames = latent_filter.warmup_frames
        message.gripper = float(frame.observation.robot_obs[14])
        message.feature = to_float32(feature)
        publisher.publish(message)
        return message

    # -- the monitor -------------------------------------------------------------------------------------------------------------------

    def make_monitor(self) -> Monitor | None:
        """A monitor of the running world model, that judges if the calibration is this one's; None where nothing can be compared."""
        if not self.filter.model.config.frozen_embedding:
            self.get_logger().warning("monitor: this world model predicts pixels, not embeddings: it is not watched")
            return None
        if self.calibration is not None and self.calibration.world_model == self.filter.identity:
            return Monitor(self.filter.model, self.calibration)
        self.get_logger().warning("monitor: not calibrated: prediction errors are published, nothing is judged and nothing acts")
        return Monitor(self.filter.model)

    def watch_frame(self, frame: Frame) -> None:
        """Compare the frame with what the world model expected of it, and publish the verdict."""
        if self.monitor is None:
            return
        verdict = self.monitor.update(self.filter.action, self.filter.embedding, self.filter.state)
        message = Surprise(world_model_id=self.filter.identity, calibrated=self.monitor.calibration is not None)
        message.header.stamp = to_time(frame.stamp_ns)
        message.alarm, message.score, message.worst = verdict.alarm, verdict.score, verdict.worst
        message.horizons, message.groups = list(self.monitor.horizons), list(self.monitor.groups)
        message.errors = to_float32(verdict.errors)
        self.surprise_publisher.publish(message)
        text = "not calibrated" if not message.calibrated else "surprised" if verdict.alarm else "as expected"
        self.diagnostics.report("monitor", WARN if verdict.alarm else OK, text, score=f"{verdict.score:.2f}", worst=verdict.worst)

    def reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Service encoder/reset: forget, and filter the newest complete frame again as the first."""
        response.success = self.active
        if not self.active:
            response.message = "encoder/reset: expected an active encoder, found it inactive."
            return response
        self.reset_filters()
        frame = self.aligner.restart()
        if frame is not None:
            self.encode(frame)
        response.message = "reset" if frame is not None else "reset; the next complete frame will be the first"
        return response

    def reset_filters(self) -> None:
        """Both world models forget."""
        self.filter.reset()
        if self.monitor is not None:
            self.monitor.reset()
        if self.other is not None:
            self.other.reset()

    # -- swapping the world model ------------------------------------------------------------------------------------------------------

    async def swap_world_model(self, request: SwapWorldModel.Request, response: SwapWorldModel.Response) -> SwapWorldModel.Response:
        """Service encoder/world_model: the encoder's half of a swap of both (docs/swap.md). A refusal changes nothing."""
        steps = {request.PREPARE: self.prepare, request.COMMIT: self.commit, request.RELEASE: self.release}
        try:
            if not self.active:
                raise Refusal("state", "an active encoder", "it inactive", "Activate it first.")
            if request.operation not in steps:
                raise Refusal("state", "an operation of SwapWorldModel", f"{request.operation}", "")
            named = await steps[request.operation](request)
        except Refusal as refusal:
            response.gate, response.expected, response.found = refusal.gate, refusal.expected, refusal.found
            response.message = str(refusal)
            self.diagnostics.report("encoder/world_model", ERROR, response.message)
            return response
        self.diagnostics.report("encoder/world_model", OK, f"runs {self.filter.identity[:12]}")
        response.success, response.world_model_id = True, named.identity
        response.feature_size = named.model.feature_size
        return response

    async def prepare(self, request: SwapWorldModel.Request) -> LatentFilter:
        """Filter with another world model as well from the next frame on. Raises Refusal."""
        wanted = request.world_model_id
        if not request.path and self.other is not None and self.other.identity == wanted:
            self.other.reset() if not self.other_filters else None
            self.other_filters = True
            return self.other
        path = request.path or self.paths.get(wanted, "")
        try:
            candidate, filter_ms = await self.worker.submit(load_filter, path, self.parameters["device"])
        except Exception as error:  # a strange checkpoint can make any library raise; the running world model must not suffer
            raise Refusal("files", "a whole, unaltered world model", str(error), "") from error
        if not self.active:
            raise Refusal("state", "an active encoder", "that it was deactivated meanwhile", "Activate it and ask again.")
        self.check_candidate(candidate, filter_ms, wanted)
        if candidate.identity == self.filter.identity:
            return self.filter
        self.paths[candidate.identity] = path
        self.other, self.other_filters, self.commits = candidate, True, False
        return candidate

    def check_candidate(self, candidate: LatentFilter, filter_ms: float, wanted: str) -> None:
        """Gates of a world model. Raises Refusal."""
        difference = self.contract.difference(candidate.contract)
        if difference:
            raise Refusal("contract", self.contract.identity, f"{candidate.contract.identity} ({difference})", "Use one of this contract.")
        if wanted not in ("", candidate.identity):
            raise Refusal("files", f"world model {wanted[:16]} still at its path", candidate.identity[:16], "Load it by its path.")
        if candidate.model.config.scene_size:
            raise Refusal("world_model", "one that sees cameras", "one that reads the simulator's scene state", "Train one on cameras.")
        limit_ms = 1e3 * self.contract.step_s
        if self.parameters["mode"] != "lockstep" and filter_ms + self.filter_ms > limit_ms:
            found = f"{self.filter_ms:.1f} and {filter_ms:.1f} ms"
            raise Refusal("latency", f"that both world models filter a frame within {limit_ms:.1f} ms", found, "Use a smaller one.")

    async def commit(self, request: SwapWorldModel.Request) -> LatentFilter:
        """Run the named world model: with `cold` at once, else from the first frame for which it is warm. Raises Refusal."""
        if request.world_model_id == self.filter.identity:
            self.commits = False
        elif self.other is None or self.other.identity != request.world_model_id or not self.other_filters:
            raise Refusal("world_model", f"{request.world_model_id[:16]} prepared", "another or none", "Prepare it first.")
        elif request.cold:
            self.exchange()
        else:
            self.commits = True
        return self.filter

    def exchange(self) -> None:
        """The prepared world model runs, the other one goes on filtering beside it. A warm one goes on with the count of frames."""
        if self.other.frames >= self.other.warmup_frames:
            self.other.frames = self.filter.frames
        self.filter, self.other, self.commits = self.other, self.filter, False
        self.monitor = self.make_monitor()

    async def release(self, request: SwapWorldModel.Request) -> LatentFilter:
        """Filter with one world model again; the other one stays in memory."""
        self.other_filters = self.commits = False
        return self.filter


def load_filter(path: str, device: str) -> tuple[LatentFilter, float]:
    """A filter that has seen a few dark frames, because the first calls of a model are slow, and its milliseconds per frame."""
    latent_filter = LatentFilter.load(path, device)
    if latent_filter.model.config.scene_size:
        return latent_filter, 0.0
    images = {stream.name: np.zeros((stream.height, stream.width, 3), np.uint8) for stream in latent_filter.contract.images}
    dark, times_ms = Observation(images, np.zeros(ROBOT_OBS_SIZE), np.zeros(TARGET_POSE_SIZE)), []
    for frame in range(WARM_UP_FRAMES + TIMED_FRAMES):
        begin_s = time.perf_counter()
        latent_filter.update(dark, hold_action(1.0) if frame else None)
        times_ms.append((time.perf_counter() - begin_s) * 1e3)
    latent_filter.reset()
    return latent_filter, min(times_ms[WARM_UP_FRAMES:])


def main() -> int:
    """Run the node as a process; returns the exit code."""
    return run_node(Encoder)


if __name__ == "__main__":
    sys.exit(main())
