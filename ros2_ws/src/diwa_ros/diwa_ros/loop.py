"""The whole loop on one running graph: demonstrate, record, retrain while the robot works, swap while it moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import rclpy
from diwa_interfaces.action import Finetune, RunSkill
from diwa_interfaces.msg import ActionChunk, SimState
from diwa_interfaces.srv import MarkEpisode, StartRecording, StopRecording
from rclpy.action import ActionClient
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future

from diwa_core.errors import DataError, GateError
from diwa_core.evaluate.evaluation import noise_seed
from diwa_ros.demo import join_graph, wait_active, watch
from diwa_ros.evaluator import GraphEpisode, GraphEvaluator
from diwa_ros.graph import load_graph
from diwa_ros.messages import reliable
from diwa_ros.pilot import FAILURE, SUCCESS
from diwa_ros.scripted_play import LiveTable, demonstrate_live, play_live
from diwa_ros.up import GraphRunner

OPERATOR_SEED = 11  # of the demonstrations; the shipped ones have others
ANSWER_S = 60.0
MOST_LOST = 3  # episodes in a row that the graph gives up, until the loop does
MOST_ATTEMPTS = 4  # for each demonstration that is wanted
SWAP_STEPS = 300  # of the run during which the policy is exchanged


@dataclass(frozen=True)
class LoopPlan:
    """What to do. demonstrations: successes to record; noise: 0 precise to 1 careless; play_ticks: recorded afterwards.

    refit, iterations, minutes, stores, held_out: as in Finetune.action. name: of the run, in the folders of bags and of runs.
    """

    skill: str
    checkpoint: Path
    name: str
    demonstrations: int = 24
    noise: float = 0.6
    play_ticks: int = 300
    stores: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    refit: tuple[str, ...] = ()
    iterations: int = 0
    minutes: float = 0.0
    recipe: str = ""
    real_time: bool = True
    background: bool = True  # retrain on what others leave of the processor
    folder: Path = Path("runs/loop")


@dataclass
class Ticks:
    """Control ticks while something went on, and those of them for which no command came in time."""

    total: int = 0
    missed: int = 0


@dataclass
class LoopRecord:
    """What happened. seconds: by step; worked, worked_well, lost: episodes of the base policy during the retraining that ended, that
    succeeded, and that the graph gave up."""

    bag: str = ""
    attempts: int = 0
    successes: int = 0
    worked: int = 0
    worked_well: int = 0
    lost: int = 0
    while_retraining: Ticks = field(default_factory=Ticks)
    while_swapping: Ticks = field(default_factory=Ticks)
    swap_ms: float = 0.0
    checkpoint: str = ""
    checkpoint_id: str = ""
    report: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


def run_loop(plan: LoopPlan, say: Callable[[str], None], stops: list[int]) -> LoopRecord:
    """Bring the graph up, go once around, take it down. Raises what `run_demo` raises, and DataError when a step of the loop fails."""
    mode = "real_time" if plan.real_time else "lockstep"
    given = {"mode": mode, "checkpoint": str(plan.checkpoint), "commands_from": "policy, scripted_play"}
    processes = load_graph("deploy").resolve({"sim": True, **given})
    folders = {"bags": str(plan.folder / "bags"), "runs": str(plan.folder / "runs"), "recipe": plan.recipe, "background": plan.background}
    processes += load_graph("loop").resolve({"mode": mode, "checkpoint": str(plan.checkpoint), **folders})
    join_graph(processes)
    runner = GraphRunner(processes, plan.folder / "logs")
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        runner.start()
        with GraphEvaluator() as evaluator:
            evaluator.node.create_timer(0.2, lambda: watch(runner, stops))
            wait_active(evaluator, [process.name for process in processes], plan.folder / "logs")
            return Loop(plan, evaluator, say).run()
    finally:
        runner.stop(lambda: len(stops) > 1)
        rclpy.try_shutdown()


class Loop:
    """The steps, on a graph that is up."""

    def __init__(self, plan: LoopPlan, evaluator: GraphEvaluator, say: Callable[[str], None]) -> None:
        self.plan, self.evaluator, self.say = plan, evaluator, say
        self.node, self.record = evaluator.node, LoopRecord()
        self.finetune = ActionClient(self.node, Finetune, "finetune")
        self.state: SimState | None = None
        self.streaming = ""  # checkpoint of the newest chunk
        self.node.create_subscription(SimState, "sim/state", lambda message: setattr(self, "state", message), reliable(10))
        self.node.create_subscription(ActionChunk, "action_chunk", self._take_chunk, reliable(10))

    def run(self) -> LoopRecord:
        """All steps in order."""
        for name, step in (("record", self.demonstrate), ("retrain", self.retrain), ("swap", self.swap)):
            begin_s = time.monotonic()
            step()
            self.record.seconds[name] = time.monotonic() - begin_s
        return self.record

    # -- recording ---------------------------------------------------------------------------------------------------------------------

    def demonstrate(self) -> None:
        """Record demonstrations of the skill with marks, then play, in one bag."""
        plan, record = self.plan, self.record
        self.say(f"recording {plan.demonstrations} demonstrations of '{plan.skill}' and {plan.play_ticks} ticks of play")
        begun = self.call(StartRecording, "recorder/start", StartRecording.Request(name=plan.name))
        with LiveTable(check=lambda: self.evaluator.executor.spin_once(timeout_sec=0)) as table:
            while record.successes < plan.demonstrations:
                if record.attempts >= MOST_ATTEMPTS * plan.demonstrations:
                    raise DataError(
                        f"{plan.skill}: expected {plan.demonstrations} successful demonstrations in {record.attempts} attempts, "
                        f"found {record.successes}. Use less noise than {plan.noise}."
                    )
                success = demonstrate_live(table, plan.skill, record.attempts, OPERATOR_SEED, plan.noise)
                self.call(MarkEpisode, "recorder/mark", MarkEpisode.Request(outcome=SUCCESS if success else FAILURE, skill=plan.skill))
                record.attempts, record.successes = record.attempts + 1, record.successes + success
            if plan.play_ticks:
                play_live(table, plan.play_ticks, OPERATOR_SEED)
        record.bag = self.call(StopRecording, "recorder/stop", StopRecording.Request()).bag or begun.bag
        self.say(f"{record.successes} of {record.attempts} attempts succeeded; bag in {record.bag}")

    # -- retraining --------------------------------------------------------------------------------------------------------------------

    def retrain(self) -> None:
        """Give the bag to the fine-tuning node, and let the base policy work until it is done."""
        plan, record = self.plan, self.record
        self.until(self.finetune.server_is_ready, "action finetune")
        goal = Finetune.Goal(skill=plan.skill, bags=[record.bag], stores=list(plan.stores), held_out=list(plan.held_out))
        goal.refit, goal.iterations, goal.budget_minutes, goal.name = list(plan.refit), plan.iterations, plan.minutes, plan.name
        goal.base = str((plan.checkpoint / "policies" / plan.skill).absolute())
        handle = self.wait(self.finetune.send_goal_async(goal, feedback_callback=self._take_feedback), "finetune")
        if not handle.accepted:
            raise DataError("finetune: the goal was refused; the log of the finetune node says why.")
        ended, before = handle.get_result_async(), self.state
        lost = 0  # in a row
        while not ended.done():
            index = record.worked + record.lost
            try:
                outcome = self.evaluator.run_episode(GraphEpisode(plan.skill, index, "validation", noise_seed=noise_seed(0, index)))
                record.worked, record.worked_well, lost = record.worked + 1, record.worked_well + outcome.success, 0
            except DataError as error:
                record.lost, lost = record.lost + 1, lost + 1
                self.say(f"    an episode was given up: {error}")
                if lost == MOST_LOST:
                    raise
        record.while_retraining = self.count_ticks(before)
        result = ended.result().result
        if not result.success:
            raise DataError(f"finetune: {result.message}")
        record.checkpoint, record.checkpoint_id, record.report = result.checkpoint, result.checkpoint_id, result.report
        ticks = record.while_retraining
        self.say(f"meanwhile the base policy worked: {record.worked} episodes, {ticks.missed} of {ticks.total} ticks missed")

    # -- swapping ----------------------------------------------------------------------------------------------------------------------

    def swap(self) -> None:
        """Exchange the policy while it moves the arm, and see that the new one commands. Raises GateError when it is refused."""
        runs = ActionClient(self.node, RunSkill, "run_skill")
        self.until(runs.server_is_ready, "action run_skill")
        handle = self.wait(runs.send_goal_async(RunSkill.Goal(skill=self.plan.skill, max_steps=SWAP_STEPS)), "run_skill")
        if not handle.accepted:
            raise DataError("run_skill was refused; the status of the policy node says why.")
        ended = handle.get_result_async()
        self.until(lambda: self.streaming not in ("", self.record.checkpoint_id), "chunks of the base policy")
        before, begin_s = self.state, time.monotonic()
        identity = self.evaluator.load_policy(self.record.checkpoint, self.plan.skill)
        self.record.swap_ms = (time.monotonic() - begin_s) * 1e3
        self.until(lambda: self.streaming == identity or ended.done(), "chunks of the new policy")
        if self.streaming != identity:
            raise GateError(
                f"swap: expected chunks of {identity[:16]} before the run ended, found none. Its result: {ended.result().result}"
            )
        self.record.while_swapping = self.count_ticks(before)
        self.wait(handle.cancel_goal_async(), "cancel")
        self.wait(ended, "the result of run_skill")
        runs.destroy()
        ticks = self.record.while_swapping
        self.say(
            f"swapped to {identity[:16]} in {self.record.swap_ms:.0f} ms while the arm moved; {ticks.missed} of {ticks.total} ticks missed"
        )

    # -- listening and waiting ---------------------------------------------------------------------------------------------------------

    def count_ticks(self, before: SimState) -> Ticks:
        """Since `before`."""
        return Ticks(self.state.tick - before.tick, self.state.missed_ticks - before.missed_ticks)

    def _take_chunk(self, message: ActionChunk) -> None:
        if message.horizon:
            self.streaming = message.checkpoint_id

    def _take_feedback(self, message: Finetune.Impl.FeedbackMessage) -> None:
        feedback = message.feedback
        if feedback.stages:
            self.say(f"    {feedback.stage} {100 * feedback.progress:.0f} % (stage {feedback.stages_done + 1} of {feedback.stages})")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Serve the graph until `condition` holds. Raises DataError."""
        end_s = time.monotonic() + ANSWER_S
        while not condition():
            if time.monotonic() > end_s:
                raise DataError(f"graph: expected {what} within {ANSWER_S:g} s, found none. Logs: {self.plan.folder / 'logs'}")
            self.evaluator.executor.spin_once(timeout_sec=0.05)

    def wait(self, future: Future, what: str) -> object:
        """The result of `future`. Raises DataError."""
        self.until(future.done, f"an answer of {what}")
        return future.result()

    def call(self, service_type: type, name: str, request: object) -> object:
        """Call a service of the recorder. Raises DataError when it is not there or refuses."""
        client = self.node.create_client(service_type, name)
        self.until(client.service_is_ready, f"service {name}")
        response = self.wait(client.call_async(request), name)
        self.node.destroy_client(client)
        if not response.success:
            raise DataError(f"{name}: {response.message}")
        return response
