"""One thread per process: the tests' processes share two cores, and threads that wait for each other there wait long."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and inherited by every process a test starts

# Graphs and a simulated robot on the wall clock of a machine that may be busy: tried once more before they count as failed.
ON_THE_CLOCK = ("test_access", "test_demo", "test_faults", "test_finetune_node", "test_franka_", "test_graph", "test_loop", "test_ros_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on the clock; the report still names every second try."""
    for item in items:
        if item.path.name.startswith(ON_THE_CLOCK):
            item.add_marker(pytest.mark.flaky(reruns=1, reruns_delay=5))
