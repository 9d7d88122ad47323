"""The fault matrix: whatever goes wrong, the arm is held, nothing outside the limits goes out, the state says so, and it can go on.

Times are printed by `python benchmarks/faults.py`; here only what must hold on the slowest machine is asserted.
"""

import numpy as np
import pytest
from fault_rig import FAULTS, RIGS, Sent, count_outside, make_fault_checkpoints
from ros_support import private_graph


@pytest.fixture(scope="module")
def rigs(tmp_path_factory):
    """One running graph per backend, started when it is first asked for."""
    started = {}
    checkpoints = make_fault_checkpoints(tmp_path_factory.mktemp("checkpoints"))
    with private_graph():

        def get(backend):
            if backend not in started:
                started[backend] = RIGS[backend](checkpoints, tmp_path_factory.mktemp("logs"))
            return started[backend]

        yield get
        for rig in started.values():
            rig.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("backend", RIGS)
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_the_arm_is_held_says_so_and_goes_on(rigs, fault, backend):
    rig = rigs(backend)
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
