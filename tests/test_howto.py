"""The how-to for a real robot: every command parses, every argument, file, key, state and topic that it names exists."""

import dataclasses
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from diwa_core.cli.main import build_parser
from diwa_core.config import load_yaml
from diwa_core.contract import Contract, ImageStream
from diwa_core.control.limits import MotionLimits
from diwa_core.control.robot_config import Collision, Gripper, Impedance, RobotConfig, Tool, load_robot_config
from diwa_core.sim.skills import SKILLS
from diwa_ros.franka_controller import FrankaController
from diwa_ros.gate import State
from diwa_ros.graph import load_graph, parse_assignments, select_nodes
from diwa_ros.recorder import MARKS
from diwa_ros.security import BACKENDS, NODES
from diwa_ros.teleop import Teleop

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "how-to" / "real-robot.md", ROOT / "docker" / "README.md"]
FOREIGN = ("sudo", "make", "source", "docker", "bash")  # looked at by hand, or by test_docker.py


def blocks(page, language):
    """Code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page):
    """(command as words, whether it stands in a block) of the whole page."""
    lines = [(line, True) for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    lines += [(code, False) for code in re.findall(r"`([^`]+)`", prose) if code.startswith(("diwa ", "python -m ", "ros2 ", "make "))]
    return [(shlex.split(line, comments=True), whole) for line, whole in lines]


def check_verb(words):
    """A verb that the prose mentions without its arguments."""
    with pytest.raises(SystemExit) as ended:
        build_parser(words[0]).parse_args([*words, "--help"])
    assert ended.value.code == 0, words


def check_diwa(words):
    """A whole `diwa` command, with the graph that it names."""
    args = build_parser(words[0]).parse_args(words)
    if words[0] in ("up", "security"):
        select_nodes(load_graph(args.graph).resolve(parse_assignments(args.assignments)), getattr(args, "only", ""))
        for name in getattr(args, "also", []):
            load_graph(name)
    for value in (getattr(args, "skill", None), *(getattr(args, "skills", None) or ())):
        assert not value or value in SKILLS, value


def check_module(words):
    """`python -m module`: that it exists and knows its options, or its parameters."""
    source = Path(importlib.util.find_spec(words[0]).origin).read_text()
    for word in words[1:]:
        if word.startswith("--") and word != "--ros-args":
            assert f'"{word}"' in source, word
    if words[0] == "diwa_ros.teleop":
        given = dict(word.split(":=") for word in words if ":=" in word)
        assert set(given) <= {parameter.name for parameter in Teleop.PARAMETERS}


def launch_arguments(file):
    """Names that a launch file declares."""
    source = (ROOT / "launch" / file).read_text()
    declared = set(re.findall(r'DeclareLaunchArgument\("(\w+)"', source))
    described = {argument.name for argument in load_graph("deploy").description.arguments} if file == "deploy.launch.py" else set()
    return declared | described


def check_ros2(words, contract):
    """A `ros2` command about something of ours."""
    verb, rest = words[0], words[1:]
    if verb == "launch":
        assert rest[0] == "diwa_ros" and (ROOT / "launch" / rest[1]).is_file()
        assert {word.split(":=")[0] for word in rest[2:]} <= launch_arguments(rest[1])
    elif verb == "action":
        assert rest[0] == "send_goal" and rest[1] in NODES["policy"].execute
        package, _, name = rest[2].split("/")
        goal = getattr(importlib.import_module(f"{package}.action"), name).Goal
        assert set(yaml.safe_load(rest[3])) <= set(goal.get_fields_and_field_types())
    elif verb == "param":
        module = importlib.import_module(f"diwa_ros.{rest[1].removeprefix('/')}")
        (parameter,) = (p for p in module.FakeFr3.PARAMETERS if p.name == rest[2])
        assert parameter.live and rest[3] in parameter.choices
    elif verb == "run":
        (topic,) = (word.split(":=")[1] for word in rest if word.startswith("image_raw:="))
        assert topic in {stream.topic for stream in contract.images}
    else:
        assert (verb, rest[0]) == ("security", "generate_policy")


@pytest.fixture
def contract(tmp_path):
    """That of the page."""
    (text,) = (block for block in blocks(PAGES[0], "yaml") if block.startswith("# cell/contract.yaml"))
    (tmp_path / "contract.yaml").write_text(text)
    return load_yaml(Contract, tmp_path / "contract.yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists_and_takes_these_arguments(page, contract):
    found = commands(page)
    for words, whole in found:
        if words[0] == "diwa":
            check_diwa(words[1:]) if whole else check_verb(words[1:])
        elif words[:2] == ["python", "-m"]:
            check_module(words[2:])
        elif words[0] == "ros2":
            check_ros2(words[1:], contract)
        elif words[0] == "cp":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] in ("mkdir", *FOREIGN), words
    assert page.name == "README.md" or len(found) > 40


def test_the_test_of_the_commands_can_fail(contract):
    for words in (["up", "deploy", "reel:=true"], ["up", "deploy", "--only", "arm"], ["record", "--skill", "fly"], ["robot", "dance"]):
        with pytest.raises((Exception, SystemExit)):
            check_diwa(words)
    for words in (["launch", "diwa_ros", "deploy.launch.py", "reel:=true"], ["action", "send_goal", "run_skil", "a/b/C", "{}"]):
        with pytest.raises(AssertionError):
            check_ros2(words, contract)


def test_the_robot_s_yaml_is_valid_at_every_step_and_the_actions_fit_the_limits(tmp_path, contract):
    steps = [yaml.safe_load(block) for block in blocks(PAGES[0], "yaml") if block.startswith("# cell/robot.yaml")]
    assert len(steps) == 2
    values, configs = yaml.safe_load((ROOT / "config" / "robot.yaml").read_text()), []
    for step in steps:
        for name, value in step.items():
            values[name] = values[name] | value if isinstance(value, dict) else value
        (tmp_path / "robot.yaml").write_text(yaml.safe_dump(values))
        configs.append(load_robot_config(tmp_path / "robot.yaml"))
    first, later = (config.motion for config in configs)
    assert first.max_speed_m_s < later.max_speed_m_s <= 0.25 and configs[0].realtime == "enforce" and not configs[0].reflex_recovery
    assert contract.max_delta_m * contract.rate_hz <= later.max_speed_m_s
    assert contract.max_delta_rad * contract.rate_hz <= later.max_speed_rad_s
    (speed,) = {float(speed) for speed in re.findall(r"speed:=([\d.]+)", PAGES[0].read_text())}
    assert speed * contract.max_delta_m * contract.rate_hz <= first.max_speed_m_s
    assert speed * contract.max_delta_rad * contract.rate_hz <= first.max_speed_rad_s


def known_names():
    """What may stand in backquotes with an underscore or a slash: keys, parameters, arguments, services, topics."""
    parts = (RobotConfig, Impedance, Tool, Collision, Gripper, MotionLimits, Contract, ImageStream)
    names = {field.name for part in parts for field in dataclasses.fields(part)} | {"limits"}
    names |= {parameter.name for parameter in FrankaController.PARAMETERS}
    names |= {argument.name for argument in load_graph("deploy").description.arguments}
    for access in (*NODES.values(), *BACKENDS.values()):
        names |= {name for field in access.fields() for name in field}
    return names | {MARKS, "sensor_msgs/Image", "cell/robot.yaml", "generate_policy"}


def test_every_key_state_topic_and_file_in_the_prose_exists():
    prose = re.sub(r"```.*?```", "", PAGES[0].read_text(), flags=re.DOTALL)
    states = {state.name for state in State}
    known = known_names()
    for code in re.findall(r"`([^`]+)`", prose):
        if re.fullmatch(r"[A-Z_, ]{4,}", code):
            assert set(code.split(", ")) <= states | {"SYS_NICE"}, code
        elif re.fullmatch(r"(config|docker|scripts|docs|launch|diwa_core|tests)/[\w./-]+", code):
            assert (ROOT / code).exists(), code
        elif re.fullmatch(r"[a-z]+[a-z0-9]*(_[a-z0-9]+)+|[a-z_]+/[a-z_/]+", code):
            assert code in known or code.startswith("runs/"), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_page_says_what_nobody_has_tried():
    text = PAGES[0].read_text()
    assert "What has never been tried" in text and "## What is not protected" in text and "## Checklist" in text
