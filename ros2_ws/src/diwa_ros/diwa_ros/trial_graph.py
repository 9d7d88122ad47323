"""The deployed graph as trials need it: one list of processes for `diwa evaluate robot` and for launch. Pure Python, as diwa_ros.graph."""

from __future__ import annotations

from pathlib import Path

from diwa_ros.graph import Process, load_graph

NODE = "evaluator"  # the name under which trials command the arm to its start


def trial_graph(checkpoint: str | Path, robot: str = "", real_time: bool = False, bags: str = "") -> list[Process]:
    """The processes of the deployed graph as trials need it, for launch and `diwa evaluate robot` alike. robot: empty for simulation.

    A watchdog event must not bring another policy back in the middle of a trial, so no swap is on probation. bags: folder for a recorder.
    """
    mode = "real_time" if robot or real_time else "lockstep"
    where = {"real": True, "robot": robot} if robot else {"sim": True}
    contract = Path(checkpoint) / "world_model" / "contract.yaml"  # cameras and steps of the robot that it was trained for
    if robot and contract.is_file():
        where["contract"] = str(contract)
    processes = load_graph("deploy").resolve({**where, "mode": mode, "checkpoint": str(checkpoint), "commands_from": f"policy, {NODE}"})
    for process in processes:
        if process.name == "policy":
            process.parameters["probation_s"] = 0.0
    if bags:
        recorded = {"contract": where["contract"]} if "contract" in where else {}
        processes += load_graph("record").resolve({"folder": bags, "record": False, "mode": mode, **recorded})
    return processes


def trial_command(checkpoint: str, robot: str, real_time: bool, bags: str) -> list[str]:
    """What follows `python` to run trials on that graph from outside it."""
    where = ["--on", "robot", "--robot", robot] if robot else ["--on", "simulation"]
    where += ["--real-time"] if real_time else []
    where += ["--bags", bags] if bags else []
    return ["-m", "diwa_core.cli.main", "evaluate", "robot", "--attach", "--checkpoint", checkpoint, *where]
