"""Brings the graph up in simulation, runs skills on it, base beside fine-tuned, and takes it down again, whatever happens in between."""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import rclpy
from lifecycle_msgs.msg import State
from lifecycle_msgs.srv import GetState
from rclpy.signals import SignalHandlerOptions

from diwa_core.contract import Contract
from diwa_core.errors import ConfigError, DataError, DiwaError, SetupError
from diwa_core.evaluate.evaluation import noise_seed
from diwa_core.evaluate.rollout import MAX_STEPS
from diwa_core.evaluate.strips import Recording
from diwa_core.sim.skills import SKILLS, check_skill
from diwa_ros.evaluator import GraphEpisode, GraphEvaluator, GraphResult
from diwa_ros.graph import Process, load_graph
from diwa_ros.tap import STAGES, GraphTap
from diwa_ros.up import GraphRunner

LOGGER = logging.getLogger(__name__)
SIDES = BASE, FINETUNED = "base", "fine-tuned"  # in the order in which they run
READY_TIMEOUT_S = 90.0  # importing torch in five processes on a busy machine
LAST_FRAME_S = 2.0  # an episode ends with the news of its last frame; pictures and latent of it follow within milliseconds
WATCH_S = 0.2
DOMAINS = 101  # ROS_DOMAIN_ID 1 to 101 never collides with the ports Linux gives out
FIRST_PORT, PARTICIPANTS = 7400, 10  # DDSI-RTPS 9.6.1.1: participant p of domain d listens on 7400 + 250 d + 10 + 2 p


class NodeDied(DiwaError):
    """A node of the graph ended by itself; the message names it and ends with its last lines."""


@dataclass(frozen=True)
class DemoPlan:
    """What to run. skills: empty for every skill that has a policy; episodes of each, on the first starts of the evaluation list.

    checkpoint: folder with world_model/, policies/<skill>/ and, of skills that have one, finetuned/<skill>/.
    """

    checkpoint: Path
    skills: tuple[str, ...] = ()
    episodes: int = 3
    seed: int = 0
    max_steps: int = MAX_STEPS
    real_time: bool = False
    log_folder: Path = Path("runs/logs/demo")

    def finetuned(self, skill: str) -> Path:
        """Where the fine-tuned policy is, if there is one."""
        return self.checkpoint / "finetuned" / skill

    def sides(self, skill: str) -> tuple[str, ...]:
        """Both SIDES, or the base alone where there is no fine-tuned policy."""
        return SIDES if self.finetuned(skill).exists() else (BASE,)


@dataclass
class SkillRecord:
    """All episodes of one skill, by side, on the same starts with the same noise.

    The recording is of the last side's first success, else of its first episode whose frames all arrived.
    """

    skill: str
    results: dict[str, list[GraphResult]]
    recording: Recording | None = None
    recorded: int = 0  # number of the recorded episode, from 1

    @property
    def shown(self) -> str:
        """The side that is recorded: fine-tuned where there is one."""
        return list(self.results)[-1]

    @property
    def compared(self) -> bool:
        """Whether a fine-tuned policy runs beside the base."""
        return len(self.results) > 1

    def successes(self, side: str) -> int:
        """Number of successful episodes."""
        return sum(result.success for result in self.results[side])


@dataclass
class DemoRecord:
    """What happened: skills in order, stage -> milliseconds of all frames, how long the swaps took, and where the time went."""

    skills: dict[str, SkillRecord]
    latencies_ms: dict[str, list[float]]
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    ready_s: float = 0.0
    run_s: float = 0.0
    ticks: int = 0
    swap_ms: list[float] = field(default_factory=list)  # from the call of policy/load to its answer


class DemoView(Protocol):
    """Shows a demo while it runs."""

    def begin(self, record: DemoRecord) -> None:
        """The graph is ready."""

    def refresh(self, skill: str, side: str, steps: int) -> None:
        """Called a few times a second: `steps` policy steps of the running episode are done."""

    def finish_episode(self, skill: str, side: str, index: int) -> None:
        """The newest result is in the record."""


def run_demo(plan: DemoPlan, contract: Contract, view: DemoView, stops: list[int]) -> DemoRecord:
    """Start, run and stop. Raises NodeDied, SetupError when the graph is not ready in time, DataError when it refuses,
    ConfigError on a skill without a policy, GateError when the graph refuses a fine-tuned one, and KeyboardInterrupt once `stops`
    (signals received) is not empty."""
    mode = "real_time" if plan.real_time else "lockstep"
    processes = load_graph("deploy").resolve({"sim": True, "mode": mode, "checkpoint": str(plan.checkpoint)})
    join_graph(processes)
    runner = GraphRunner(processes, plan.log_folder)
    begin_s = time.monotonic()
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        watch(runner, stops)
        runner.start()
        with GraphEvaluator(contract) as evaluator:
            return DemoRun(plan, evaluator, view, lambda: watch(runner, stops)).run([p.name for p in processes], begin_s)
    finally:
        runner.stop(lambda: len(stops) > 1)
        rclpy.try_shutdown()


def join_graph(processes: list[Process]) -> None:
    """Give this process the environment of the graph's, and all of them a domain of their own unless the user chose one."""
    if "ROS_DOMAIN_ID" not in os.environ:
        os.environ["ROS_DOMAIN_ID"] = str(find_quiet_domain())
    for process in processes:
        os.environ.update(process.extra_environment)


def find_quiet_domain() -> int:
    """A ROS domain in which nobody on this machine speaks; two graphs in one would obey each other's commands. Raises SetupError."""
    for domain in random.sample(range(1, DOMAINS + 1), DOMAINS):
        if all(_is_free(FIRST_PORT + 250 * domain + 10 + 2 * participant) for participant in range(PARTICIPANTS)):
            return domain
    raise SetupError(f"expected a free ROS domain from 1 to {DOMAINS}, found all in use. Stop other graphs or set ROS_DOMAIN_ID.")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def watch(runner: GraphRunner, stops: list[int]) -> None:
    """Raises NodeDied when a required node has ended, KeyboardInterrupt when a signal came."""
    if stops:
        raise KeyboardInterrupt
    death = runner.poll()
    if death and death.required:
        lines = "".join(f"\n    {line}" for line in death.last_lines)
        raise NodeDied(f"{death.sentence}. The other nodes are stopped. Its last lines:{lines}")


def wait_active(evaluator: GraphEvaluator, nodes: list[str], log_folder: Path) -> None:
    """Wait until every node says that it is active. Raises SetupError naming the one that does not."""

    def wait(condition: Callable[[], bool], what: str) -> None:
        if not spin_until(evaluator, condition, READY_TIMEOUT_S):
            raise SetupError(f"graph: expected {what} within {READY_TIMEOUT_S:g} s, found none. Logs: {log_folder}")

    def is_active(client: object) -> bool:
        answer = client.call_async(GetState.Request())
        wait(answer.done, f"an answer of {client.srv_name}")
        return answer.result().current_state.id == State.PRIMARY_STATE_ACTIVE

    for name in nodes:
        client = evaluator.node.create_client(GetState, f"{name}/get_state")
        wait(client.service_is_ready, f"node '{name}'")
        wait(lambda client=client: is_active(client), f"node '{name}' active")
        evaluator.node.destroy_client(client)


def spin_until(evaluator: GraphEvaluator, condition: Callable[[], bool], timeout_s: float) -> bool:
    """Serve the evaluator's node until `condition` holds; false after the time limit."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        evaluator.executor.spin_once(timeout_sec=0.05)
    return True


class DemoRun:
    """Episodes on a running graph. A timer on the evaluator's node calls `check`, whose exceptions end every wait."""

    def __init__(self, plan: DemoPlan, evaluator: GraphEvaluator, view: DemoView, check: Callable[[], None]) -> None:
        self.plan, self.evaluator, self.view, self.check = plan, evaluator, view, check
        self.tap = GraphTap(evaluator.node, evaluator.contract)
        self.skill = self.side = ""
        self.record = DemoRecord({}, {stage: [] for stage in STAGES})
        evaluator.node.create_timer(WATCH_S, self._watch)

    def run(self, nodes: list[str], begin_s: float) -> DemoRecord:
        """All episodes of all skills; `begin_s`: monotonic time at which the nodes were started."""
        wait_active(self.evaluator, nodes, self.plan.log_folder)
        skills = choose_skills(self.plan.skills, self.evaluator.wait_ready())
        self._wait(self.tap.is_matched, "pictures of every camera and a sender on every topic")
        run_s = time.monotonic()
        self.record.skills = {skill: SkillRecord(skill, {side: [] for side in self.plan.sides(skill)}) for skill in skills}
        self.record.ready_s = run_s - begin_s
        self.view.begin(self.record)
        for skill, mine in self.record.skills.items():
            for side in mine.results:
                identity = self.swap(skill) if side == FINETUNED else None
                for index in range(self.plan.episodes):
                    self.run_episode(skill, side, index, identity)
                    self.record.run_s = time.monotonic() - run_s
                    self.view.finish_episode(skill, side, index)
        return self.record

    def swap(self, skill: str) -> str:
        """Put the fine-tuned policy into the running graph; returns its identity, which the runs must then report."""
        begin_s = time.monotonic()
        identity = self.evaluator.load_policy(self.plan.finetuned(skill), skill)
        self.record.swap_ms.append((time.monotonic() - begin_s) * 1e3)
        return identity

    def run_episode(self, skill: str, side: str, index: int, identity: str | None) -> None:
        """Run one episode and keep what was measured. identity: of the policy that was swapped in, None for what the graph began with."""
        self.skill, self.side, mine = skill, side, self.record.skills[skill]
        self.tap.begin()
        seed = noise_seed(self.plan.seed, index)
        result = self.evaluator.run_episode(GraphEpisode(skill, index, noise_seed=seed, max_steps=self.plan.max_steps))
        if identity not in (None, result.checkpoint_id):
            raise DataError(f"{skill}: expected the {side} policy {identity[:16]} to have run, found {result.checkpoint_id[:16]}.")
        mine.results[side].append(result)
        for stage, values in self.tap.latencies_ms().items():
            self.record.latencies_ms[stage] += values
            result.latency_ms[stage] = values
        self.record.ticks += len(self.tap.actions)
        if side == mine.shown and (mine.recording is None or (result.success and mine.successes(side) == 1)):
            episode = self.evaluator.episode_number
            if self._spin_until(lambda: self.tap.has_frames(episode, result.steps), LAST_FRAME_S):
                mine.recording, mine.recorded = self.tap.recording(episode, result.steps), index + 1
            else:
                LOGGER.warning("%s, episode %d: not every frame arrived, so it was not recorded", skill, index + 1)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        if not self._spin_until(condition, READY_TIMEOUT_S):
            raise SetupError(f"graph: expected {what} within {READY_TIMEOUT_S:g} s, found none. Logs: {self.plan.log_folder}")

    def _spin_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        return spin_until(self.evaluator, condition, timeout_s)

    def _watch(self) -> None:
        self.check()
        if self.skill:
            self.view.refresh(self.skill, self.side, self.tap.steps)


def choose_skills(asked: tuple[str, ...], available: list[str]) -> list[str]:
    """Skills to run, in the order of SKILLS unless asked for in another. Raises ConfigError on one without a policy."""
    missing = [skill for skill in asked if check_skill(skill) not in available]
    if missing:
        raise ConfigError(f"--skills: expected skills with a policy ({', '.join(available)}), found {', '.join(missing)}.")
    return list(asked) or [skill for skill in SKILLS if skill in available]
