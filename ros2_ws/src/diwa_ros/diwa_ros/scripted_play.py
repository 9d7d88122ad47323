"""A scripted operator for the simulation: the experts of the simulated play drive a running graph on the topic that teleoperation uses.

`python -m diwa_ros.scripted_play --play 600 --seed 1` or `--demos open_drawer --episodes 4`; the graph may be in real time or in lock-step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import rclpy
from diwa_interfaces.msg import ActionChunk, SimState
from diwa_interfaces.srv import ResetSim
from geometry_msgs.msg import PoseStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.utilities import remove_ros_args

from diwa_core.contract import ROBOT_OBS_SIZE, Contract
from diwa_core.errors import DataError, DiwaError, SetupError
from diwa_core.sim.demos import DEFAULT_NOISE, demonstrate_on
from diwa_core.sim.play import PlaySettings, play_on
from diwa_core.sim.skills import SKILLS, check_skill
from diwa_ros.messages import from_pose, reliable, to_ns
from diwa_ros.teleop_stream import OperatorStream

ANSWER_S = 0.1  # a tick that stays unanswered for so long gets its action again: a node may have joined late
KEPT_TICKS = 60


class LiveTable:
    """The play table behind a running graph, as the recorder that the scripts of `diwa_core.sim` step. Use as a context.

    robot_obs holds what the scripts read: pose 0:6 and last gripper action 14. `check` is called while waiting; what it raises ends it.
    """

    def __init__(self, contract: Contract | None = None, timeout_s: float = 30.0, check: Callable[[], None] = lambda: None) -> None:
        """`timeout_s`: longest wait for the graph to answer anything. Needs rclpy.init."""
        self.timeout_s, self.check = timeout_s, check
        self.node = rclpy.create_node("scripted_play")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.stream = OperatorStream(self.node.create_publisher(ActionChunk, "action_chunk", reliable(5)), contract or Contract())
        self.reset_client = self.node.create_client(ResetSim, "sim/reset")
        self.states: dict[int, SimState] = {}
        self.poses: dict[str, dict[int, np.ndarray]] = {"current_pose": {}, "target_pose": {}}
        self.node.create_subscription(SimState, "sim/state", self._take_state, reliable(10))
        for topic in self.poses:
            self.node.create_subscription(PoseStamped, topic, self._make_callback(topic), reliable(10))
        self.stamp_ns, self.episode, self.count = -1, 0, 0

    def __enter__(self) -> LiveTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.count

    def close(self) -> None:
        """Let go and leave the graph."""
        self.stream.end()
        self.executor.remove_node(self.node)
        self.node.destroy_node()

    def wait_ready(self) -> None:
        """Wait for bridge and controller. Raises SetupError."""
        answers = {
            "calvin_bridge (service sim/reset)": self.reset_client.service_is_ready,
            "franka_controller (topic action_chunk)": lambda: self.node.count_subscribers("action_chunk") > 0,
        }
        for name, is_ready in answers.items():
            if not self.spin_until(is_ready):
                raise SetupError(f"graph: expected {name} within {self.timeout_s:g} s, found none. Start it: diwa up deploy.")

    def reset(self, skill: str, index: int, seed: int = 0, split: str = "train") -> None:
        """Put the simulation into a start state of `skill` and count frames anew. Raises DataError when it refuses."""
        self.stream.end()
        self.wait_ready()
        future = self.reset_client.call_async(ResetSim.Request(skill=skill, split=split, index=index, seed=seed))
        if not self.spin_until(future.done):
            raise DataError(f"sim/reset: expected an answer within {self.timeout_s:g} s, found none. Is the bridge alive?")
        if not future.result().success:
            raise DataError(f"sim/reset was refused: {future.result().message}")
        self.episode = future.result().episode
        self.begin()

    def begin(self) -> None:
        """Observe the present tick and count frames anew."""
        self.count = 0
        self._observe(-1)

    def step(self, action: np.ndarray, skill: int = -1) -> None:
        """Send `action` for the present tick and observe the next. Raises DataError when the graph does not go on."""
        name, sent_s = (SKILLS[skill] if skill >= 0 else ""), time.monotonic()
        self.stream.send(self.stamp_ns, action, name)
        stamp_ns = self.stamp_ns

        def send_again() -> None:
            nonlocal sent_s
            if time.monotonic() - sent_s > ANSWER_S:
                sent_s = time.monotonic()
                self.stream.send(stamp_ns, action, name)

        self._observe(self.stamp_ns, send_again)
        self.count += 1

    def spin_until(self, condition: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Serve the node until `condition` holds; false after the time limit."""
        end_s = time.monotonic() + self.timeout_s
        while not condition():
            if time.monotonic() > end_s:
                return False
            self.check()
            meanwhile()
            self.executor.spin_once(timeout_sec=0.02)
        return True

    # -- observing ---------------------------------------------------------------------------------------------------------------------

    def _observe(self, after_ns: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Take the newest whole tick later than `after_ns` of this episode."""
        if not self.spin_until(lambda: self._newest(after_ns) is not None, meanwhile):
            raise DataError(f"graph: expected the next tick within {self.timeout_s:g} s, found none. See /diagnostics.")
        self.stamp_ns = self._newest(after_ns)
        state = self.states[self.stamp_ns]
        self.scene_obs = np.array(state.scene_obs)
        self.target_pose = self.poses["target_pose"][self.stamp_ns]
        self.robot_obs = np.zeros(ROBOT_OBS_SIZE)
        self.robot_obs[:6], self.robot_obs[14] = self.poses["current_pose"][self.stamp_ns], state.applied_action[6]

    def _newest(self, after_ns: int) -> int | None:
        """Stamp of the newest tick of which everything has arrived."""
        whole = self.states.keys() & self.poses["current_pose"].keys() & self.poses["target_pose"].keys()
        fresh = [stamp for stamp in whole if stamp > after_ns and self.states[stamp].episode >= self.episode]
        return max(fresh, default=None)

    def _take_state(self, message: SimState) -> None:
        _remember(self.states, to_ns(message.header.stamp), message)

    def _make_callback(self, topic: str) -> Callable[[PoseStamped], None]:
        return lambda message: _remember(self.poses[topic], to_ns(message.header.stamp), from_pose(message))


def _remember(ticks: dict[int, object], stamp_ns: int, value: object) -> None:
    ticks[stamp_ns] = value
    while len(ticks) > KEPT_TICKS:
        del ticks[next(iter(ticks))]


def play_live(table: LiveTable, frames: int, seed: int) -> None:
    """Play on the running graph for `frames` ticks, from the scene as it is."""
    table.wait_ready()
    table.begin()
    play_on(table, np.random.default_rng(seed), replace(PlaySettings(), episode_frames=frames))
    table.stream.end()


def demonstrate_live(table: LiveTable, skill: str, number: int, seed: int, noise: float) -> bool:
    """One attempt from the `number`-th training start of `skill`; whether it succeeded by the simulator's oracle."""
    table.reset(skill, number, seed)
    success = demonstrate_on(table, skill, np.random.default_rng([seed, SKILLS.index(skill), number]), noise)
    table.stream.end()
    return success


def main(arguments: list[str] | None = None) -> int:
    """Play or demonstrate on a graph that runs already; one line per episode."""
    parser = argparse.ArgumentParser(prog="scripted_play", description=__doc__.splitlines()[0])
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--play", type=int, metavar="FRAMES", help="play for so many ticks")
    asked.add_argument("--demos", nargs="+", metavar="SKILL", help="demonstrate these skills, each from starts of the training list")
    parser.add_argument("--episodes", type=int, default=4, help="attempts at each skill")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--noise", type=float, default=DEFAULT_NOISE, help="0 precise to 1 careless")
    options = parser.parse_args(remove_ros_args(sys.argv if arguments is None else arguments)[1:])
    rclpy.init()
    try:
        with LiveTable() as table:
            if options.play:
                play_live(table, options.play, options.seed)
                print(f"played {len(table)} ticks")
            for skill in map(check_skill, options.demos or ()):
                for number in range(options.episodes):
                    success = demonstrate_live(table, skill, number, options.seed, options.noise)
                    print(f"{skill} {number}: {'success' if success else 'failure'} after {len(table)} ticks", flush=True)
    except DiwaError as error:
        print(f"scripted_play: {error}", file=sys.stderr)
        return 1
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
