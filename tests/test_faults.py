"""The fault matrix: whatever goes wrong, the arm is held, nothing outside the limits goes out, the state says so, and it can go on.

Times are printed by `python benchmarks/faults.py`; here only what must hold on the slowest machine is asserted.
"""

from pathlib import Path

import numpy as np
import pytest
from fault_matrix import faults_of
from fault_rig import RIGS, Place, Sent, count_outside, count_targets_outside, make_fault_checkpoints
from ros_support import private_graph

from diwa_core.contract import Contract
from diwa_core.control.robot_config import load_robot_config

SOME = ("policy killed", "huge action", "reflex", "user stop at the robot", "robot link cut", "gripper stuck")  # benchmarks/faults.py: all
CASES = [("simulation", fault) for fault in faults_of("simulation")]
CASES += [("fake-fr3", {fault.name: fault for fault in faults_of("fake-fr3")}[name]) for name in SOME]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return make_fault_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def rig(request, checkpoints, tmp_path_factory):
    """The running graph of one backend."""
    if request.param == "fake-fr3":
        pytest.importorskip("franky_sim", reason="extra [franka]")
    with private_graph():
        rig = RIGS[request.param](checkpoints, tmp_path_factory.mktemp("logs"))
        yield rig
        rig.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("rig", "fault"), CASES, indirect=["rig"], ids=str)
def test_the_arm_is_held_says_so_and_goes_on(rig, fault):
    outcome = rig.run(fault)
    assert outcome.outside == 0
    assert outcome.at_rest or not fault.holds, outcome
    assert set(outcome.states) & set(fault.states) or not fault.controller_lives, outcome
    assert fault.diagnostic in outcome.reason
    assert outcome.resumed_by


def test_what_counts_as_outside_the_limits():
    good = np.array([0.5, 0, 0, 0, 0, 0, 1], np.float32)
    bad = [good * 2, good + np.float32(np.nan), good * np.array([1, 1, 1, 1, 1, 1, 0.5])]
    assert count_outside([Sent(0, 1, good, False), Sent(0, 2, good, False)]) == 0
    assert count_outside([Sent(0, stamp, action, False) for stamp, action in enumerate(bad)]) == 3
    assert count_outside([Sent(0, 1, good, False), Sent(0, 1, good, False)]) == 1


def test_what_counts_as_a_target_outside_the_limits():
    config = load_robot_config(Path(__file__).parents[1] / "config" / "fake_fr3.yaml")
    way_m, middle = config.motion.max_speed_m_s * Contract().step_s, np.array([0.0, -0.2, 0.5, np.pi, 0, 1.5])
    right, measured = np.eye(6)[0], np.zeros(6)

    def count(*targets_m, ticks_ns=()):
        places = [Place(time_ns, middle + right * target_m, measured) for time_ns, target_m in enumerate(targets_m)]
        return count_targets_outside(places, [Sent(time_ns, 0, measured, False) for time_ns in ticks_ns], config)

    assert count(0, way_m, 2 * way_m) == 0
    assert count(0, 2 * way_m) == 1 and count(0, 2 * way_m, ticks_ns=(0.5,)) == 0
    assert count(10) == 1  # outside the box
    assert count_targets_outside([Place(0, middle, middle), Place(1, middle + right, measured)], [], config) == 1
