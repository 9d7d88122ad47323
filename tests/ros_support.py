"""Checkpoints with known behaviour, a graph of real processes on a private domain, and a probe node, for the tests of the nodes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor

from diwa_core.contract import Contract
from diwa_core.policy.diffusion import DiffusionPolicy, PolicyConfig
from diwa_core.policy.store import save_policy
from diwa_core.sim.state import SceneState
from diwa_core.world_model.filter import save_world_model
from diwa_core.world_model.model import SIZES, WorldModel
from diwa_ros.demo import find_quiet_domain
from diwa_ros.graph import load_graph
from diwa_ros.messages import reliable
from diwa_ros.up import GraphRunner

DOWN = np.array([0, 0, -0.3, 0, 0, 0, -1], dtype=np.float32)
ABOVE_BUTTON = SceneState(tcp_pose=np.array([-0.12, -0.12, 0.53, np.pi, 0, np.pi / 2]), gripper=-1.0)


def make_checkpoints(folder: Path, contract: Contract | None = None, seed: int = 0) -> Path:
    """A `small` world model with random weights, a policy that pushes down (turn_on_led) and one that moves at random (open_drawer)."""
    contract = contract or Contract()
    torch.manual_seed(seed)
    model = WorldModel(SIZES["small"])
    world_model_id = save_world_model(folder / "world_model", model, contract, {})
    config = PolicyConfig(feature_size=model.feature_size, hidden=(64, 64, 64))
    for skill, policy in (("turn_on_led", train_constant(config, DOWN)), ("open_drawer", DiffusionPolicy(config))):
        save_policy(folder / "policies" / skill, policy, contract, skill, world_model_id, {})
    return folder


def train_constant(config: PolicyConfig, action: np.ndarray, updates: int = 400) -> DiffusionPolicy:
    """A policy that learned one action, whatever it sees."""
    policy = DiffusionPolicy(config)
    optimiser = torch.optim.Adam(policy.parameters(), lr=3e-3)
    target = torch.from_numpy(action).expand(64, config.horizon, config.action_size)
    for _ in range(updates):
        loss = policy.loss(target, torch.zeros(64, config.feature_size))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.nn.init.zeros_(policy.base.feature_layer.weight)  # untrained: what it would see is noise
    return policy


@contextmanager
def private_graph() -> Iterator[None]:
    """rclpy on a domain of its own; child processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in private_environment().items():
            patch.setenv(name, value)
        rclpy.init()
        try:
            yield
        finally:
            rclpy.try_shutdown()


def private_environment() -> dict[str, str]:
    """Variables that keep a test's graph to itself and check every field of every message."""
    return {
        "ROS_DOMAIN_ID": str(find_quiet_domain()),
        **load_graph("deploy").resolve()[0].environment,
        "ROS_PYTHON_CHECK_FIELDS": "1",
    }


def make_graph(checkpoints: Path, log_folder: Path, nodes: tuple[str, ...] | None = None, **arguments: object) -> GraphRunner:
    """The graph of config/deploy.yaml, or some of its nodes, not yet started."""
    processes = load_graph("deploy").resolve({"checkpoint": str(checkpoints), **arguments})
    return GraphRunner([p for p in processes if nodes is None or p.name in nodes], log_folder)


class Probe:
    """A node of the test itself: keeps what it hears and spins until something holds."""

    def __init__(self) -> None:
        self.node = rclpy.create_node(f"probe_{os.getpid()}")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.heard: dict[str, list] = {}
        self.diagnostics: dict[str, tuple[bytes, str]] = {}
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._take_diagnostics, reliable(50))

    def _take_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.diagnostics[status.name] = (status.level, status.message)

    def hear(self, message_type: type, topic: str, qos: object = None) -> list:
        """Collect the messages of a topic; returns the growing list."""
        heard = self.heard.setdefault(topic, [])
        self.node.create_subscription(message_type, topic, heard.append, qos or reliable(50))
        return heard

    def add(self, node: object) -> None:
        """Spin another node of this process along."""
        self.executor.add_node(node)

    def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Spin until `condition` holds; fails the test after `timeout_s`."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end_s, f"nothing after {timeout_s} s; diagnostics: {self.diagnostics}"
            self.executor.spin_once(timeout_sec=0.02)

    def spin(self, seconds: float) -> None:
        """Spin for a while."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.executor.spin_once(timeout_sec=0.01)

    def call(self, service_type: type, name: str, request: object = None, timeout_s: float = 10.0) -> object:
        """Call a service and return its response."""
        client = self.node.create_client(service_type, name)
        self.until(client.service_is_ready, timeout_s)
        future = client.call_async(request or service_type.Request())
        self.until(future.done, timeout_s)
        self.node.destroy_client(client)
        return future.result()

    def close(self) -> None:
        """Destroy the node."""
        self.executor.shutdown(timeout_sec=0)
        self.node.destroy_node()
