"""For verbs that speak to a graph that runs already."""

from __future__ import annotations

import os

from diwa_core.errors import SetupError


def find_running_graph() -> None:
    """Set the environment in which `diwa up deploy` starts its nodes, so that clients meet them; raises SetupError without ROS nodes."""
    try:
        import rclpy  # noqa: F401 (the clients need it)

        from diwa_ros.graph import load_graph
    except ImportError as error:
        raise SetupError(f"the ROS nodes are not installed ({error}). Mend: make setup, or source the workspace.") from error
    for process in load_graph("deploy").resolve():
        os.environ.update(process.extra_environment)
