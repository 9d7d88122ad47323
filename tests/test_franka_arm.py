"""The real client against a simulated robot: it moves, and every fault leaves it held, with a sentence that names the cause."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("franky_sim", reason="extra [franka]")

from diwa_core.cli.robot_doctor import examine_robot
from diwa_core.control.franka_arm import STALE_S, FrankaArm, Phase
from diwa_core.control.franka_hand import FrankaHand
from diwa_core.control.robot_config import load_robot_config
from diwa_core.errors import ConfigError, GateError
from diwa_core.sim.fake_robot import FakeRobot, Fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ADDRESS = f"127.71.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}"  # runs side by side do not meet
CONFIG = replace(load_robot_config(Path(__file__).parents[1] / "config" / "fake_fr3.yaml"), address=ADDRESS, connect_timeout_s=2.0)
PATIENCE_S = 90.0  # a busy machine slows the robot's time down, not only ours


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeRobot]:
    with FakeRobot(ADDRESS, CONFIG.home_joints_rad, CONFIG.base_position_m) as robot:
        yield robot


@pytest.fixture(params=["impedance"])
def arm(fake: FakeRobot, request: pytest.FixtureRequest) -> Iterator[FrankaArm]:
    fake.inject(Fault.NONE)
    arm = FrankaArm(replace(CONFIG, streaming=request.param))
    arm.start()
    wait(lambda: arm.phase is Phase.READY and arm.state is not None, arm)
    yield arm
    fake.inject(Fault.NONE)
    arm.close(20.0)


def wait(condition: Callable[[], object], arm: FrankaArm | None = None) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, arm and f"{arm.phase}: {arm.reason}"
        time.sleep(0.01)


def stream(arm: FrankaArm, step_m: float = 0.0) -> np.ndarray:
    """Aim `step_m` above where the arm is and wait until it streams; returns where it was."""
    before = arm.measured_coordinates()

    def aim() -> bool:
        arm.aim(before + np.array([0, 0, step_m, 0, 0, 0]), time.monotonic() + 0.1)
        return arm.phase is not Phase.READY

    wait(aim, arm)
    return before


@pytest.mark.parametrize("arm", ["impedance", "cartesian"], indirect=True)
def test_the_arm_goes_where_it_is_sent_and_stops(arm: FrankaArm) -> None:
    before = stream(arm, 0.02)
    wait(lambda: stream_on(arm, before, 0.02) and arm.measured_coordinates()[2] > before[2] + 0.01, arm)
    assert arm.phase is Phase.STREAMING, arm.reason
    moved = arm.measured_coordinates() - before
    assert np.linalg.norm(moved[:2]) < 0.01 and np.linalg.norm(moved[3:]) < 0.1
    arm.request("stop")
    wait(lambda: arm.phase is Phase.READY, arm)
    assert arm.commanded is None


def stream_on(arm: FrankaArm, before: np.ndarray, step_m: float) -> bool:
    arm.aim(before + np.array([0, 0, step_m, 0, 0, 0]), time.monotonic() + 0.05)
    return True


def test_without_commands_the_robot_holds_itself(arm: FrankaArm) -> None:
    stream(arm)
    wait(lambda: arm.phase is Phase.READY, arm)


def test_a_reflex_names_its_cause_and_waits_for_recovery(fake: FakeRobot, arm: FrankaArm) -> None:
    stream(arm)
    fake.inject(Fault.REFLEX)
    wait(lambda: arm.phase is Phase.REFLEX, arm)
    assert "cartesian_reflex" in arm.reason and arm.commanded is None
    with pytest.raises(GateError, match="controller/recover"):
        arm.request("resume")
    arm.request("recover")
    wait(lambda: arm.phase is Phase.READY, arm)
    assert arm.recoveries == 1


def test_a_user_stop_is_never_ended_by_us(fake: FakeRobot, arm: FrankaArm) -> None:
    stream(arm)
    fake.inject(Fault.USER_STOP)
    wait(lambda: arm.phase is Phase.USER_STOPPED, arm)
    with pytest.raises(GateError, match="Release it"):
        arm.request("resume")
    fake.inject(Fault.NONE)
    wait(lambda: arm.state.mode == "Idle", arm)
    assert arm.phase is Phase.USER_STOPPED
    arm.request("resume")
    wait(lambda: arm.phase is Phase.READY, arm)


@pytest.mark.parametrize("fault", [Fault.SAFETY_STOP, Fault.REJECT_MOTION])
def test_stops_and_refusals_of_the_robot_are_faults(fake: FakeRobot, arm: FrankaArm, fault: Fault) -> None:
    fake.inject(fault)
    wait(lambda: arm.phase is Phase.FAULT or stream(arm) is None, arm)
    assert "controller/resume" in arm.reason
    fake.inject(Fault.NONE)
    wait(lambda: arm.state.mode == "Idle", arm)
    arm.request("resume")
    wait(lambda: arm.phase is Phase.READY, arm)


def test_a_frozen_robot_is_noticed_by_the_age_of_its_state(fake: FakeRobot, arm: FrankaArm) -> None:
    stream(arm)
    fake.inject(Fault.FREEZE)
    wait(lambda: arm.age_s > STALE_S, arm)
    fake.inject(Fault.NONE)
    wait(lambda: arm.phase is Phase.READY, arm)


def test_a_lost_link_is_mended_with_a_new_client(fake: FakeRobot, arm: FrankaArm) -> None:
    stream(arm)
    fake.inject(Fault.LINK_LOSS)
    wait(lambda: arm.phase is Phase.DISCONNECTED, arm)
    wait(lambda: arm.phase is Phase.READY, arm)


@pytest.mark.parametrize(("fault", "reason"), [(Fault.MUTE, "did not answer"), (Fault.WRONG_VERSION, "versions: ")])
def test_a_robot_that_cannot_be_used_is_named(fake: FakeRobot, arm: FrankaArm, fault: Fault, reason: str) -> None:
    fake.inject(fault)
    wait(lambda: reason in arm.reason, arm)
    assert arm.phase is Phase.DISCONNECTED
    fake.inject(Fault.NONE)
    wait(lambda: arm.phase is Phase.READY, arm)


def test_a_second_client_is_told_that_it_is_second(arm: FrankaArm) -> None:
    second = FrankaArm(CONFIG)
    second.start()
    wait(lambda: "no other client" in second.reason, second)
    assert arm.phase is Phase.READY
    second.close(0.0)


def test_nobody_there(tmp_path: Path) -> None:
    arm = FrankaArm(replace(CONFIG, address="127.0.0.72"))
    arm.start()
    wait(lambda: arm.phase is Phase.DISCONNECTED, arm)
    assert "no robot at 127.0.0.72" in arm.reason
    arm.close()


def test_the_hand_closes_opens_and_reports_a_gripper_that_never_answers(fake: FakeRobot) -> None:
    fake.inject(Fault.NONE)
    hand = FrankaHand(replace(CONFIG, gripper=replace(CONFIG.gripper, timeout_s=15.0)))
    hand.start()
    wait(lambda: not hand.problem)
    hand.ask(False)
    assert hand._asked_open is None  # one sample is none
    for _ in range(3):
        hand.ask(False)
    wait(lambda: hand.width_m < 0.01)
    fake.inject(Fault.GRIPPER_ABORT)
    for _ in range(3):
        hand.ask(True)
    wait(lambda: "no answer" in hand.problem)
    fake.inject(Fault.NONE)
    wait(lambda: not hand.problem and hand.width_m > 0.05)
    hand.close()


def test_the_doctor_says_what_to_do(fake: FakeRobot) -> None:
    fake.inject(Fault.USER_STOP)
    findings = {finding.name: finding for finding in examine_robot(ADDRESS)}
    fake.inject(Fault.NONE)
    assert findings["versions"].ok and findings["payload"].ok and findings["gripper"].ok
    assert not findings["mode"].ok and "release the user stop" in findings["mode"].mend
    assert all(finding.ok or finding.mend for finding in findings.values())
    missing = examine_robot("127.0.0.72")
    assert not missing[-1].ok and "Activate FCI" in missing[-1].mend


def test_an_address_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.73", 1337)), pytest.raises(ConfigError, match=r"127\.0\.0\.73 ports 1337 and 1338"):
        FakeRobot("127.0.0.73").__enter__()
