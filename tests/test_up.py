"""Running a graph: order, deaths, stubborn nodes, orphans. The nodes are real processes, written for each test."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ros_support import private_environment

from diwa_ros import up
from diwa_ros.graph import Process
from diwa_ros.up import GraphRunner

SLEEPS = "import time; print('ready', flush=True); time.sleep(60)"
NOTES_END = """
import signal, sys, time, pathlib
def end(*_):
    with open({path!r}, 'a') as notes: notes.write({name!r} + '\\n')
    sys.exit(0)
signal.signal(signal.SIGINT, end)
print('ready', flush=True)
time.sleep(60)
"""
IGNORES = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
print('ready', flush=True)
time.sleep(60)
"""


def make_runner(folder: Path, programs: dict[str, str], optional: tuple[str, ...] = ()) -> tuple[GraphRunner, list]:
    heard: list[tuple[str, str]] = []
    processes = [Process(name, name, "", name not in optional, {}, {}, {}) for name in programs]
    command = {name: [sys.executable, "-S", "-c", program] for name, program in programs.items()}
    return GraphRunner(processes, folder, lambda name, line: heard.append((name, line)), lambda p: command[p.name]), heard


def await_true(condition: object, limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "not within the time limit"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nodes_stop_in_reverse_order_and_end_well(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    programs = {name: NOTES_END.format(path=str(notes), name=name) for name in ("bridge", "controller", "policy")}
    runner, heard = make_runner(tmp_path, programs)
    with runner:
        await_true(lambda: len(heard) == 3)
        codes = runner.stop()
    assert notes.read_text().split() == ["policy", "controller", "bridge"]
    assert codes == {"bridge": 0, "controller": 0, "policy": 0}
    assert (tmp_path / "policy.log").read_text() == "ready\n"


def test_a_death_is_told_with_name_code_and_last_words(tmp_path: Path) -> None:
    runner, _ = make_runner(tmp_path, {"bridge": SLEEPS, "encoder": "import sys; print('no camera'); sys.exit(3)"})
    with runner:
        death = runner.wait(lambda: False)
        pids = runner.pids
    assert (death.name, death.code, death.last_lines) == ("encoder", 3, ("no camera",))
    assert death.sentence.startswith("node 'encoder' ended with exit code 3") and str(tmp_path / "encoder.log") in death.sentence
    assert not any(map(is_alive, pids.values()))


def test_a_signal_is_called_by_its_name(tmp_path: Path) -> None:
    runner, _ = make_runner(tmp_path, {"encoder": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"})
    with runner:
        assert "signal SIGSEGV" in runner.wait(lambda: False).sentence


def test_an_ordinary_end_of_a_required_node_counts_as_a_death(tmp_path: Path) -> None:
    runner, _ = make_runner(tmp_path, {"bridge": SLEEPS, "encoder": "pass"})
    with runner:
        assert runner.wait(lambda: False).code == 0


def test_the_graph_goes_on_without_an_optional_node(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner, _ = make_runner(tmp_path, {"bridge": SLEEPS, "recorder": "raise SystemExit(4)"}, optional=("recorder",))
    with runner:
        assert runner.wait(lambda: "goes on without it" in caplog.text) is None
        assert is_alive(runner.pids["bridge"])


def test_a_stubborn_node_is_killed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ((signal.SIGINT, 0.2), (signal.SIGTERM, 0.2), (signal.SIGKILL, 5.0))
    monkeypatch.setattr(up, "STOP_STEPS", steps)
    runner, heard = make_runner(tmp_path, {"controller": SLEEPS, "policy": IGNORES})
    with runner:
        await_true(lambda: len(heard) == 2)
        start = time.monotonic()
        codes = runner.stop()
    assert codes == {"controller": -signal.SIGINT, "policy": -signal.SIGKILL}
    assert time.monotonic() - start < 3.0


def test_a_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    runner, heard = make_runner(tmp_path, {"policy": IGNORES})
    with runner:
        await_true(lambda: heard)
        start = time.monotonic()
        assert runner.stop(lambda: True) == {"policy": -signal.SIGKILL}
    assert time.monotonic() - start < 1.0


def test_what_a_node_leaves_behind_is_swept(tmp_path: Path) -> None:
    spawns = f"import subprocess, time; print(subprocess.Popen([{sys.executable!r}, '-c', {SLEEPS!r}]).pid, flush=True); time.sleep(60)"
    runner, heard = make_runner(tmp_path, {"bridge": spawns})
    with runner:
        await_true(lambda: heard)
        grandchild = int(heard[0][1])
        assert is_alive(grandchild)
    await_true(lambda: not is_alive(grandchild), 3.0)


def test_no_orphans_when_the_parent_is_killed(tmp_path: Path) -> None:
    """The parent gets SIGKILL and can do nothing: the kernel ends the nodes."""
    parent = f"""
import sys, time
from diwa_ros.graph import Process
from diwa_ros.up import GraphRunner
command = [sys.executable, "-S", "-c", {SLEEPS!r}]
runner = GraphRunner([Process("n", "n", "", True, {{}}, {{}}, {{}})], {str(tmp_path)!r}, command=lambda process: command)
runner.start()
print(runner.pids["n"], flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    node = int(process.stdout.readline())
    await_true(lambda: (tmp_path / "n.log").exists() and "ready" in (tmp_path / "n.log").read_text())
    process.kill()
    process.wait()
    process.stdout.close()
    await_true(lambda: not is_alive(node), 3.0)


def start_up(folder: Path, *words: str) -> subprocess.Popen:
    environment = {**os.environ, **private_environment()}
    command = [sys.executable, "-m", "diwa_core.cli.main", "up", *words, "--log-dir", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_diwa_up_tells_which_node_failed_and_why(tmp_path: Path) -> None:
    process = start_up(tmp_path, f"checkpoint:={tmp_path}/none")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert any(f"node '{name}' ended with exit code 1" in output for name in ("encoder", "policy"))
    assert "The other nodes were stopped" in output and f"{tmp_path}/none" in output


def test_diwa_up_stops_on_ctrl_c(tmp_path: Path) -> None:
    description = tmp_path / "bridge.yaml"
    description.write_text("nodes:\n  - name: calvin_bridge\n    parameters: {mode: lockstep}\n")
    process = start_up(tmp_path, str(description))
    log = tmp_path / "calvin_bridge.log"
    await_true(lambda: log.exists() and "active" in log.read_text(), 30.0)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output
    assert output.rstrip().endswith("diwa up: stopped")
