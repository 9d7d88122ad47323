"""`diwa robot` on a running graph: what a person without the ros2 command line has in the hand."""

import os
import re
import signal
import subprocess
import sys

import pytest
from ros_support import make_checkpoints, make_graph, private_graph

from diwa_core.cli.main import main

ROBOT = (sys.executable, "-m", "diwa_core.cli.main", "robot")
pytestmark = pytest.mark.timeout(900)  # seconds of work, which a busy machine may stretch
PATIENCE = ("--timeout", "150")  # of a busy machine


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """The deployed graph in lock-step."""
    checkpoints = make_checkpoints(tmp_path_factory.mktemp("checkpoints"))
    with private_graph(), make_graph(checkpoints, tmp_path_factory.mktemp("logs"), mode="lockstep", skill="turn_on_led"):
        yield


def ask(*words):
    """(exit code, what it printed) in a process of its own, as a person starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "diwa_core.cli.main", "robot", *words, *PATIENCE], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_stop_and_resume(graph):
    code, said = ask("stop")
    assert code == 0 and said.startswith("stopped\nUSER_STOPPED (calvin)")
    code, said = ask("resume")
    assert code == 0 and said.startswith("resumed\nIDLE (calvin)")
    code, said = ask("resume")
    assert code == 2 and "expected FAULT or USER_STOPPED, found IDLE" in said


def test_a_run_of_a_skill_its_refusal_and_its_end_by_the_operator(graph):
    code, said = ask("run", "turn_on_led", "--max-steps", "8")
    assert code == 0 and re.search(r": 8 steps, policy [0-9a-f]{16}", said), said
    code, said = ask("run", "fly")
    assert code == 2 and "refused 'fly'" in said
    keeps_ctrl_c = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    command = [*ROBOT, "run", "turn_on_led", "--max-steps", "100000", *PATIENCE]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=keeps_ctrl_c)
    while not ask("status")[1].startswith("ACTIVE"):
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    assert running.wait(150) == 1 and "steps" in running.stdout.read()
    running.stdout.close()
    assert ask("status")[1].startswith("IDLE")


def test_what_makes_no_sense_is_refused(capsys):
    for words in (["robot", "run"], ["robot", "stop", "open_drawer"]):
        assert main(words) == 2
    assert "expected a skill with run" in capsys.readouterr().err
    environment = os.environ | {"ROS_DOMAIN_ID": "93"}
    alone = subprocess.run([*ROBOT, "status", "--timeout", "0.5"], env=environment, capture_output=True, text=True, check=False)
    assert alone.returncode == 2 and "Is the graph up" in alone.stderr
