"""What can go wrong with a running graph, for tests/test_faults.py and benchmarks/faults.py: one list for every backend."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from diwa_interfaces.msg import ActionChunk
from sensor_msgs.msg import Image

from diwa_ros.messages import from_floats, to_float32, to_ns, to_time

if TYPE_CHECKING:
    from fault_rig import Change, Rig


@dataclass(frozen=True)
class Fault:
    """One way to go wrong. states: one of which the controller must show; holds: whether the arm must come to rest.

    prepare: what takes its time and comes before the motion; diagnostic: a check on /diagnostics that must complain as well;
    only: the backend that can have the fault, None for all.
    """

    name: str
    inject: Callable[[Rig], object]
    states: tuple[str, ...] = ("HOLD", "FAULT")
    mended_by: str = ""
    holds: bool = True
    controller_lives: bool = True
    watch_s: float = 1.5  # how long is watched after the state has shown
    diagnostic: str = ""
    only: str | None = None
    prepare: Callable[[Rig], object] = lambda rig: None

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


def cut_network(rig: Rig) -> None:
    """Nothing passes any more."""
    for topic in rig.WIRE:
        rig.change(topic, lambda message: [])


def intrude(rig: Rig) -> None:
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


def jam_gripper(rig: Rig) -> None:
    """The gripper no longer answers, and the policy wants it open."""
    rig.set_fault("gripper_abort")

    def open_hand(message: ActionChunk) -> list[ActionChunk]:
        if message.horizon:
            actions = from_floats(message.actions).reshape(message.horizon, message.action_dim).copy()
            actions[:, 6] = 1.0
            set_actions(message, actions)
        return [message]

    rig.change("action_chunk", open_hand)


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
    Fault("clock jump", lambda rig: rig.change(rig.CLOCK, lambda message: shift(message, 5.0)), mended_by="the clock is right again"),
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
        "bridge killed",
        lambda rig: rig.signal("calvin_bridge", signal.SIGKILL),
        states=("DISCONNECTED",),
        mended_by="bridge started again",
        only="simulation",
    ),
    Fault(
        "robot gone",
        lambda rig: rig.signal("fake_fr3", signal.SIGKILL),
        states=("DISCONNECTED",),
        mended_by="robot started again",
        only="fake-fr3",
    ),
    Fault("reflex", lambda rig: rig.set_fault("reflex"), states=("REFLEX",), only="fake-fr3"),
    Fault(
        "user stop at the robot",
        lambda rig: rig.set_fault("user_stop"),
        states=("USER_STOPPED",),
        mended_by="the stop is released",
        only="fake-fr3",
    ),
    Fault("robot link cut", lambda rig: rig.set_fault("link_loss"), states=("DISCONNECTED",), watch_s=0.7, only="fake-fr3"),
    Fault("robot frozen", lambda rig: rig.set_fault("freeze"), states=("DISCONNECTED",), mended_by="the robot goes on", only="fake-fr3"),
    Fault(
        "gripper stuck",
        jam_gripper,
        states=("ACTIVE",),
        mended_by="the gripper works again",
        holds=False,
        diagnostic="franka_controller: gripper",
        only="fake-fr3",
    ),
    Fault(
        "DDS peer flooding the command topic",
        lambda rig: rig.flood(),
        prepare=lambda rig: rig.prepare_flood(),
        mended_by="the peer is gone",
    ),
    Fault("second publisher on the command topic", intrude, mended_by="the publisher is gone"),
    Fault("swap during motion", lambda rig: rig.load_other(), states=("ACTIVE",), holds=False),
)


def faults_of(backend: str) -> list[Fault]:
    """What can go wrong with a backend."""
    return [fault for fault in FAULTS if fault.only in (None, backend)]
