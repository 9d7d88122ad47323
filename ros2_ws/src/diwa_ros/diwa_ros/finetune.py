"""Serves the action finetune: recorded bags in, a better policy out, made by `diwa retrain` in a process of the lowest priority."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from diwa_interfaces.action import Finetune
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.task import Future

from diwa_core import tether
from diwa_core.cli.pipeline import EXIT_UNFINISHED
from diwa_core.cli.retrain import RESULT, STATUS
from diwa_core.errors import ConfigError, DiwaError
from diwa_core.pipeline.retrain import Request
from diwa_ros.diagnostics import ERROR, OK, WARN
from diwa_ros.node import DiwaNode, run_node
from diwa_ros.parameters import Parameter

WATCH_S, FEEDBACK_S = 0.2, 1.0
STOP_STEPS = ((signal.SIGINT, 60.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))  # signal and seconds to save and obey
PATIENCE_S = 3.0  # of a node that is about to end
MOST_RESTARTS = 2
LAST_LINES = 6


class FinetuneNode(DiwaNode):
    """Runs one retraining at a time. Another goal meanwhile is refused with a reason in the log and on /diagnostics.

    The worker's run folder keeps everything: after a kill of worker or node the same goal goes on where it stopped.
    """

    NAME = "finetune"
    PARAMETERS = (
        Parameter("checkpoints", "checkpoints", "Folder with world_model/, policies/ and classifiers/ to begin from."),
        Parameter("recipe", "", "YAML with the options of the stages; empty: config/retrain.yaml."),
        Parameter("background", True, "The worker takes only what others leave of the processor; false: its fair share."),
        Parameter("runs", "runs/finetune", "Folder in which every run gets its own."),
    )

    def configure(self) -> None:
        """Offer the action. Raises ConfigError without checkpoints."""
        self.checkpoints, self.runs = Path(self.parameters["checkpoints"]).absolute(), Path(self.parameters["runs"]).absolute()
        if not (self.checkpoints / "world_model").exists():
            raise ConfigError(f"parameter 'checkpoints': expected a folder with world_model/, found none at {self.checkpoints}.")
        self.request: Request | None = None  # of the run in progress
        self.worker: Worker | None = None
        self.goal: ServerGoalHandle | None = None
        self.finished: Future | None = None
        self.action_server = ActionServer(
            self, Finetune, "finetune", self.execute, goal_callback=self.judge_goal, cancel_callback=self.cancel
        )
        self.repeat(WATCH_S, self.watch)

    def deactivate(self) -> None:
        """Stop the worker in good order; its run folder goes on later."""
        if self.worker is not None:
            self.worker.stop()
            self.finish(False, "the finetune node was deactivated; the same goal goes on")

    def cleanup(self) -> None:
        """Withdraw the action."""
        self.action_server.destroy()

    # -- the action --------------------------------------------------------------------------------------------------------------------

    def judge_goal(self, goal: Finetune.Goal) -> GoalResponse:
        """Accept a goal that can be worked on when nothing runs."""
        try:
            if not self.active:
                raise ConfigError("finetune: expected an active node, found it inactive.")
            if self.request is not None:
                raise ConfigError(f"finetune: expected no run in progress, found one of '{self.request.skill}' running. Cancel it or wait.")
            self.request = self.read_goal(goal)
        except DiwaError as error:
            self.diagnostics.report("finetune", ERROR, f"goal refused: {error}")
            return GoalResponse.REJECT
        self.diagnostics.report("finetune", OK, "goal accepted")
        self.finished = Future(executor=self.executor)
        return GoalResponse.ACCEPT

    def read_goal(self, goal: Finetune.Goal) -> Request:
        """Raises ConfigError on an unknown skill or part, missing paths, a negative budget or a name that leaves the folder of runs."""
        if not goal.budget_minutes >= 0 or (goal.name and Path(goal.name).name != goal.name):
            raise ConfigError(
                f"finetune: expected budget_minutes of 0 or more and a name without folders, found {goal.budget_minutes} and '{goal.name}'."
            )
        return Request(
            goal.skill,
            str(self.checkpoints),
            tuple(goal.bags),
            tuple(goal.stores),
            tuple(goal.held_out),
            goal.base,
            tuple(goal.refit),
            goal.iterations,
            recipe=self.parameters["recipe"],
        )

    def cancel(self, goal: ServerGoalHandle) -> CancelResponse:
        """Ask the worker to save its state and end; the action returns when it has."""
        if self.worker is not None:
            self.worker.ask_to_stop()
        return CancelResponse.ACCEPT

    async def execute(self, goal: ServerGoalHandle) -> Finetune.Result:
        """Start the worker and wait; `watch` does the rest."""
        self.goal, folder = goal, self.runs / (goal.request.name or self.request.name)
        self.told_s = 0.0
        try:
            self.worker = Worker(self.request, folder, goal.request.budget_minutes, self.parameters["background"])
            self.get_logger().info(f"'{self.request.skill}': working in {folder}")
        except OSError as error:
            self.finish(False, f"{folder}: the worker cannot be started there: {error}")
        result = await self.finished
        self.goal, self.request, self.worker = None, None, None
        if result.success:
            goal.succeed()
        elif goal.is_cancel_requested:
            goal.canceled()
        else:
            goal.abort()
        self.diagnostics.report("finetune", OK if result.success or goal.is_cancel_requested else ERROR, result.message)
        return result

    # -- the worker --------------------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Pass the worker's progress on, insist when it does not stop, begin again when something killed it."""
        if self.worker is None or self.finished.done():
            return
        worker, code = self.worker, self.worker.poll()
        if code is None:
            if time.monotonic() - self.told_s > FEEDBACK_S:
                self.told_s = time.monotonic()
                self.goal.publish_feedback(worker.feedback())
        elif worker.stopping:
            self.finish(False, "cancelled; what was done is kept, and the same goal goes on")
        elif code < 0 and worker.restarts < MOST_RESTARTS:
            self.diagnostics.report("worker", WARN, f"ended by {signal.Signals(-code).name}; it goes on where it was")
            worker.start_again()
        elif code == EXIT_UNFINISHED:
            self.finish(False, "the budget is spent; what was done is kept, and the same goal goes on")
        elif code != 0:
            self.finish(False, f"the worker ended with {code}; log: {worker.log}\n" + "\n".join(worker.last_lines()))
        else:
            report = json.loads((worker.folder / RESULT).read_text())
            self.finish(True, f"{report['skill']}: imagined {report['imagined']}", report, worker.folder / RESULT)

    def finish(self, success: bool, message: str, report: dict | None = None, path: Path | None = None) -> None:
        """Let the action return."""
        if self.finished.done():
            return
        result = Finetune.Result(success=success, message=message)
        if report is not None:
            result.checkpoint, result.checkpoint_id = report["checkpoint"], report["identity"]
            result.world_model, result.report = report["world_model"], str(path)
        self.finished.set_result(result)
        if self.executor is not None:  # None once the process stops spinning
            self.executor.wake()


class Worker:
    """`diwa retrain` in a session of its own; it gets SIGTERM when this process dies."""

    def __init__(self, request: Request, folder: Path, budget_minutes: float, background: bool) -> None:
        self.background = background
        self.folder, self.log = folder, folder / "worker.log"
        self.request, self.budget_minutes = request, budget_minutes
        self.began_s, self.restarts, self.stopping = time.monotonic(), 0, False
        folder.mkdir(parents=True, exist_ok=True)
        for name in (STATUS, RESULT):
            (folder / name).unlink(missing_ok=True)
        self.popen = self._start()

    def poll(self) -> int | None:
        """The exit code, None while it works. A worker that was asked to stop and does not is told so more and more firmly."""
        code = self.popen.poll()
        if code is None and self.stopping:
            limits = [sum(limit for _, limit in STOP_STEPS[: i + 1]) for i in range(len(STOP_STEPS))]
            waited_s = time.monotonic() - self.asked_s
            while self.step + 1 < len(STOP_STEPS) and waited_s > limits[self.step]:
                self.step += 1
                self.popen.send_signal(STOP_STEPS[self.step][0])
        if code is not None:
            self._sweep()
        return code

    def ask_to_stop(self) -> None:
        """The worker saves its state and ends; `poll` tells when."""
        if not self.stopping and self.popen.poll() is None:
            self.stopping, self.step, self.asked_s = True, 0, time.monotonic()
            self.popen.send_signal(STOP_STEPS[0][0])

    def stop(self) -> None:
        """Ask, and give it a moment; one that takes longer ends by itself, and whoever goes on in its folder waits for it."""
        self.ask_to_stop()
        end_s = time.monotonic() + PATIENCE_S
        while self.poll() is None and time.monotonic() < end_s:
            time.sleep(0.05)

    def start_again(self) -> None:
        """Go on in the same folder."""
        self.restarts += 1
        self.popen = self._start()

    def feedback(self) -> Finetune.Feedback:
        """The newest status of the worker."""
        try:
            status = json.loads((self.folder / STATUS).read_text())
        except (OSError, ValueError):
            status = {}
        feedback = Finetune.Feedback(stage=status.get("stage", "starting"), detail=status.get("detail", ""))
        feedback.progress, feedback.stages_done = float(status.get("progress", 0)), status.get("stages_done", 0)
        feedback.stages = status.get("stages", 0)
        for name in ("imagined", "held_out", "seconds_left"):
            value = status.get(name)
            setattr(feedback, name, math.nan if value is None else float(value))
        return feedback

    def last_lines(self) -> list[str]:
        """The end of what it printed."""
        return self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]

    def _start(self) -> subprocess.Popen:
        request = self.request
        words = ["retrain", "--out", str(self.folder), "--skill", request.skill, "--checkpoints", request.checkpoints]
        words += ["--base", request.base, "--recipe", request.recipe, "--iterations", str(request.iterations)]
        for name in ("bags", "stores", "held_out", "refit"):
            values = getattr(request, name)
            words += [f"--{name.replace('_', '-')}", *values] if values else []
        if self.budget_minutes:
            left = self.budget_minutes - (time.monotonic() - self.began_s) / 60
            words += ["--max-minutes", f"{max(left, 0.01):.2f}"]
        priority = {tether.BACKGROUND: "1"} if self.background else {}
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-S", "-E", tether.__file__, str(os.getpid()), sys.executable, "-m", "diwa_core.cli.main", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **priority},
                start_new_session=True,
            )

    def _sweep(self) -> None:
        """End what a killed worker may have left in its session."""
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def main() -> int:
    """Run the node as a process; returns the exit code."""
    return run_node(FinetuneNode)


if __name__ == "__main__":
    sys.exit(main())
