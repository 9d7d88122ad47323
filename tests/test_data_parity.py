"""One contract reads a live graph and its bag: equal frames bit for bit, and equal beliefs of the world model about them."""

import numpy as np
import pytest
from diwa_interfaces.msg import ExecutedAction, LatentState
from geometry_msgs.msg import PoseStamped
from ros_support import ABOVE_BUTTON, make_checkpoints, make_graph, private_graph
from sensor_msgs.msg import Image, JointState
from test_ros_graph import to_state

from diwa_core.contract import Contract
from diwa_core.data.alignment import FrameAligner
from diwa_core.data.bag_import import BagAudit, ImportSettings, import_bags, read_frames
from diwa_core.data.bag_reader import BagReader
from diwa_core.data.messages import SampleReader, list_sources
from diwa_core.world_model.filter import LatentFilter
from diwa_ros.evaluator import GraphEpisode, GraphEvaluator
from diwa_ros.graph import load_graph
from diwa_ros.images import load_reader
from diwa_ros.messages import from_floats, reliable, to_ns
from diwa_ros.recorder_client import RecorderClient
from diwa_ros.up import GraphRunner

TYPES = {kind.__name__: kind for kind in (Image, JointState, PoseStamped, ExecutedAction)}
STEPS, PATIENCE_S = 24, 180.0


class LiveFrames:
    """What the encoder sees, gathered beside it: the same reader and aligner on live messages. frames and latents by stamp."""

    def __init__(self, node, contract):
        self.aligner, self.samples = FrameAligner(contract), SampleReader(contract, load_reader()[0])
        self.frames, self.latents = {}, {}
        for name, source in list_sources(contract).items():
            kind = TYPES[source.type.split("/")[-1]]
            node.create_subscription(kind, source.topic, lambda message, name=name: self.take(name, message), reliable(100))
        node.create_subscription(LatentState, "latent", self.take_latent, reliable(100))

    def take(self, name, message):
        self.aligner.add(name, self.samples.stamp_ns(name, message), self.samples.value(name, message), 0.0)
        self.frames |= {frame.stamp_ns: frame for frame in self.aligner.pop()}

    def take_latent(self, message):
        """The newest belief about a frame counts: after a reset a frame is filtered once more, as the first."""
        self.latents[to_ns(message.header.stamp)] = (message.frames_since_reset, from_floats(message.feature).copy())


@pytest.mark.timeout(900)
def test_live_graph_and_its_bag_give_equal_frames(tmp_path):
    checkpoints = make_checkpoints(tmp_path / "checkpoints")
    with private_graph():
        recorder = load_graph("record").resolve({"folder": str(tmp_path / "bags"), "record": "false", "mode": "lockstep"})
        with make_graph(checkpoints, tmp_path, mode="lockstep") as _, GraphRunner(recorder, tmp_path) as _:
            with RecorderClient(PATIENCE_S) as client, GraphEvaluator(timeout_s=PATIENCE_S) as evaluator:
                live = LiveFrames(evaluator.node, Contract())
                evaluator.wait_ready()
                client.start("parity", "turn_on_led")
                evaluator.run_episode(GraphEpisode("turn_on_led", state=to_state(ABOVE_BUTTON), noise_seed=32))
                evaluator.run_episode(GraphEpisode("open_drawer", index=1, noise_seed=3, max_steps=STEPS))
                bag = client.stop("success").bag
    compare_frames(bag, live, LatentFilter.load(checkpoints / "world_model"))
    compare_import(bag, tmp_path / "store")


def read_bag(bag):
    with BagReader(bag) as reader:
        return [aligned.frame for aligned in read_frames(reader, Contract(), ImportSettings(), BagAudit("", ""))]


def compare_frames(bag, live, latent_filter):
    frames = [frame for frame in read_bag(bag) if frame.stamp_ns in live.frames]
    assert len(frames) > STEPS
    beliefs = 0
    for frame in frames:
        other = live.frames[frame.stamp_ns]
        for view, image in frame.observation.images.items():
            np.testing.assert_array_equal(image, other.observation.images[view])
        np.testing.assert_array_equal(frame.observation.robot_obs, other.observation.robot_obs)
        np.testing.assert_array_equal(frame.observation.target_pose, other.observation.target_pose)
        np.testing.assert_array_equal(frame.previous_action, other.previous_action)
        count, feature = live.latents.get(frame.stamp_ns, (0, None))
        if count == 1:
            latent_filter.reset()
        if count != latent_filter.frames + 1:
            continue  # filtered before the recording began
        filtered = latent_filter.update(frame.observation, frame.previous_action if latent_filter.frames else None)
        np.testing.assert_array_equal(filtered, feature)
        beliefs += 1
    assert beliefs > STEPS, "the encoder's own beliefs follow from the bag"


def compare_import(bag, path):
    """The store holds those frames, an episode for every reset of the simulation."""
    report = import_bags([bag], path, settings=ImportSettings(idle_s=0.0))
    frames, store = read_bag(bag), report.store
    assert not report.refused and len(store.episodes) >= 2 and "scene_obs" in store.fields
    assert report.audits[0].frames == len(frames) and report.audits[0].takes[-1]["outcome"] == "success"
    pictures = {frame.observation.images["rgb_static"].tobytes() for frame in frames}
    assert all(picture.tobytes() in pictures for picture in store.load(("rgb_static",))["rgb_static"])
