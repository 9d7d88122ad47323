"""The commanded pose of a Franka stays where it may be, what is reported is what was applied, and a robot's YAML names its mistakes."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diwa_core.contract import Contract
from diwa_core.control.franka_arm import FrankaArm
from diwa_core.control.limits import Clamp
from diwa_core.control.robot_config import RobotConfig, load_robot_config
from diwa_core.control.target import TargetIntegrator, wrap
from diwa_core.errors import ConfigError
from diwa_core.sim.scene import NEUTRAL_JOINTS
from diwa_core.sim.state import NEUTRAL_POSE
from diwa_ros.gate import State, Watchdog

CONFIGS = Path(__file__).parents[1] / "config"
FAKE = load_robot_config(CONFIGS / "fake_fr3.yaml")
SLOW = replace(FAKE, limits=FAKE.limits | {"max_speed_m_s": 0.25})
ACTIONS = st.lists(st.lists(st.floats(-1, 1), min_size=7, max_size=7), min_size=1, max_size=25)
MEASURED, JOINTS = np.array(NEUTRAL_POSE), np.array(NEUTRAL_JOINTS)


def test_an_arm_without_real_time_priority_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    arm = FrankaArm(FAKE)
    arm._ending.set()
    arm._run()
    assert "real-time priority 20, found that it is not" in caplog.text and "diwa doctor --robot" in caplog.text


def started(config: RobotConfig) -> TargetIntegrator:
    integrator = TargetIntegrator(config, Contract())
    integrator.start(MEASURED)
    return integrator


@given(actions=ACTIONS)
@settings(max_examples=25, deadline=None)
def test_the_target_stays_in_the_box_and_on_its_leash_and_is_what_is_reported(actions: list) -> None:
    integrator = started(FAKE)
    lower, upper = FAKE.motion.box
    for action in actions:
        before = integrator.target.copy()
        applied, clamps = integrator.apply(np.array(action), MEASURED, JOINTS)
        coordinates = integrator.to_coordinates(integrator.target)
        assert (coordinates >= lower - 1e-9).all() and (coordinates <= upper + 1e-9).all()
        assert np.linalg.norm(integrator.target[:3] - MEASURED[:3]) <= FAKE.motion.leash_m + 1e-9
        assert integrator.target[:3] == pytest.approx(before[:3] + applied[:3] * 0.02, abs=1e-6)
        assert wrap(integrator.target[3:] - before[3:]) == pytest.approx(applied[3:6] * 0.05, abs=1e-6)
        assert clamps or applied == pytest.approx(np.array(action, np.float32))


def test_a_step_faster_than_the_robot_may_go_is_cut_and_reported() -> None:
    integrator = started(SLOW)
    applied, clamps = integrator.apply(np.array([1.0, 0, 0, 0, 0, 0, -1.0]), MEASURED, JOINTS)
    assert clamps == Clamp.RATE and integrator.counts == {"rate": 1} and integrator.in_a_row == 0
    assert integrator.target[0] - MEASURED[0] == pytest.approx(0.25 / 30)
    assert applied[0] == pytest.approx(0.25 / 30 / 0.02) and applied[6] == -1.0


def test_blocked_motion_does_not_wind_the_target_up() -> None:
    integrator = started(FAKE)
    results = [integrator.apply(np.array([0, 0, 1.0, 0, 0, 0, 1.0]), MEASURED, JOINTS) for _ in range(10)]
    assert results[-1][1] & Clamp.LEASH and integrator.in_a_row > 3
    back, clamps = integrator.apply(np.array([0, 0, -1.0, 0, 0, 0, 1.0]), MEASURED, JOINTS)
    assert not clamps and back[2] == -1.0 and integrator.in_a_row == 0


def test_a_singularity_is_not_approached_but_left() -> None:
    integrator = started(replace(FAKE, max_condition=5.0))
    stretch, refused = np.array([0.7, 0.7, 0, 0, 0, 0, 1.0]), 0
    for sign in (1, -1):
        integrator.start(MEASURED)
        refused += bool(integrator.apply(sign * stretch, MEASURED, JOINTS)[1] & Clamp.JOINT)
    assert refused == 1  # towards it, not away from it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limits: {max_speed_m_s: 5}", r"max_speed_m_s: expected at most 3"),
        ("model: fer\nlimits: {max_speed_m_s: 1.8}", r"max_speed_m_s: expected at most 1\.7"),
        ("limits: {max_sped_m_s: 1}", "Did you mean 'max_speed_m_s'"),
        ("model: fr2", "model: expected one of fer, fr3"),
        ("limits: {profile: simulation}", "limits.profile: expected the model"),
        ("limits: {workspace_lower_m: [0, 0, 2]}", "workspace_upper_m"),
        ("home_joints_rad: [0, 0, 0, 0, 0, 0, 0]", "home_joints_rad of joint 4"),
        ("impedance: {friction_nm: [2, 0, 0, 0, 0, 0, 0]}", "friction_nm of joint 1"),
        ("impedance: {friction_nm: [0.5]}", "impedance.friction_nm: expected 7"),
        ("max_condition: .nan", r"max_condition: expected 5 to 500, found nan"),
        ("tool: {tcp_in_hand_m: [0, 0]}", "tool.tcp_in_hand_m: expected 3"),
        ("address: ''", "address: expected a host name"),
        ("realtime: 'no'", "realtime: expected one of enforce, ignore"),
    ],
)
def test_mistakes_in_a_robots_yaml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "robot.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_robot_config(tmp_path / "robot.yaml")


def test_both_arms_are_known() -> None:
    assert load_robot_config(CONFIGS / "robot.yaml").motion.joint_upper_rad[5] == 4.6216
    assert RobotConfig(model="fer").motion.joint_upper_rad[5] == 3.7525


def test_a_stop_of_ours_outlasts_the_robots_own_state() -> None:
    watchdog = Watchdog()
    watchdog.connect()
    watchdog.impose(State.REFLEX, "reflex")
    watchdog.stop()
    watchdog.impose(State.REFLEX, "reflex")
    assert watchdog.state is State.REFLEX
    watchdog.release()
    assert watchdog.state is State.USER_STOPPED
    watchdog.resume()
    watchdog.release()
    assert watchdog.state is State.IDLE
