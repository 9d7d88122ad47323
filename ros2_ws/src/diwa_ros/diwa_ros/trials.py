"""Trials of an evaluation on a running graph: in simulation as `GraphEvaluator` runs episodes, on a robot with an operator."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ActionChunk, ControllerStatus, EpisodeMark, ExecutedAction, LatentState, SimState
from diwa_interfaces.srv import ResetSim, StartRecording, StopRecording
from geometry_msgs.msg import PoseStamped
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future
from sensor_msgs.msg import Image
from std_srvs.srv import Trigger

from diwa_core.contract import Contract
from diwa_core.data.bag_format import DISCARD, FAILURE, OUTCOMES, SUCCESS
from diwa_core.errors import DataError, DiwaError, GateError, SetupError
from diwa_core.evaluate.rollout import AFTER_SUCCESS
from diwa_core.evaluate.start_overlay import StartRenderer, draw_overlay, start_error, write_picture
from diwa_core.evaluate.trial_journal import BY_OPERATOR, BY_ORACLE, ROBOT, SIMULATION, TrialRow
from diwa_core.evaluate.trial_run import Assignment, Seen, check_identity
from diwa_core.sim.skills import SkillOracle
from diwa_core.sim.state import MAX_DELTA_M, MAX_DELTA_RAD, NEUTRAL_POSE, SceneState, wrap_angle
from diwa_ros.demo import join_graph, wait_active, watch
from diwa_ros.evaluator import GraphEpisode, GraphEvaluator, first_success, has_succeeded
from diwa_ros.graph import Process
from diwa_ros.images import read_image_numpy
from diwa_ros.messages import CAMERA, LATCHED, from_floats, from_pose, reliable, to_ns
from diwa_ros.tap import GraphTap
from diwa_ros.teleop_stream import OPERATOR, OperatorStream
from diwa_ros.up import GraphRunner

SWAP_TRIES = 5  # a busy machine may miss the latency gate once
DROPS = ("stale", "nonfinite", "shape", "foreign")
STOPPED = ("FAULT", "REFLEX", "USER_STOPPED", "DISCONNECTED")  # goes on by somebody's doing
HOLDING = ("HOLD", *STOPPED)
FRAME_PX = 96  # height of the pictures kept for the strips
OVERLAY_S = 0.5
LAST_FRAME_S = 2.0
SILENCE = "no action chunk"  # how the controller explains a policy that it does not hear
REPEATS = 2  # of one trial, unattended
HOMING_S = 5.0  # until a robot that was told to go home must have begun
AHEAD = 4  # steps of each chunk on the way to the start: one that arrives late still counts
STEP = np.array([MAX_DELTA_M] * 3 + [MAX_DELTA_RAD] * 3)  # at action 1.0
APPROACH = 1 / 15  # share of the remaining way per step
APPROACH_SPEED = 0.4  # share of full speed
AIMED, ARRIVED = (0.003, 0.015), (0.008, 0.04)  # metres and radians: of the commanded pose, and of the measured one that follows it
SETTLE_TICKS = 20  # at the start, for the gripper too
SETTLE_S = 5.0  # until an arm that comes no nearer is as near as it gets


# -- the graph ---------------------------------------------------------------------------------------------------------------------------


@contextmanager
def open_graph(
    processes: list[Process], contract: Contract, log_folder: Path, stops: list[int], attach: bool = False, timeout_s: float = 30.0
) -> Iterator[GraphEvaluator]:
    """A client of the graph of `processes`, which is started and stopped here; `attach`: it runs already.

    Raises SetupError when it is not ready in time, NodeDied when a node ends, KeyboardInterrupt once `stops` (signals) is not empty.
    """
    if attach:
        os.environ.update({name: value for process in processes for name, value in process.extra_environment.items()})
    else:
        join_graph(processes)
    runner = GraphRunner([] if attach else processes, log_folder)
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        runner.start()
        with GraphEvaluator(contract, timeout_s=timeout_s) as client:
            client.node.create_timer(0.2, lambda: watch(runner, stops))
            wait_active(client, [process.name for process in processes], log_folder)
            yield client
    finally:
        runner.stop(lambda: len(stops) > 1)
        rclpy.try_shutdown()


class ControllerWatch:
    """Counts what the controller clamps, drops and holds during a trial."""

    def __init__(self, client: GraphEvaluator) -> None:
        self.status: ControllerStatus | None = None
        self.states: list[str] = []  # since `begin`, each change once
        self.faults: list[str] = []  # since `begin`, reasons of FAULT
        self.limits: dict[str, int] = {}
        client.node.create_subscription(ControllerStatus, "controller/status", self._take_status, LATCHED)
        client.node.create_subscription(DiagnosticArray, "/diagnostics", self._take_diagnostics, reliable(50))
        self.before, self.limits_before = ControllerStatus(), {}

    @property
    def state(self) -> str:
        """Name of the newest state, empty before the first."""
        return self.status.state_name if self.status is not None else ""

    def begin(self) -> None:
        """Count from now on."""
        self.before, self.limits_before, self.states, self.faults = self.status, dict(self.limits), [self.state], []

    def fill(self, row: TrialRow) -> None:
        """Write the counts since `begin` into `row`."""
        now, then = self.status, self.before
        row.clamped = now.clamped - then.clamped
        row.dropped = {
            kind: getattr(now, f"dropped_{kind}") - getattr(then, f"dropped_{kind}") for kind in ("stale", "nonfinite", "shape", "foreign")
        }
        row.limits = {name: count - self.limits_before.get(name, 0) for name, count in self.limits.items()}
        row.watchdog = dict(Counter(state for state in self.states[1:] if state in HOLDING))

    def _take_status(self, message: ControllerStatus) -> None:
        self.status = message
        if not self.states or self.states[-1] != message.state_name:
            self.states.append(message.state_name)
            if message.state == ControllerStatus.FAULT:
                self.faults.append(message.reason)

    def _take_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name == "franka_controller: limits":
                self.limits = {pair.key: int(pair.value) for pair in status.values if pair.value.isdigit()}


class GraphTrials:
    """What trials in simulation and on a robot share: waiting, and the exchange of policies."""

    def __init__(self, client: GraphEvaluator) -> None:
        self.client, self.node, self.contract = client, client.node, client.contract
        self.controller = ControllerWatch(client)
        self.running: dict[str, str] = {}  # skill -> identity that was swapped in last

    def swap(self, assignment: Assignment) -> None:
        """Put the policy of a trial on the graph. Raises GateError when it is refused; which one it is stays untold."""
        skill, number = assignment.trial.skill, assignment.trial.number
        if self.running.get(skill) == assignment.identity:
            return
        for attempt in range(SWAP_TRIES):
            try:
                found = self.client.load_policy(assignment.policy, skill)
                break
            except GateError as error:
                if "gate 'latency'" not in str(error) or attempt == SWAP_TRIES - 1:
                    raise GateError(
                        f"trial {number}: the graph refused its policy; the log of the policy node says why, and names the policy."
                    ) from error
        check_identity(assignment, found)
        self.running[skill] = found

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float | None = None) -> None:
        """Serve the graph until `condition` holds. Raises DataError."""
        limit_s = self.client.timeout_s if timeout_s is None else timeout_s
        if not self.spin(condition, limit_s):
            reason = self.controller.status.reason if self.controller.status is not None else "silent"
            raise DataError(f"graph: expected {what} within {limit_s:g} s, found none. Controller: {self.controller.state}, {reason}.")

    def spin(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Serve the graph until `condition` holds; false after the time limit."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end_s:
                return False
            self.client.executor.spin_once(timeout_sec=0.05)
        return True

    def answer(self, future: Future, what: str) -> object:
        """The result of `future`. Raises DataError."""
        self.until(future.done, f"an answer of {what}")
        return future.result()

    def call(self, service_type: type, name: str, request: object) -> object:
        """Call a service. Raises DataError when it is not there or does not answer; a refusal is returned."""
        client = self.node.create_client(service_type, name)
        try:
            self.until(client.service_is_ready, f"service {name}")
            return self.answer(client.call_async(request), name)
        finally:
            self.node.destroy_client(client)


# -- simulation --------------------------------------------------------------------------------------------------------------------------


class SimulationTrials(GraphTrials):
    """Trials in the simulated table behind the graph, judged by its oracle."""

    name, robot = SIMULATION, ""

    def __init__(self, client: GraphEvaluator) -> None:
        super().__init__(client)
        self.tap = GraphTap(client.node, client.contract)
        client.wait_ready()
        self.until(self.tap.is_matched, "pictures of every camera and a sender on every topic")

    def run(self, assignment: Assignment, row: TrialRow) -> Seen:
        """One episode. Raises DataError, GateError and CheckpointError."""
        trial, plan = assignment.trial, assignment.plan
        self.swap(assignment)
        self.tap.begin()
        self.controller.begin()
        episode = GraphEpisode(trial.skill, trial.index, plan.split, 0, trial.noise_seed, plan.max_steps)
        result = self.client.run_episode(episode, AFTER_SUCCESS)  # the classifier was calibrated on episodes that end so
        check_identity(assignment, result.checkpoint_id)
        row.oracle, row.steps, row.message = result.success, result.steps, result.message
        self.spin(lambda: self.controller.state == "IDLE", LAST_FRAME_S)
        self.controller.fill(row)
        row.latency_ms = self.tap.latencies_ms()
        number, steps = self.client.episode_number, min(result.steps + AFTER_SUCCESS * result.success, plan.max_steps)
        if not self.spin(lambda: self.tap.has_frames(number, steps), self.client.timeout_s):
            row.message += "; not every frame arrived, so the classifier did not judge"
            return Seen([], [])
        recording = self.tap.recording(number, steps)
        return Seen(recording.images[self.contract.images[0].name], recording.features)


# -- robot -------------------------------------------------------------------------------------------------------------------------------


class Operator(Protocol):
    """The person at the robot. keys: pressed since the last call; Enter goes on, s, f and d mark success, failure and discard."""

    def tell(self, text: str) -> None:
        """Show a line."""

    def keys(self) -> str:
        """Keys pressed since the last call."""


KEYS = {"s": SUCCESS, "f": FAILURE, "d": DISCARD}


@dataclass
class TrialLog:
    """What came by during a run. first_ns: stamp of the first policy step."""

    features: list[np.ndarray] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    latency_ms: dict[str, list[float]] = field(default_factory=dict)
    scenes: dict[int, np.ndarray] = field(default_factory=dict)
    first_ns: int | None = None
    begun: bool = False


class RobotTrials(GraphTrials):
    """Trials on a robot: the arm goes home and to the start by itself, the operator sets the table with the overlay and marks the end.

    unattended: for a stand-in that knows the truth about its table (topic sim/state): its oracle marks, and nobody is asked.
    """

    name = ROBOT

    def __init__(
        self,
        client: GraphEvaluator,
        robot: str,
        operator: Operator,
        overlay_folder: Path,
        unattended: bool = False,
        record: bool = False,
        mark_timeout_s: float = 600.0,
    ) -> None:
        """mark_timeout_s: longest wait for the operator. Raises SetupError when `unattended` finds no oracle."""
        super().__init__(client)
        self.robot, self.operator, self.overlay_folder = robot, operator, overlay_folder
        self.unattended, self.record, self.mark_timeout_s = unattended, record, mark_timeout_s
        self.step_ns = round(1e9 / self.contract.rate_hz)
        self.log, self.oracle, self.go, self.last_frame_number = TrialLog(), None, False, 0
        self.mark, self.mark_in_bag = "", False
        self.target = self.pose = self.picture = self.scene_obs = None
        self.tick_ns, self.answered_ns = -1, -1
        self.repeats: dict[int, int] = {}  # discarded by themselves, by trial
        self.stream = OperatorStream(self.node.create_publisher(ActionChunk, "action_chunk", reliable(5)), self.contract)
        listen = self.node.create_subscription
        listen(LatentState, "latent", self._take_latent, reliable(50))
        listen(ActionChunk, "action_chunk", self._take_chunk, reliable(50))
        listen(SimState, "sim/state", self._take_state, reliable(50))
        listen(ExecutedAction, "executed_action", lambda m: setattr(self, "tick_ns", to_ns(m.header.stamp) + self.step_ns), reliable(10))
        listen(PoseStamped, "target_pose", lambda m: setattr(self, "target", from_pose(m)), reliable(10))
        listen(PoseStamped, "current_pose", lambda m: setattr(self, "pose", from_pose(m)), reliable(10))
        listen(Image, self.contract.images[0].topic, self._take_image, CAMERA)
        listen(EpisodeMark, "episode_mark", lambda m: self._take_mark(m.outcome, in_bag=True), reliable(10))
        self.node.create_service(Trigger, "evaluation/go", self._take_go)
        self.resets = self.node.create_client(ResetSim, "sim/reset")
        self.renderer = StartRenderer()
        if unattended and not self.spin(lambda: self.scene_obs is not None, client.timeout_s):
            raise SetupError("unattended: expected an oracle (topic sim/state), as the fake FR3 has one, found none. Mark by hand.")

    def run(self, assignment: Assignment, row: TrialRow) -> Seen:
        """Reset, start, run, mark. Raises DataError when something does not answer or the mark is missing; the trial is then not kept."""
        trial, plan, start = assignment.trial, assignment.plan, assignment.start
        self.settle()
        self.swap(assignment)
        self.confirm(f"trial {trial.number}, {trial.skill}: clear the arm's way; it goes to its start")
        self.go_home()
        self.reset_table(assignment)
        self.go_to(start)
        row.start_error = self.show_start(assignment)
        self.oracle = None if self.scene_obs is None else SkillOracle(trial.skill, self.scene_obs)
        self.log, self.mark, self.mark_in_bag = TrialLog(), "", False
        self.controller.begin()
        bag = self.begin_bag(trial.skill, trial.number, plan.identity)
        try:
            result = self.run_skill(assignment)
            check_identity(assignment, result.checkpoint_id)
            log, self.log = self.log, TrialLog()
            self.judge(log, plan.max_steps, row)
        except BaseException:
            with suppress(DiwaError):  # what went wrong is more worth telling
                self.end_bag(bag, DISCARD)
            raise
        row.bag = self.end_bag(bag, "" if self.mark_in_bag else self.mark)
        self.spin(lambda: self.controller.state == "IDLE", LAST_FRAME_S)  # its last counts come with it
        self.controller.fill(row)
        row.latency_ms, row.message = log.latency_ms, result.message
        row.steps = min(row.steps or result.steps, plan.max_steps)
        return Seen(log.frames, log.features)

    # -- the start -----------------------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait for an idle robot. An operator is told what holds it, and mends that; unattended, it is resumed or recovered here."""
        told = ""
        end_s = time.monotonic() + self.mark_timeout_s
        while not self.spin(lambda: self.controller.state == "IDLE", 2.0):
            status = self.controller.status
            if time.monotonic() > end_s:
                raise DataError(
                    f"controller: expected IDLE within {self.mark_timeout_s:g} s, found {self.controller.state}: {status.reason}"
                )
            if self.unattended and self.controller.state in ("FAULT", "REFLEX"):
                name = "resume" if self.controller.state == "FAULT" else "recover"
                self.call(Trigger, f"controller/{name}", Trigger.Request())
            elif status is not None and status.reason != told:
                told = status.reason
                self.operator.tell(f"the robot is not ready: {status.state_name}, {told}")

    def confirm(self, text: str) -> None:
        """Wait for Enter or a call of evaluation/go. Raises DataError."""
        if self.unattended:
            return
        self.operator.tell(f"{text}; Enter")
        self.go = False
        self.until(self._may_go, "Enter, or a call of evaluation/go,", self.mark_timeout_s)

    def go_home(self) -> None:
        """Joints to the robot's home. Raises DataError when it refuses for too long."""
        end_s = time.monotonic() + self.client.timeout_s
        while not (answer := self.call(Trigger, "controller/home", Trigger.Request())).success:
            if time.monotonic() > end_s:
                raise DataError(f"controller/home: expected the arm to go home, found a refusal: {answer.message}")
            self.spin(lambda: False, 0.5)
        self.spin(lambda: self.controller.state != "IDLE", HOMING_S)
        self.settle()

    def reset_table(self, assignment: Assignment) -> None:
        """A stand-in puts its table into the start by itself. Raises DataError when it refuses."""
        if not self.resets.service_is_ready():
            return
        trial = assignment.trial
        request = ResetSim.Request(skill=trial.skill, split=assignment.plan.split, index=trial.index)
        response = self.answer(self.resets.call_async(request), "sim/reset")
        if not response.success:
            raise DataError(f"sim/reset was refused: {response.message}")

    def go_to(self, start: SceneState) -> None:
        """Hand and gripper to the start, through the gate as any other commands. Raises DataError when they get no nearer."""
        goal = np.array(NEUTRAL_POSE if start.tcp_pose is None else start.tcp_pose, float)
        self.until(lambda: self.target is not None and self.pose is not None and self.tick_ns > 0, "the robot's poses and ticks")
        nearest, better_s, settled = np.inf, time.monotonic(), 0
        try:
            while settled < SETTLE_TICKS:
                if self.controller.state in STOPPED:
                    self.stream.end()
                    self.settle()
                    better_s = time.monotonic()
                self.until(lambda: self.tick_ns > self.answered_ns, "the robot's next tick")
                self.answered_ns = self.tick_ns
                way, lag = _distance(goal, self.target), _distance(goal, self.pose)
                aimed, far = _share(way, AIMED), _share(lag, ARRIVED)
                if max(aimed, far) < 0.95 * nearest:
                    nearest, better_s = max(aimed, far), time.monotonic()
                waited_s = time.monotonic() - better_s
                if aimed > 1 and waited_s > self.client.timeout_s:
                    raise DataError(
                        f"arm: expected it at its start, found it {1e3 * np.linalg.norm(lag[:3]):.0f} mm and "
                        f"{np.degrees(np.abs(lag[3:]).max()):.0f} degrees away and no longer coming nearer. "
                        f"Controller: {self.controller.state}. Are the start and the robot's workspace those of one table?"
                    )
                # A compliant arm may stay a little off; the report says by how much.
                settled = settled + 1 if aimed <= 1 and (far <= 1 or waited_s > SETTLE_S) else 0
                step = (APPROACH * way / STEP).clip(-APPROACH_SPEED, APPROACH_SPEED)
                self.stream.send(self.answered_ns, np.tile(np.append(step, start.gripper), (AHEAD, 1)))
        finally:
            self.stream.end()
        self.settle()

    def show_start(self, assignment: Assignment) -> dict[str, float]:
        """Keep the overlay fresh until the operator is content; returns how far the start is off."""
        trial, start = assignment.trial, assignment.start
        wanted, title = self.renderer.render(start), f"trial {trial.number}: {trial.skill}"
        newest = self.overlay_folder / "now.png"
        self.until(lambda: self.picture is not None and self.pose is not None, "a picture and the hand's pose")
        self.go = self.unattended
        if not self.unattended:
            self.operator.tell(f"set the table as in {newest}, which is kept fresh; Enter runs the trial, then s, f, d mark it")
        end_s = time.monotonic() + self.mark_timeout_s
        while True:
            error = start_error(start, self.pose, self.scene_obs)
            picture = draw_overlay(wanted, self.picture, title, start, error)
            write_picture(newest, picture)
            if self.spin(self._may_go, OVERLAY_S):
                write_picture(self.overlay_folder / f"trial_{trial.number:03d}.png", picture)
                return error
            if time.monotonic() > end_s:
                raise DataError(
                    f"trial {trial.number}: expected Enter or a call of evaluation/go within {self.mark_timeout_s:g} s, found none."
                )

    # -- the run -------------------------------------------------------------------------------------------------------------------------

    def run_skill(self, assignment: Assignment) -> RunSkill.Result:
        """Run until the step limit, a mark, or, unattended, the oracle's success. Raises DataError on a run that ended by itself."""
        trial, plan = assignment.trial, assignment.plan
        goal = RunSkill.Goal(skill=trial.skill, max_steps=plan.max_steps, seed=trial.noise_seed)
        self.last_frame_number, self.log.begun = 0, True
        handle = self.answer(self.client.action_client.send_goal_async(goal), "run_skill")
        if not handle.accepted:
            raise DataError("run_skill was refused; the status of the policy node says why.")
        ended = handle.get_result_async()
        judged = self.oracle, self.step_ns, plan.max_steps

        def is_over() -> bool:
            self._read_keys()
            return ended.done() or bool(self.mark) or (self.unattended and has_succeeded(self.log, *judged, AFTER_SUCCESS))

        self.until(is_over, "the end of the trial", self.client.timeout_s + 1.0 * plan.max_steps)
        if not ended.done():
            self.answer(handle.cancel_goal_async(), "cancel")
        result = self.answer(ended, "the result of run_skill").result
        over = result.completed or bool(self.mark) or first_success(self.log, *judged) is not None
        if not over:
            raise DataError(f"trial {trial.number}: run_skill ended early: {result.message}. The trial is not kept.")
        return result

    def judge(self, log: TrialLog, max_steps: int, row: TrialRow) -> None:
        """Oracle where there is one, and the mark, which is waited for. Raises DataError when nobody marks."""
        if self.oracle is not None:
            steps = first_success(log, self.oracle, self.step_ns, max_steps)
            row.oracle, row.steps = steps is not None, steps or 0
        if self.unattended:
            self.mark, row.marked_by = self.mark_by_oracle(row), BY_ORACLE
        else:
            if not self.mark:
                self.operator.tell("the trial is over: s success, f failure, d discard and repeat")

            def is_marked() -> bool:
                self._read_keys()
                return bool(self.mark)

            if not self.spin(is_marked, self.mark_timeout_s):
                raise DataError(
                    f"trial {row.trial}: expected a mark (s, f or d here, recorder/mark or episode_mark) within {self.mark_timeout_s:g} s, "
                    "found none. The trial is not kept; the same command runs it again."
                )
            row.marked_by = BY_OPERATOR
        row.mark = self.mark

    def mark_by_oracle(self, row: TrialRow) -> str:
        """What the oracle says, or, whatever it says, discard where policy or robot fell silent: the machine was too busy then."""
        silent = "DISCONNECTED" in self.controller.states or any(reason.startswith(SILENCE) for reason in self.controller.faults)
        if not silent or self.repeats.get(row.trial, 0) >= REPEATS:
            return SUCCESS if row.oracle else FAILURE
        self.repeats[row.trial] = self.repeats.get(row.trial, 0) + 1
        self.operator.tell(f"trial {row.trial} is discarded and repeated: policy or robot fell silent, and the arm was held")
        return DISCARD

    def begin_bag(self, skill: str, number: int, plan: str) -> str:
        """Record the trial, if asked to; returns the bag. Raises DataError when the recorder refuses."""
        if not self.record:
            return ""
        name = time.strftime(f"{plan}_trial_{number:03d}_%Y%m%d-%H%M%S")
        response = self.call(StartRecording, "recorder/start", StartRecording.Request(name=name, skill=skill))
        if not response.success:
            raise DataError(f"recorder/start: {response.message}")
        return response.bag

    def end_bag(self, bag: str, mark: str) -> str:
        """Close the bag with the mark; it is linked when it is whole."""
        if not bag:
            return ""
        response = self.call(StopRecording, "recorder/stop", StopRecording.Request(outcome=mark))
        if not response.success:
            raise DataError(f"recorder/stop: {response.message}")
        return str(Path(response.bag).absolute())

    # -- listening -----------------------------------------------------------------------------------------------------------------------

    def _may_go(self) -> bool:
        self.go = self.go or "\n" in self.operator.keys()
        return self.go

    def _read_keys(self) -> None:
        for key in self.operator.keys():
            if key in KEYS:
                self._take_mark(KEYS[key], in_bag=False)

    def _take_mark(self, outcome: str, in_bag: bool) -> None:
        """A mark that came as a message has reached the recorder, too, and ended its episode."""
        if outcome in OUTCOMES:
            self.mark, self.mark_in_bag = outcome, in_bag

    def _take_go(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.go, response.success, response.message = True, True, "going on"
        return response

    def _take_latent(self, message: LatentState, info: dict) -> None:
        if not self.log.begun:
            return
        number = message.frames_since_reset
        if number == 1 or number < self.last_frame_number:
            self.log.features, self.log.frames = [], []
        self.last_frame_number = number
        self.log.features.append(from_floats(message.feature).copy())
        self._note("camera → latent", message, info)

    def _take_chunk(self, message: ActionChunk, info: dict) -> None:
        if not self.log.begun or message.horizon == 0 or message.hold or message.checkpoint_id == OPERATOR:
            return
        if self.log.first_ns is None:
            self.log.first_ns = to_ns(message.header.stamp)
        self._note("camera → chunk", message, info)
        self.log.latency_ms.setdefault("policy", []).append(float(message.inference_ms))

    def _note(self, stage: str, message: object, info: dict) -> None:
        """Camera stamp to sending, by the clocks of their senders."""
        if self.log.first_ns is not None:
            self.log.latency_ms.setdefault(stage, []).append((info["source_timestamp"] - to_ns(message.header.stamp)) / 1e6)

    def _take_state(self, message: SimState) -> None:
        self.scene_obs = np.array(message.scene_obs)
        if self.log.begun:
            self.log.scenes[to_ns(message.header.stamp)] = self.scene_obs

    def _take_image(self, message: Image) -> None:
        picture = read_image_numpy(message)
        self.picture = picture.copy()
        if self.log.begun:
            height = min(FRAME_PX, picture.shape[0])
            width = round(picture.shape[1] * height / picture.shape[0])
            self.log.frames.append(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))


def _distance(goal: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """From `pose` [6] to `goal` [6], angles wrapped."""
    return np.concatenate([goal[:3] - pose[:3], wrap_angle(goal[3:] - pose[3:])])


def _share(distance: np.ndarray, limits: tuple[float, float]) -> float:
    """Largest part of `distance` [6] in units of the limits for position and angle; up to 1 is near."""
    return float(max(np.abs(distance[:3]).max() / limits[0], np.abs(distance[3:]).max() / limits[1]))
