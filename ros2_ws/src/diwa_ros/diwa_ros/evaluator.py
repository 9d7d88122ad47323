"""Runs episodes on a running graph: reset the simulation, run a skill, judge it by the oracle, cancel on success, measure latencies."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import rclpy
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ActionChunk, ControllerStatus, ExecutedAction, LatentState, PolicyStatus, RobotCommand, SimState
from diwa_interfaces.srv import LoadPolicy, ResetSim
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.task import Future
from rclpy.utilities import remove_ros_args
from sensor_msgs.msg import Image

from diwa_core.contract import Contract
from diwa_core.errors import DataError, DiwaError, GateError, SetupError
from diwa_core.evaluate.comparison import compare_policies
from diwa_core.evaluate.comparison_report import write_comparison_report
from diwa_core.evaluate.evaluation import EpisodePlan, noise_seed
from diwa_core.evaluate.rollout import MAX_STEPS
from diwa_core.sim.skills import SkillOracle
from diwa_ros.images import read_image_numpy
from diwa_ros.messages import LATCHED, from_floats, reliable, to_float64, to_ns

STAGES = ("latent", "chunk", "command", "executed")  # of one frame, in the order in which they happen


@dataclass(frozen=True)
class GraphEpisode:
    """One episode to run: a start from a seeded list (or `state`, robot_obs then scene_obs) and the seed of the policy's noise."""

    skill: str
    index: int = 0
    split: str = "evaluation"
    list_seed: int = 0
    noise_seed: int = 0
    max_steps: int = MAX_STEPS
    state: tuple[float, ...] = ()


@dataclass
class GraphResult:
    """Outcome of one episode.

    steps: policy steps until success or the cap; latency_ms: stage -> milliseconds from the camera frame to each message of that stage
    (by receipt here; a chunk only on frames that got one); frames: pictures of the first camera by time, if asked for;
    features: what the encoder believed on those frames.
    """

    episode: GraphEpisode
    success: bool
    steps: int
    message: str
    checkpoint_id: str
    world_model_id: str
    wall_s: float
    final_scene_obs: np.ndarray
    latency_ms: dict[str, list[float]] = field(default_factory=dict)
    frames: list[np.ndarray] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)


@dataclass
class _Log:
    """What has been seen since the reset, by stamp in nanoseconds."""

    scenes: dict[int, np.ndarray] = field(default_factory=dict)
    seen_s: dict[int, float] = field(default_factory=dict)
    latency_ms: dict[str, dict[int, float]] = field(default_factory=lambda: {stage: {} for stage in STAGES})
    frames: dict[int, np.ndarray] = field(default_factory=dict)
    features: dict[int, np.ndarray] = field(default_factory=dict)
    first_ns: int | None = None  # first policy step
    world_model_id: str = ""


class EpisodeLog(Protocol):
    """Ticks of an episode. first_ns: stamp of the first policy step; scenes: scene_obs by stamp."""

    first_ns: int | None
    scenes: dict[int, np.ndarray]


def first_success(log: EpisodeLog, oracle: SkillOracle | None, step_ns: int, max_steps: int) -> int | None:
    """Policy steps until the oracle's first success, None while there is none within `max_steps`."""
    if log.first_ns is None or oracle is None:
        return None
    for stamp_ns, scene in log.scenes.items():
        steps = round((stamp_ns - log.first_ns) / step_ns)
        if 0 < steps <= max_steps and oracle.success(scene):
            return steps
    return None


def has_succeeded(log: EpisodeLog, oracle: SkillOracle | None, step_ns: int, max_steps: int, tail_steps: int) -> bool:
    """Whether the oracle has seen success, and `tail_steps` more, or the cap, have come."""
    steps = first_success(log, oracle, step_ns, max_steps)
    return steps is not None and round((max(log.scenes) - log.first_ns) / step_ns) >= min(steps + tail_steps, max_steps)


class GraphEvaluator:
    """A client of a running graph. Use it as a context manager, or call `close`; it owns its node and executor and needs rclpy.init."""

    def __init__(self, contract: Contract | None = None, keep_frames: bool = False, timeout_s: float = 30.0) -> None:
        """`timeout_s`: longest wait for the graph to answer anything."""
        self.contract = contract or Contract()
        self.step_ns = round(1e9 / self.contract.rate_hz)
        self.timeout_s = timeout_s
        self.node = rclpy.create_node("evaluator")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.reset_client = self.node.create_client(ResetSim, "sim/reset")
        self.load_client = self.node.create_client(LoadPolicy, "policy/load")
        self.action_client = ActionClient(self.node, RunSkill, "run_skill")
        self.log = _Log()
        self.episode_number: int | None = None
        self.newest_state: SimState | None = None
        self.controller: ControllerStatus | None = None
        self.policy: PolicyStatus | None = None
        self.oracle: SkillOracle | None = None
        self._subscribe(keep_frames)

    def _subscribe(self, keep_frames: bool) -> None:
        listen = self.node.create_subscription
        listen(SimState, "sim/state", self._take_state, reliable(50))
        listen(LatentState, "latent", self._take_latent, reliable(10))
        listen(ActionChunk, "action_chunk", self._take_chunk, reliable(10))
        listen(RobotCommand, "sim/command", lambda m: self._stage("command", to_ns(m.header.stamp)), reliable(10))
        listen(ExecutedAction, "executed_action", lambda m: self._stage("executed", to_ns(m.header.stamp)), reliable(10))
        listen(ControllerStatus, "controller/status", lambda m: setattr(self, "controller", m), LATCHED)
        listen(PolicyStatus, "policy/status", lambda m: setattr(self, "policy", m), LATCHED)
        self.keep_frames = keep_frames
        if keep_frames:
            listen(Image, self.contract.images[0].topic, self._take_image, reliable(50))

    def __enter__(self) -> GraphEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the graph."""
        self.executor.remove_node(self.node)
        self.action_client.destroy()
        self.node.destroy_node()

    # -- running -----------------------------------------------------------------------------------------------------------------------

    def wait_ready(self) -> list[str]:
        """Wait until bridge, controller, encoder and policy are there; returns the skills. Raises SetupError naming what is missing."""
        missing = {
            "calvin_bridge (service sim/reset)": self.reset_client.service_is_ready,
            "policy (action run_skill)": self.action_client.server_is_ready,
            "franka_controller (topic controller/status)": lambda: self.controller is not None,
            "policy (topic policy/status)": lambda: self.policy is not None,
            "encoder (topic latent)": lambda: self.node.count_publishers("latent") > 0,
        }
        for name, is_ready in missing.items():
            if not self._spin_until(is_ready):
                raise SetupError(f"graph: expected {name} within {self.timeout_s:g} s, found none. Is the graph up? Its logs say why not.")
        return list(self.policy.skills)

    def run(self, episodes: Iterable[GraphEpisode]) -> Iterator[GraphResult]:
        """Run episodes one after the other, giving each result as soon as it is there. Raises DataError when the graph refuses."""
        for episode in episodes:
            yield self.run_episode(episode)

    def run_plans(self, plans: Iterable[EpisodePlan], report: Callable[[EpisodePlan, GraphResult], None]) -> None:
        """As `diwa_core.evaluate.evaluation.evaluate`, on the graph: swaps policies on it as the plans ask.

        Raises DataError as `run_episode` does, also when somebody else swaps a policy, and GateError as `load_policy` does.
        """
        running, identity = ("", ""), ""
        for plan in plans:
            if running != (plan.skill, plan.policy):
                running, identity = (plan.skill, plan.policy), self.load_policy(plan.policy, plan.skill)
            episode = GraphEpisode(plan.skill, plan.index, plan.split, plan.list_seed, plan.noise_seed, plan.max_steps)
            result = self.run_episode(episode)
            if result.checkpoint_id != identity:
                raise DataError(
                    f"{plan.skill}: expected policy {identity[:16]} to have run, found {result.checkpoint_id[:16]}. Who swapped it?"
                )
            report(plan, result)

    def load_policy(self, path: str | Path, skill: str = "") -> str:
        """Swap the policy of a skill on the running graph; returns the identity of the new one. Raises GateError when it is refused."""
        if not self._spin_until(self.load_client.service_is_ready):
            raise SetupError(f"policy/load: expected the policy node's service within {self.timeout_s:g} s, found none. Is the graph up?")
        request = LoadPolicy.Request(path=str(Path(path).absolute()), skill=skill)  # the node may have been started elsewhere
        request.max_action_difference = 2.0  # what is compared may differ
        response = self._await(self.load_client.call_async(request), "policy/load")
        if not response.success:
            raise GateError(f"policy/load refused {path}: {response.message}")
        return response.checkpoint_id

    def run_episode(self, episode: GraphEpisode, tail_steps: int = 0) -> GraphResult:
        """Reset, run, judge; after a success the policy goes on for `tail_steps`, within the cap.

        Raises SetupError when the graph is not there, DataError when it refuses or does not answer.
        """
        self.wait_ready()
        self._reset(episode)
        begin_s = time.monotonic()
        goal = RunSkill.Goal(skill=episode.skill, max_steps=episode.max_steps, seed=episode.noise_seed)
        handle = self._await(self.action_client.send_goal_async(goal), "run_skill")
        if not handle.accepted:
            self._spin_until(lambda: "run_skill" in self.policy.detail, 1.0)
            raise DataError(f"run_skill was refused: {self.policy.detail}")
        ended = handle.get_result_async()
        limit_s = self.timeout_s + 1.0 * episode.max_steps

        def is_over() -> bool:
            return ended.done() or has_succeeded(self.log, self.oracle, self.step_ns, episode.max_steps, tail_steps)

        if not self._spin_until(is_over, limit_s):
            raise DataError(f"run_skill: expected an end within {limit_s:.0f} s, found none. Controller: {self.controller.reason}")
        if not ended.done():
            self._await(handle.cancel_goal_async(), "cancel")
        result = self._await(ended, "the result of run_skill").result
        return self._conclude(episode, result, time.monotonic() - begin_s)

    def _reset(self, episode: GraphEpisode) -> None:
        """Put the simulation into the start state and wait until the encoder has seen it."""
        request = ResetSim.Request(skill=episode.skill, split=episode.split, index=episode.index, seed=episode.list_seed)
        request.state = to_float64(np.array(episode.state))
        self.episode_number, self.log = None, _Log()
        response = self._await(self.reset_client.call_async(request), "sim/reset")
        if not response.success:
            raise DataError(f"sim/reset was refused: {response.message}")
        self.episode_number = response.episode
        if self.newest_state is not None:
            self._take_state(self.newest_state)  # the first tick may come before the answer that says whose it is
        self.oracle = SkillOracle(episode.skill, np.array(response.scene_obs))
        if not self._spin_until(lambda: any(stamp in self.log.features for stamp in self.log.scenes)):
            state = self.controller.reason if self.controller else "silent"
            raise DataError(f"encoder: expected a latent of the start within {self.timeout_s:g} s, found none. Controller: {state}")

    def _judge(self, max_steps: int) -> int | None:
        return first_success(self.log, self.oracle, self.step_ns, max_steps)

    def _conclude(self, episode: GraphEpisode, result: RunSkill.Result, wall_s: float) -> GraphResult:
        log = self.log
        if result.completed:
            last_ns = log.first_ns + episode.max_steps * self.step_ns
            self._spin_until(lambda: any(stamp >= last_ns - self.step_ns // 2 for stamp in log.scenes))
        success_steps = self._judge(episode.max_steps)
        if success_steps is None and not result.completed:
            raise DataError(f"run_skill ended early: {result.message}")
        steps = success_steps or result.steps
        final_ns = min(log.scenes, key=lambda stamp: abs(stamp - log.first_ns - steps * self.step_ns))
        if self.keep_frames:
            self._spin_until(lambda: final_ns in log.frames, 1.0)
        latency_ms = {stage: list(values.values()) for stage, values in log.latency_ms.items()}
        stamps = [stamp for stamp in sorted(log.scenes) if stamp <= final_ns and stamp in log.frames]
        return GraphResult(
            episode,
            success_steps is not None,
            steps,
            result.message,
            result.checkpoint_id,
            log.world_model_id,
            wall_s,
            log.scenes[final_ns],
            latency_ms,
            [log.frames[stamp] for stamp in stamps],
            [log.features[stamp] for stamp in stamps if stamp in log.features],
        )

    # -- listening ---------------------------------------------------------------------------------------------------------------------

    def _take_state(self, message: SimState) -> None:
        self.newest_state = message
        if message.episode != self.episode_number:
            return
        stamp_ns = to_ns(message.header.stamp)
        self.log.seen_s.setdefault(stamp_ns, time.monotonic())
        self.log.scenes.setdefault(stamp_ns, np.array(message.scene_obs))

    def _take_latent(self, message: LatentState) -> None:
        stamp_ns = to_ns(message.header.stamp)
        self.log.world_model_id = message.world_model_id
        self.log.features[stamp_ns] = from_floats(message.feature).copy() if self.keep_frames else None
        self._stage("latent", stamp_ns)

    def _take_chunk(self, message: ActionChunk) -> None:
        if message.horizon == 0 or message.hold:
            return
        stamp_ns = to_ns(message.header.stamp)
        if self.log.first_ns is None:
            self.log.first_ns = stamp_ns
        self._stage("chunk", stamp_ns)

    def _take_image(self, message: Image) -> None:
        stamp_ns = to_ns(message.header.stamp)
        if stamp_ns not in self.log.frames:
            self.log.frames[stamp_ns] = read_image_numpy(message).copy()

    def _stage(self, stage: str, stamp_ns: int) -> None:
        """Note how long after its frame a message arrived; executed actions carry the stamp to within a nanosecond of rounding."""
        now_s = time.monotonic()
        stamp_ns = next((stamp for stamp in (stamp_ns, stamp_ns - 1, stamp_ns + 1) if stamp in self.log.seen_s), None)
        if stamp_ns is not None and self.log.first_ns is not None:
            self.log.latency_ms[stage].setdefault(stamp_ns, (now_s - self.log.seen_s[stamp_ns]) * 1e3)

    # -- waiting -----------------------------------------------------------------------------------------------------------------------

    def _spin_until(self, condition: callable, timeout_s: float | None = None) -> bool:
        end_s = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while not condition():
            if time.monotonic() > end_s:
                return False
            self.executor.spin_once(timeout_sec=0.05)
        return True

    def _await(self, future: Future, what: str) -> object:
        if not self._spin_until(future.done):
            raise DataError(f"{what}: expected an answer within {self.timeout_s:g} s, found none. Is the node alive?")
        return future.result()


def main(arguments: list[str] | None = None) -> int:
    """`python -m diwa_ros.evaluator --skill open_drawer --episodes 5`: one JSON line per episode; 1 when the graph does not answer.
    With --pair it compares folders of policies as `diwa evaluate --pair` does, but on the graph, swapping them on it."""
    parser = argparse.ArgumentParser(prog="evaluator", description=main.__doc__)
    parser.add_argument("--skill", action="append", help="skill to run; repeat for several (default: all the policy node has)")
    parser.add_argument("--episodes", type=int, default=3, help="episodes of each skill")
    parser.add_argument("--split", default="evaluation", help="list of start states")
    parser.add_argument("--seed", type=int, default=0, help="seed of the policy's noise")
    parser.add_argument("--max-steps", type=int, default=MAX_STEPS)
    parser.add_argument(
        "--pair", nargs=2, action="append", metavar=("BASE", "FINETUNED"), help="folders of policies to compare; repeat for seeds"
    )
    parser.add_argument("--out", type=Path, default=Path("reports/graph"), help="folder for what --pair writes")
    options = parser.parse_args(remove_ros_args(sys.argv if arguments is None else arguments)[1:])
    rclpy.init()
    try:
        with GraphEvaluator() as evaluator:
            if options.pair:
                compare_on_graph(evaluator, options)
            else:
                run_skills(evaluator, options)
    except DiwaError as error:
        print(f"evaluator: {error}", file=sys.stderr)
        return 1
    finally:
        rclpy.try_shutdown()
    return 0


def run_skills(evaluator: GraphEvaluator, options: argparse.Namespace) -> None:
    """Print one JSON line per episode of the policies that are on the graph."""
    skills = options.skill or evaluator.wait_ready()
    plan = [
        GraphEpisode(skill, index, options.split, 0, noise_seed(options.seed, index), options.max_steps)
        for skill in skills
        for index in range(options.episodes)
    ]
    for result in evaluator.run(plan):
        print(json.dumps(summarise(result)), flush=True)


def compare_on_graph(evaluator: GraphEvaluator, options: argparse.Namespace) -> None:
    """Write comparison.json, report.html and episodes.jsonl; the policies that ran last stay on the graph."""
    comparison = compare_policies(
        options.pair,
        options.out / "episodes.jsonl",
        evaluator.run_plans,
        options.skill or (),
        options.episodes,
        options.split,
        options.seed,
        options.max_steps,
        runner="ROS 2 graph",
    )
    comparison.write(options.out / "comparison.json")
    page = write_comparison_report(
        options.out / "report.html", comparison, shlex.join(["python", "-m", "diwa_ros.evaluator", *sys.argv[1:]])
    )
    print(f"mean success {comparison.base} -> {comparison.finetuned}, gain {comparison.gain}; {page}")


def summarise(result: GraphResult) -> dict[str, object]:
    """What a JSON line says about one episode: outcome, identities and median latency of every stage in milliseconds."""
    medians = {stage: round(float(np.median(values)), 2) for stage, values in result.latency_ms.items() if values}
    return {
        **{name: value for name, value in asdict(result.episode).items() if name != "state"},
        "success": result.success,
        "steps": result.steps,
        "wall_s": round(result.wall_s, 2),
        "latency_ms": medians,
        "checkpoint_id": result.checkpoint_id,
    }


if __name__ == "__main__":
    sys.exit(main())
