"""Listens to a running graph without taking part: when the messages of a frame were sent, and what cameras and encoder saw."""

from __future__ import annotations

import numpy as np
from diwa_interfaces.msg import ActionChunk, ExecutedAction, LatentState, RobotCommand, SimState
from rclpy.node import Node
from rclpy.subscription import Subscription
from sensor_msgs.msg import Image

from diwa_core.contract import Contract
from diwa_core.evaluate.strips import Recording
from diwa_ros.images import read_image_numpy
from diwa_ros.messages import from_floats, reliable, to_ns

STAGES = {  # name -> (from, to)
    "camera → latent": ("camera", "latent"),
    "latent → chunk": ("latent", "chunk"),
    "camera → chunk": ("camera", "chunk"),
    "camera → command": ("camera", "command"),
    "camera → executed": ("camera", "executed"),
}
ROUNDING_NS = 2  # stamps of one tick differ by this much at most: the controller subtracts a rounded period


class GraphTap:
    """Keeps the newest episode: when each frame's messages were sent, by the senders' clock, and what was in them."""

    def __init__(self, node: Node, contract: Contract) -> None:
        self.node, self.contract = node, contract
        self.subscriptions: list[Subscription] = []
        self.begin()
        self._listen(SimState, "sim/state", self._take_state)
        for stream in contract.images:
            self._listen(Image, stream.topic, self._make_image_callback(stream.name))
        self._listen(LatentState, "latent", self._take_latent)
        self._listen(ActionChunk, "action_chunk", self._take_chunk)
        self._listen(RobotCommand, "sim/command", lambda message, info: self._mark("command", message, info))
        self._listen(ExecutedAction, "executed_action", lambda message, info: self._mark("executed", message, info))

    def begin(self) -> None:
        """Forget; the next episode begins."""
        self.sent_ns: dict[str, dict[int, int]] = {stage: {} for stage in ("camera", "latent", "chunk", "command", "executed")}
        self.episodes: dict[int, int] = {}  # the rest likewise by stamp
        self.actions: dict[int, np.ndarray] = {}
        self.latents: dict[int, LatentState] = {}
        self.images: dict[str, dict[int, np.ndarray]] = {stream.name: {} for stream in self.contract.images}

    def is_matched(self) -> bool:
        """Whether every topic has found its sender, and pictures and states have arrived."""
        matched = all(subscription.get_publisher_count() for subscription in self.subscriptions)
        return matched and bool(self.episodes) and all(self.images.values())

    @property
    def steps(self) -> int:
        """Policy steps of the running episode so far."""
        if not self.sent_ns["chunk"]:
            return 0
        first_ns = min(self.sent_ns["chunk"])
        return sum(stamp > first_ns for stamp in self.actions)

    def latencies_ms(self) -> dict[str, list[float]]:
        """Stage -> milliseconds of every frame since the first policy step that has both ends."""
        first_ns = min(self.sent_ns["chunk"], default=None)
        if first_ns is None:
            return {stage: [] for stage in STAGES}
        measured = {}
        for stage, (start, end) in STAGES.items():
            begins, ends = self.sent_ns[start], self.sent_ns[end]
            measured[stage] = [(ends[stamp] - begins[stamp]) / 1e6 for stamp in sorted(ends) if stamp >= first_ns and stamp in begins]
        return measured

    def has_frames(self, episode: int, steps: int) -> bool:
        """Whether everything of `episode`, from the filter's first frame to the end of policy step `steps`, has arrived."""
        stamps = self._stamps(episode, steps)
        return None not in stamps and all(stamp in seen for seen in self.images.values() for stamp in stamps)

    def recording(self, episode: int, steps: int) -> Recording:
        """The frames of which `has_frames` is true."""
        stamps = self._stamps(episode, steps)
        return Recording(
            {view: np.stack([seen[stamp] for stamp in stamps]) for view, seen in self.images.items()},
            np.stack([from_floats(self.latents[stamp].feature) for stamp in stamps]),
            np.stack([self.actions[stamp] for stamp in stamps]),
        )

    def _stamps(self, episode: int, steps: int) -> list[int | None]:
        """Stamps of the filter's frames 1 to W + `steps`; None for one that has not arrived."""
        frames: dict[int, int] = {}
        for stamp_ns in sorted(stamp for stamp in self.latents if self.episodes.get(stamp) == episode):
            number = self.latents[stamp_ns].frames_since_reset
            frames = {} if number == 1 else frames
            frames[number] = stamp_ns
        if 1 not in frames:
            return [None]
        count = self.latents[frames[1]].warmup_frames + steps
        return [frames.get(number) for number in range(1, count + 1)]

    def _listen(self, message_type: type, topic: str, callback: callable) -> None:
        self.subscriptions.append(self.node.create_subscription(message_type, topic, callback, reliable(50)))

    def _take_state(self, message: SimState, info: dict) -> None:
        stamp_ns = to_ns(message.header.stamp)
        self.episodes[stamp_ns], self.actions[stamp_ns] = message.episode, np.array(message.applied_action, np.float32)
        self._mark("camera", message, info)  # sent first of all messages of a frame, when the pictures are ready

    def _make_image_callback(self, view: str) -> callable:
        def take_image(message: Image, info: dict) -> None:
            self.images[view][to_ns(message.header.stamp)] = read_image_numpy(message).copy()

        return take_image

    def _take_latent(self, message: LatentState, info: dict) -> None:
        self.latents[to_ns(message.header.stamp)] = message
        self._mark("latent", message, info)

    def _take_chunk(self, message: ActionChunk, info: dict) -> None:
        if message.horizon and not message.hold:
            self._mark("chunk", message, info)

    def _mark(self, stage: str, message: object, info: dict) -> None:
        """Note when a message was first sent for its frame."""
        stamp_ns = to_ns(message.header.stamp)
        near = range(stamp_ns - ROUNDING_NS, stamp_ns + ROUNDING_NS + 1)
        stamp_ns = next((stamp for stamp in near if stamp in self.sent_ns["camera"]), stamp_ns)
        self.sent_ns[stage].setdefault(stamp_ns, info["source_timestamp"])
