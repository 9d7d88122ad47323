"""Trials with an operator, on a robot of a few lines: what he presses, what is waited for, what is not kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import rclpy
from diwa_interfaces.action import RunSkill
from diwa_interfaces.msg import ActionChunk, ControllerStatus, EpisodeMark, ExecutedAction, LatentState, PolicyStatus, SimState
from diwa_interfaces.srv import LoadPolicy, ResetSim
from geometry_msgs.msg import PoseStamped
from rclpy.action import ActionServer, CancelResponse
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.executors import MultiThreadedExecutor
from rclpy.node import Node
from ros_support import private_graph
from sensor_msgs.msg import Image
from std_srvs.srv import Trigger
from trial_support import FEATURE, make_candidates, make_judge

from diwa_core.checkpoint import load_checkpoint
from diwa_core.contract import Contract
from diwa_core.errors import CheckpointError, DataError, GateError
from diwa_core.evaluate.trial_journal import BY_OPERATOR, BY_ORACLE, ROBOT, TrialJournal
from diwa_core.evaluate.trial_run import run_trials
from diwa_core.evaluate.trials import JOURNAL, TrialFolder, make_plan
from diwa_core.sim.state import NEUTRAL_POSE
from diwa_ros.calvin_bridge import read_start
from diwa_ros.evaluator import GraphEvaluator
from diwa_ros.images import make_image
from diwa_ros.messages import CAMERA, LATCHED, from_floats, reliable, to_float32, to_pose, to_time
from diwa_ros.trials import STEP, RobotTrials

pytestmark = pytest.mark.timeout(600)
SKILL, PATIENCE_S, STEP_S = "open_drawer", 60.0, 0.02
DRAWER = 1


class Robot(Node):
    """Answers as the whole graph of a robot would: the hand is where it is told to be, the drawer opens when `opens` is set."""

    def __init__(self) -> None:
        super().__init__("robot", parameter_overrides=[])
        self.contract, self.group = Contract(), ReentrantCallbackGroup()
        self.pose, self.scene = np.array(NEUTRAL_POSE), np.zeros(24)
        self.state, self.stuck, self.opens, self.ran_id, self.refusal, self.clamped, self.homes = "IDLE", False, False, "", "", 0, 0
        self.policies: dict[str, str] = {}
        self.clock_ns = self.get_clock().now().nanoseconds  # its own from here on: a step is a step however busy the machine is
        outputs = {
            "status": (ControllerStatus, "controller/status", LATCHED),
            "policy": (PolicyStatus, "policy/status", LATCHED),
            "state_publisher": (SimState, "sim/state", reliable(10)),
            "current": (PoseStamped, "current_pose", reliable(10)),
            "target": (PoseStamped, "target_pose", reliable(10)),
            "executed": (ExecutedAction, "executed_action", reliable(10)),
            "image": (Image, self.contract.images[0].topic, CAMERA),
            "latent": (LatentState, "latent", reliable(10)),
            "chunk": (ActionChunk, "action_chunk", reliable(10)),
            "mark": (EpisodeMark, "episode_mark", reliable(10)),
        }
        self.out = {name: self.create_publisher(*topic) for name, topic in outputs.items()}
        self.create_subscription(ActionChunk, "action_chunk", self.take_chunk, reliable(10), callback_group=self.group)
        for name in ("home", "resume", "recover"):
            self.create_service(Trigger, f"controller/{name}", getattr(self, name), callback_group=self.group)
        self.create_service(ResetSim, "sim/reset", self.reset, callback_group=self.group)
        self.create_service(LoadPolicy, "policy/load", self.load, callback_group=self.group)
        accept = lambda goal: CancelResponse.ACCEPT  # noqa: E731
        self.server = ActionServer(self, RunSkill, "run_skill", self.execute, cancel_callback=accept, callback_group=self.group)
        self.create_timer(STEP_S, self.tick, callback_group=self.group)
        self.say("IDLE")

    def say(self, state: str, reason: str = "") -> None:
        self.state = state
        number = getattr(ControllerStatus, state)
        self.out["status"].publish(ControllerStatus(state=number, state_name=state, reason=reason, clamped=self.clamped))

    def tick(self) -> None:
        self.clock_ns += 1000
        stamp_ns = self.clock_ns
        state = SimState(scene_obs=self.scene)
        state.header.stamp = to_time(stamp_ns)
        self.out["state_publisher"].publish(state)
        for name in ("current", "target"):
            self.out[name].publish(to_pose(self.pose, stamp_ns, "world"))
        executed = ExecutedAction()
        executed.header.stamp = to_time(stamp_ns - round(1e9 * self.contract.step_s))
        self.out["executed"].publish(executed)
        self.out["image"].publish(make_image(np.full((64, 64, 3), 120, np.uint8), stamp_ns, "camera"))

    def take_chunk(self, message: ActionChunk) -> None:
        """The evaluator's way to the start; the policy's own chunks move nothing here."""
        if message.checkpoint_id != "teleop" or not message.horizon:
            return
        if self.stuck:
            self.say("FAULT", "no action chunk for 1 s; call controller/resume")
        if self.state == "IDLE":
            self.pose = self.pose + from_floats(message.actions)[:6].astype(float) * STEP

    def home(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.pose, self.homes = np.array(NEUTRAL_POSE), self.homes + 1
        self.say("HOLD", "going home")
        self.say("IDLE")
        response.success = True
        return response

    def resume(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.stuck, response.success = False, True
        self.say("IDLE")
        return response

    recover = resume

    def reset(self, request: ResetSim.Request, response: ResetSim.Response) -> ResetSim.Response:
        start = read_start(request)
        scene = np.zeros(24)
        scene[[0, 1, 3, 4, 5]] = [start.slider, start.drawer, start.switch, start.bulb, start.led]
        scene[6:] = start.blocks.reshape(-1)
        self.scene, response.success, response.scene_obs = scene, True, scene
        return response

    def load(self, request: LoadPolicy.Request, response: LoadPolicy.Response) -> LoadPolicy.Response:
        response.success, response.message = not self.refusal, f"{self.refusal} {request.path}"
        response.checkpoint_id = self.policies[request.skill] = load_checkpoint(request.path).identity
        return response

    def execute(self, goal) -> RunSkill.Result:
        """Warm up, then as many steps as asked for; the drawer opens after three of them."""
        warmup, steps = 4, 0
        self.say("ACTIVE")
        for number in range(1, warmup + goal.request.max_steps):
            if goal.is_cancel_requested:
                break
            self.clock_ns += round(1e9 * self.contract.step_s)
            stamp_ns = self.clock_ns
            latent = LatentState(frames_since_reset=number, warmup_frames=warmup, feature=to_float32(np.full(FEATURE, 0.1 * number)))
            latent.header.stamp = to_time(stamp_ns)
            self.out["latent"].publish(latent)
            if number >= warmup:
                steps = number - warmup + 1
                chunk = ActionChunk(checkpoint_id="policy", horizon=1, action_dim=7, actions=to_float32(np.zeros(7)), inference_ms=3.0)
                chunk.header.stamp = to_time(stamp_ns)
                self.out["chunk"].publish(chunk)
                self.clamped += 1
            if steps == 3 and self.opens:
                self.scene = self.scene + 0.2 * np.eye(24)[DRAWER]
            self.tick()
            time.sleep(0.04)
        cancelled = goal.is_cancel_requested
        goal.canceled() if cancelled else goal.succeed()
        self.say("IDLE")
        identity = self.ran_id or self.policies[goal.request.skill]
        return RunSkill.Result(completed=not cancelled, steps=goal.request.max_steps, checkpoint_id=identity, message="done")


class Operator:
    """Presses what `answers` says for words of what is told; resumes the robot when told that it is not ready."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.pressed, self.told, self.robot = answers, "", [], None

    def tell(self, text: str) -> None:
        self.told.append(text)
        self.pressed += "".join(keys for words, keys in self.answers.items() if words in text)
        if "not ready: FAULT" in text:
            self.robot.resume(Trigger.Request(), Trigger.Response())

    def keys(self) -> str:
        pressed, self.pressed = self.pressed, ""
        return pressed


CONTENT = {"Enter": "\n"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_candidates(tmp_path_factory.mktemp("checkpoints"), skills=[SKILL])


@pytest.fixture(scope="module")
def graph() -> Iterator[tuple[Robot, RobotTrials]]:
    with private_graph():
        robot = Robot()
        executor = MultiThreadedExecutor(4)
        executor.add_node(robot)
        thread = threading.Thread(target=executor.spin, daemon=True)
        thread.start()
        with GraphEvaluator(Contract(), timeout_s=PATIENCE_S) as client:
            trials = RobotTrials(client, "arm", Operator(CONTENT), Path(), unattended=True)
            yield robot, trials
            trials.renderer.table.close()
        executor.shutdown(timeout_sec=1.0)
        thread.join(5.0)
        robot.server.destroy()
        robot.destroy_node()


class Session:
    """One plan of one candidate on the robot, with an operator of known habits."""

    def __init__(self, graph: tuple[Robot, RobotTrials], checkpoints: Path, folder: Path) -> None:
        self.robot, self.trials = graph
        self.folder, self.judge = TrialFolder(folder), make_judge(checkpoints, [SKILL])
        self.folder.begin(*make_plan({"only": checkpoints / "tuned"}, checkpoints / "world_model", starts=1, max_steps=8))
        self.trials.overlay_folder, self.trials.mark_timeout_s, self.trials.unattended = folder / "overlay", PATIENCE_S, False
        self.robot.opens, self.robot.stuck, self.robot.ran_id, self.robot.refusal = True, False, "", ""
        self.trials.running.clear()

    def run(self, answers: dict[str, str]) -> TrialJournal:
        self.trials.operator = Operator(answers)
        self.trials.operator.robot = self.robot
        run_trials(self.folder, ROBOT, "arm", lambda: self.trials, self.judge)
        return self.journal()

    def journal(self) -> TrialJournal:
        return TrialJournal(self.folder.path / JOURNAL, self.folder.read_plan())


@pytest.fixture
def session(graph: tuple[Robot, RobotTrials], checkpoints: Path, tmp_path: Path) -> Session:
    return Session(graph, checkpoints, tmp_path / "out")


def test_a_trial_with_an_operator(session: Session, tmp_path: Path) -> None:
    homes = session.robot.homes
    (row,) = session.run({**CONTENT, "the trial is over": "xf"}).rows
    assert (row.mark, row.marked_by, row.success) == ("failure", BY_OPERATOR, False)
    assert row.oracle and row.steps == 2 and row.classifier is not None  # the oracle saw the drawer open; the operator decides
    assert row.clamped == 8 and row.watchdog == {} and set(row.latency_ms["policy"]) == {3.0}
    assert row.start_error["hand_mm"] < 8 and row.start_error["drawer_mm"] < 0.1 and session.robot.homes == homes + 1
    told = session.trials.operator.told
    assert told[0] == f"trial 1, {SKILL}: clear the arm's way; it goes to its start; Enter" and "overlay/now.png" in told[1]
    assert cv2.imread(str(tmp_path / "out" / "overlay" / "trial_001.png")).shape[1] == 1200
    assert (tmp_path / "out" / row.strip).exists()


def test_a_mark_ends_the_run_and_discard_repeats_it(session: Session) -> None:
    """Discarded by a key while it runs, then marked by a message, as from another terminal."""
    session.robot.opens = False
    states = iter(["d", "message"])
    execute = session.robot.execute

    def mark_in_between(goal):
        kind = next(states)
        if kind == "d":
            session.trials.operator.pressed += "d"
        else:
            session.robot.out["mark"].publish(EpisodeMark(outcome="success", source="operator"))
        return execute(goal)

    session.robot.server.register_execute_callback(mark_in_between)
    try:
        journal = session.run(CONTENT)
    finally:
        session.robot.server.register_execute_callback(execute)
    assert [row.mark for row in journal.rows] == ["discard", "success"] and journal.discarded(ROBOT) == 1
    assert journal.finished(ROBOT)[1].oracle is False


def test_without_a_mark_nothing_is_kept(session: Session) -> None:
    operator_waits = session.trials.judge

    def lose_patience(*arguments):
        session.trials.mark_timeout_s = 0.3
        return operator_waits(*arguments)

    session.trials.judge = lose_patience
    try:
        with pytest.raises(DataError, match=r"trial 1: expected a mark .* within 0.3 s, found none. The trial is not kept"):
            session.run(CONTENT)
    finally:
        del session.trials.judge
    assert session.journal().rows == []


def test_an_operator_who_does_not_come_is_named(session: Session) -> None:
    session.trials.mark_timeout_s = 0.3
    with pytest.raises(DataError, match=r"expected Enter, or a call of evaluation/go, within 0.3 s"):
        session.run({})


def test_go_comes_by_service_too(session: Session) -> None:
    client = session.robot.create_client(Trigger, "evaluation/go", callback_group=session.robot.group)
    stop = threading.Event()

    def press() -> None:
        while not stop.wait(0.1):
            client.call_async(Trigger.Request())

    thread = threading.Thread(target=press)
    thread.start()
    try:
        assert session.run({"the trial is over": "s"}).rows[0].mark == "success"
    finally:
        stop.set()
        thread.join()


def test_unattended_the_oracle_ends_and_marks_the_trial(session: Session) -> None:
    session.trials.unattended = True
    (row,) = session.run({}).rows
    assert (row.mark, row.marked_by, row.oracle, row.steps) == ("success", BY_ORACLE, True, 2)


def test_an_arm_held_on_its_way_is_mended_by_the_operator(session: Session) -> None:
    session.robot.stuck = True
    (row,) = session.run({**CONTENT, "the trial is over": "s"}).rows
    assert row.mark == "success" and row.start_error["hand_mm"] < 8
    assert any("the robot is not ready: FAULT, no action chunk" in text for text in session.trials.operator.told)


def test_another_policy_than_the_keys_is_noticed(session: Session) -> None:
    session.robot.ran_id = "f" * 64
    with pytest.raises(CheckpointError, match="trial 1: expected the policy that the key names"):
        session.run(CONTENT)
    assert session.journal().rows == []


def test_a_refused_policy_is_not_named(session: Session) -> None:
    session.robot.refusal = "gate 'shapes': expected x, found y."
    with pytest.raises(GateError, match="trial 1: the graph refused its policy") as error:
        session.run(CONTENT)
    assert "tuned" not in str(error.value)
    assert rclpy.ok()
