"""Trials on real graphs: in lock-step simulation by the command line; on the fake FR3 with an oracle's and with an operator's marks."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import yaml
from ros_support import private_environment
from std_srvs.srv import Trigger
from trial_support import make_candidates, make_judge

from diwa_core.cli.main import build_parser, main
from diwa_core.contract import Contract
from diwa_core.errors import DataError
from diwa_core.evaluate.trial_journal import BY_OPERATOR, BY_ORACLE, ROBOT, SIMULATION, TrialJournal, TrialRow
from diwa_core.evaluate.trial_run import run_trials
from diwa_core.evaluate.trials import JOURNAL, TrialFolder, make_plan
from diwa_ros.trial_graph import trial_command, trial_graph
from diwa_ros.trials import RobotTrials, open_graph

ROOT = Path(__file__).parents[1]
ADDRESS = f"127.62.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}"  # runs side by side do not meet
PATIENCE_S = 120.0
SKILL = "open_drawer"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_candidates(tmp_path_factory.mktemp("checkpoints"), skills=[SKILL])


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of the test's own."""
    for name, value in private_environment().items():
        monkeypatch.setenv(name, value)


def test_the_graph_of_trials_lets_the_evaluator_command_and_never_rolls_back() -> None:
    robot = {process.name: process for process in trial_graph("checkpoints", "fake-fr3", bags="runs/bags")}
    assert list(robot) == ["fake_fr3", "franka_controller", "encoder", "policy", "recorder"]
    assert robot["franka_controller"].parameters["command_sources"] == "policy, evaluator"
    assert robot["policy"].parameters["probation_s"] == 0.0 and robot["recorder"].parameters["record_at_start"] is False
    simulation = {process.name: process for process in trial_graph("checkpoints")}
    assert simulation["calvin_bridge"].parameters["mode"] == "lockstep"


def test_launch_starts_the_trials_with_words_that_the_command_line_reads(tmp_path) -> None:
    *start, verb, step = (words := trial_command("some", "fake-fr3", False, str(tmp_path)))[:4]
    assert start == ["-m", "diwa_core.cli.main"] and (verb, step) == ("evaluate", "robot")
    args = build_parser("evaluate").parse_args([*words[2:], "--candidates", "a=x"])
    assert (args.attach, args.on, args.robot, args.bags) == (True, ["robot"], "fake-fr3", str(tmp_path))


def test_silence_discards_a_trial_whatever_its_outcome_but_not_for_ever() -> None:
    controller, operator = SimpleNamespace(states=["IDLE", "ACTIVE"], faults=[]), ScriptedOperator()
    trials = SimpleNamespace(controller=controller, operator=operator, repeats={})

    def mark(number: int, oracle: bool) -> str:
        return RobotTrials.mark_by_oracle(trials, TrialRow("plan", ROBOT, number, oracle=oracle))

    assert [mark(1, True), mark(1, False)] == ["success", "failure"]
    controller.faults = ["no action chunk for 1 s; call controller/resume"]
    assert [mark(1, True), mark(1, False), mark(1, True), mark(1, False)] == ["discard", "discard", "success", "failure"]
    controller.faults, controller.states = ["8 steps in a row met a limit"], ["ACTIVE", "FAULT"]
    assert mark(2, False) == "failure"
    controller.states = ["ACTIVE", "DISCONNECTED", "IDLE"]
    assert mark(2, False) == "discard" and "repeated" in operator.told[-1]


@pytest.mark.timeout(600)
def test_trials_in_the_simulation_on_the_graph(checkpoints, tmp_path, monkeypatch, capfd, alone) -> None:
    words = ["evaluate", "robot", "--checkpoint", str(checkpoints), "--out", str(tmp_path / "out"), "--on", "simulation"]
    words += ["--candidates", f"base={checkpoints / 'policies'}", f"tuned={checkpoints / 'tuned'}", "--starts", "1", "--max-steps", "9"]
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--timeout", str(PATIENCE_S)]) == 0
    told = capfd.readouterr().out
    assert "simulation: trial 2 of 2, open_drawer" in told and "The report opens the key, so it waits" in told
    assert "tuned" not in told and not (tmp_path / "out" / "report.html").exists()
    folder = TrialFolder(tmp_path / "out")
    rows = TrialJournal(tmp_path / "out" / JOURNAL, folder.read_plan()).finished(SIMULATION)
    for row in rows.values():
        assert (row.oracle, row.steps, row.mark) == (False, 9, None) and row.classifier is not None
        assert len(row.latency_ms["camera → latent"]) >= 9 and (tmp_path / "out" / row.strip).exists()
        assert row.watchdog == {} and sum(row.dropped.values()) == 0
    assert main([*words, "--open"]) == 0
    assert "tuned − base" in (tmp_path / "out" / "report.html").read_text()


class ScriptedOperator:
    """Presses Enter whenever asked to, resumes the robot, and marks once the trial is over; without a mark, patience ends at once."""

    def __init__(self) -> None:
        self.mark, self.pressed, self.told, self.trials = "s", "", [], None

    def tell(self, text: str) -> None:
        self.told.append(text)
        if "not ready: FAULT" in text:
            self.trials.call(Trigger, "controller/resume", Trigger.Request())
        if "Enter" in text:
            self.pressed += "\n"
        if "the trial is over" in text:
            self.pressed += self.mark
            self.trials.mark_timeout_s = PATIENCE_S if self.mark else 0.5

    def keys(self) -> str:
        pressed, self.pressed = self.pressed, ""
        return pressed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_on_the_fake_fr3(checkpoints, tmp_path, alone, monkeypatch) -> None:
    pytest.importorskip("franky_sim", reason="extra [franka]")
    monkeypatch.setattr("diwa_ros.trials.REPEATS", 0)  # a busy machine's silence is not what is tested
    robot = yaml.safe_load((ROOT / "config" / "fake_fr3.yaml").read_text()) | {"address": ADDRESS, "connect_timeout_s": 3.0}
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(robot))
    processes = trial_graph(checkpoints, "fake-fr3", bags=str(tmp_path / "bags"))
    for process in processes:
        if "robot" in process.parameters:
            process.parameters["robot"] = str(tmp_path / "robot.yaml")
        if process.name == "policy":
            process.parameters["latency_budget_ms"] = 1000.0  # a busy machine's latencies are not what is tested
        if process.name == "franka_controller":
            process.parameters["stop_after_s"] = 10.0
    plan, key = make_plan({"only": checkpoints / "tuned"}, checkpoints / "world_model", starts=3, max_steps=6)
    folder, judge, operator = TrialFolder(tmp_path / "out"), make_judge(checkpoints, [SKILL]), ScriptedOperator()
    folder.begin(plan, key)
    overlay = tmp_path / "out" / "overlay"

    with open_graph(processes, Contract(), tmp_path / "logs", [], timeout_s=PATIENCE_S) as client:
        trials = RobotTrials(client, "fake-fr3", operator, overlay, unattended=True, record=True, mark_timeout_s=PATIENCE_S)
        operator.trials = trials
        run = trials.run

        def change_sides(assignment, row):
            """The oracle marks the first trial, the operator the second; nobody the third."""
            trials.unattended = assignment.trial.number == 1
            operator.mark = {1: "s", 2: "s", 3: ""}[assignment.trial.number]
            return run(assignment, row)

        trials.run = change_sides
        with pytest.raises(DataError, match=r"trial 3: expected a mark .* within 0.5 s, found none"):
            run_trials(folder, ROBOT, "fake-fr3", lambda: trials, judge)
    journal = TrialJournal(tmp_path / "out" / JOURNAL, plan)
    rows = journal.finished(ROBOT)
    assert sorted(rows) == [1, 2] and rows[1].marked_by == BY_ORACLE and rows[2].marked_by == BY_OPERATOR
    assert rows[2].mark == "success" and rows[1].oracle is not None
    for number, row in rows.items():
        assert row.start_error["hand_mm"] < 30 and row.start_error["drawer_mm"] < 5
        picture = cv2.imread(str(overlay / f"trial_{number:03d}.png"))
        assert picture is not None and picture.shape[1] == 1200
        assert (Path(row.bag) / "metadata.yaml").exists() and row.latency_ms["camera → chunk"] and row.robot == "fake-fr3"
    assert any("Enter" in text for text in operator.told)
