"""Bags with known contents, written by the rosbags library: an implementation other than the one under test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer

from diwa_core.contract import Contract
from diwa_core.data.bag_format import Recording
from diwa_core.data.bag_reader import load_types

START_NS = 1_700_000_000_000_000_000
STEP_NS = 33_333_333


def frame_image(number: int, size: int = 64) -> np.ndarray:
    """The picture of frame `number` uint8 [size, size, 3]: smooth, so that JPEG keeps it, and different for every frame."""
    rows, columns = np.mgrid[:size, :size] * 128 // size
    return np.stack([rows + number, columns + number, np.full_like(rows, number % 200)], -1).astype(np.uint8)


@dataclass
class FakeBag:
    """Ticks of a graph: what every stream says is known from the number of the tick.

    compressed: "png" or "jpeg". moves(n): whether the action that led into tick n moved the arm. stamp_ns(n): when tick n was.
    skip: topic -> ticks without it. marks: after tick n, outcome and skill.
    """

    ticks: int = 60
    first: int = 0
    size: int = 64
    compressed: str = ""
    simulated: bool = False
    contract: Contract | None = None
    moves: callable = lambda n: True
    stamp_ns: callable = lambda n: START_NS + n * STEP_NS
    episode: callable = lambda n: 0
    skip: dict[str, set[int]] = field(default_factory=dict)
    marks: dict[int, tuple[str, str]] = field(default_factory=dict)  # after tick n: outcome, skill
    image: callable = frame_image
    prefix: str = "/"
    only: tuple[str, ...] = ()

    def write(self, path: Path, storage: StoragePlugin = StoragePlugin.MCAP, compression: tuple = ()) -> Path:
        """Write the bag; compression: mode and format."""
        writer = Writer(path, version=9, storage_plugin=storage)
        if compression:
            writer.set_compression(*compression)
        with writer:
            connections = {}
            if self.contract:
                for name, text in Recording(self.contract).to_custom_data().items():
                    writer.set_custom_data(name, text)
            for topic, message, stamp_ns in self.messages():
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, message.__msgtype__, typestore=load_types())
                writer.write(connections[topic], stamp_ns, load_types().serialize_cdr(message, message.__msgtype__))
        return path

    def messages(self):
        """(topic, message, time of recording in ns), in order."""
        for n in range(self.first, self.first + self.ticks):
            stamp_ns = self.stamp_ns(n)
            for topic, message in self.tick(n, stamp_ns).items():
                if n not in self.skip.get(topic, ()) and (not self.only or topic in self.only):
                    yield self.prefix + topic, message, stamp_ns + 1_000_000
            if n in self.marks:
                outcome, skill = self.marks[n]
                mark = make(
                    "diwa_interfaces/msg/EpisodeMark", header=header(stamp_ns + 1), outcome=outcome, skill=skill, source="", note=""
                )
                yield f"{self.prefix}episode_mark", mark, stamp_ns + 2_000_000

    def tick(self, n: int, stamp_ns: int) -> dict[str, object]:
        """Topic -> message of tick n."""
        messages = {}
        if self.simulated:
            messages["sim/state"] = make(
                "diwa_interfaces/msg/SimState",
                **{"header": header(stamp_ns), "tick": n, "episode": self.episode(n), "missed_ticks": 0},
                **{"applied_action": action(n, self.moves(n)), "applied_is_hold": False, "first_of_episode": False},
                scene_obs=np.full(24, n, np.float64),
            )
        for stream in Contract().images:
            image = self.image(n, self.size) if stream.name == "rgb_static" else self.image(n + 7, self.size)
            messages[stream.topic + "/compressed" * bool(self.compressed)] = self._picture(image, stamp_ns)
        names = [*Contract().arm_joints, *Contract().finger_joints]
        joints = np.array([0.01 * n] * 7 + [0.02, 0.02])
        messages["joint_states"] = make(
            "sensor_msgs/msg/JointState", header=header(stamp_ns), name=names, position=joints, velocity=joints[:0], effort=joints[:0]
        )
        messages["current_pose"] = pose(stamp_ns, 0.001 * n)
        messages["target_pose"] = pose(stamp_ns, 0.001 * n + 0.01)
        messages["executed_action"] = make(
            "diwa_interfaces/msg/ExecutedAction",
            **{"header": header(stamp_ns - STEP_NS), "action": action(n, self.moves(n)), "source": 1, "observation_stamp": time(0)},
            **{"checkpoint_id": "", "clamps": 0},
        )
        return messages

    def _picture(self, image: np.ndarray, stamp_ns: int) -> object:
        if self.compressed:
            data = cv2.imencode(f".{self.compressed}", image[:, :, ::-1])[1].reshape(-1)
            return make("sensor_msgs/msg/CompressedImage", header=header(stamp_ns), format=self.compressed, data=data)
        height, width = image.shape[:2]
        return make(
            "sensor_msgs/msg/Image",
            **{"header": header(stamp_ns), "height": height, "width": width, "encoding": "rgb8", "is_bigendian": 0},
            **{"step": width * 3, "data": np.ascontiguousarray(image).reshape(-1)},
        )


def make(type_name: str, /, **fields: object) -> object:
    """A message of a type."""
    return load_types().types[type_name](**fields)


def time(stamp_ns: int) -> object:
    """builtin_interfaces/Time."""
    return make("builtin_interfaces/msg/Time", sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)


def header(stamp_ns: int) -> object:
    """std_msgs/Header."""
    return make("std_msgs/msg/Header", stamp=time(stamp_ns), frame_id="world")


def action(n: int, moves: bool) -> np.ndarray:
    """The action that led into tick n."""
    return np.array([0.1 + 0.001 * (n % 500), 0, 0, 0, 0, 0, 1] if moves else [0] * 6 + [1], np.float32)


def pose(stamp_ns: int, x_m: float) -> object:
    """PoseStamped at x, not turned."""
    position = make("geometry_msgs/msg/Point", x=x_m, y=0.0, z=0.5)
    orientation = make("geometry_msgs/msg/Quaternion", x=0.0, y=0.0, z=0.0, w=1.0)
    return make(
        "geometry_msgs/msg/PoseStamped",
        header=header(stamp_ns),
        pose=make("geometry_msgs/msg/Pose", position=position, orientation=orientation),
    )
