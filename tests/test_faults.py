"""The fault matrix: whatever goes wrong, the arm is held, nothing outside the limits goes out, the state says so, and it can go on.

Times are printed by `python benchmarks/faults.py`; here only what must hold on the slowest machine is asserted.
"""

import numpy as np
import pytest
from fault_matrix import faults_of
from fault_rig import RIGS, Sent, count_outside, make_fault_checkpoints
from ros_support import private_graph

CASES = [(backend, fault) for backend in RIGS for fault in faults_of(backend)]


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
    assert outcome.resumed_by


def test_what_counts_as_outside_the_limits():
    good = np.array([0.5, 0, 0, 0, 0, 0, 1], np.float32)
    bad = [good * 2, good + np.float32(np.nan), good * np.array([1, 1, 1, 1, 1, 1, 0.5])]
    assert count_outside([Sent(0, 1, good, False), Sent(0, 2, good, False)]) == 0
    assert count_outside([Sent(0, stamp, action, False) for stamp, action in enumerate(bad)]) == 3
    assert count_outside([Sent(0, 1, good, False), Sent(0, 1, good, False)]) == 1
