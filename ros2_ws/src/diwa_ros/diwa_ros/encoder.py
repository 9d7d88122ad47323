"""Cameras, joints, poses and executed actions in; the world model's belief about every camera frame out."""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from diwa_interfaces.msg import ExecutedAction, LatentState
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import Trigger

from diwa_core.contract import ROBOT_OBS_SIZE, TARGET_POSE_SIZE, ImageStream, Observation, hold_action
from diwa_core.data.alignment import EXECUTED, JOINTS, POSE, TARGET, Frame, FrameAligner
from diwa_core.data.messages import SampleReader, list_sources
from diwa_core.errors import ConfigError, DiwaError
from diwa_core.world_model.filter import LatentFilter
from diwa_ros.contracts import MODE
from diwa_ros.diagnostics import ERROR, OK
from diwa_ros.images import load_reader
from diwa_ros.messages import CAMERA, reliable, to_float32, to_time
from diwa_ros.node import DiwaNode, run_node
from diwa_ros.parameters import Parameter


class Encoder(DiwaNode):
    """Aligns the streams on the camera clock and filters every frame. While a stream is bad no latent leaves; a diagnostic names it."""

    NAME = "encoder"
    PARAMETERS = (
        MODE,
        Parameter("world_model", "", "Checkpoint of the world model: a folder or a .tar."),
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
        Parameter("frozen_frames", 15, "Identical pictures in a row that make a camera frozen.", 2, 10000),
        Parameter("frozen_motion_m", 0.05, "How far the hand must have moved over the table meanwhile; 0 for real cameras.", 0.0, 1.0),
    )

    def configure(self) -> None:
        """Load the world model and subscribe. Raises ConfigError or CheckpointError."""
        if not self.parameters["world_model"]:
            raise ConfigError("parameter 'world_model': expected the path of a checkpoint, found nothing. Set it in the launch file.")
        torch.set_num_threads(self.parameters["threads"])
        self.filter = LatentFilter.load(self.parameters["world_model"], self.parameters["device"])
        if self.filter.model.config.scene_size:
            raise ConfigError("parameter 'world_model': expected one that sees cameras, found one that reads the simulator's scene state.")
        self.contract = self.filter.contract
        names = ("max_skew_s", "stream_timeout_s", "frozen_frames", "frozen_motion_m")
        self.aligner = FrameAligner(self.contract, *(self.parameters[name] for name in names))
        self.done_ns = 0
        self.last_latent: LatentState | None = None
        self.topics = {name: source.topic for name, source in list_sources(self.contract).items()}
        self.warm_up()
        read_image, reader = load_reader()
        self.samples = SampleReader(self.contract, read_image)
        self.get_logger().info(reader)
        self.latent_publisher = self.advertise(LatentState, "latent", reliable(1))
        camera_qos = CAMERA if self.parameters["camera_qos"] == "sensor_data" else reliable(5)
        for stream in self.contract.images:
            self.listen(Image, stream.topic, self.make_image_callback(stream), camera_qos)
        for name, message_type in {JOINTS: JointState, POSE: PoseStamped, TARGET: PoseStamped, EXECUTED: ExecutedAction}.items():
            self.listen(message_type, self.topics[name], lambda message, name=name: self.take(name, message), reliable(10))
        self.serve(Trigger, "encoder/reset", self.reset)
        self.repeat(0.1, self.check_streams)

    def warm_up(self) -> None:
        """Filter a few dark frames: the first calls of a model are slow."""
        images = {stream.name: np.zeros((stream.height, stream.width, 3), np.uint8) for stream in self.contract.images}
        dark = Observation(images, np.zeros(ROBOT_OBS_SIZE), np.zeros(TARGET_POSE_SIZE))
        for frame in range(5):
            self.filter.update(dark, hold_action(1.0) if frame else None)
        self.filter.reset()

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
            self.filter.reset()
        begin_s = time.monotonic()
        feature = self.filter.update(frame.observation, frame.previous_action if self.filter.frames else None)
        self.done_ns = frame.stamp_ns
        message = LatentState(world_model_id=self.filter.identity, frames_since_reset=self.filter.frames)
        message.header.stamp = to_time(frame.stamp_ns)
        message.warmup_frames = self.filter.warmup_frames
        message.gripper = float(frame.observation.robot_obs[14])
        message.feature = to_float32(feature)
        self.latent_publisher.publish(message)
        self.last_latent = message
        filter_ms = f"{(time.monotonic() - begin_s) * 1e3:.1f}"
        self.diagnostics.report("inputs", OK, "frames are filtered", filter_ms=filter_ms, skipped=self.aligner.skipped)

    def reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Service encoder/reset: forget, and filter the newest complete frame again as the first."""
        response.success = self.active
        if not self.active:
            response.message = "encoder/reset: expected an active encoder, found it inactive."
            return response
        self.filter.reset()
        frame = self.aligner.restart()
        if frame is not None:
            self.encode(frame)
        response.message = "reset" if frame is not None else "reset; the next complete frame will be the first"
        return response


def main() -> int:
    """Run the node as a process; returns the exit code."""
    return run_node(Encoder)


if __name__ == "__main__":
    sys.exit(main())
