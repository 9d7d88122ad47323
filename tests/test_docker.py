"""Containers: no engine runs here, so the scripts they run are run, and everything that images and compose files name is looked for."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from ros_support import private_environment
from test_access import is_loopback, listening_addresses

from diwa_core.cli.main import VERBS
from diwa_ros.teleop import Teleop

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
SCRIPTS = sorted(DOCKER.glob("*.sh"))
ROLES = ("robot", "policy", "recorder", "finetune", "teleop", "doctor", "operator")
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::-([^}]*))?\}")
WHEELS = pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "diwa").exists(), reason="the scripts take .venv, which is not here")


def instructions(path):
    """(instruction, rest) of a Dockerfile, continued lines joined, comments left out."""
    lines = re.sub(r"\\\n", " ", path.read_text()).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip() and not line.startswith("#")]


def settings():
    """Variables and values of example.env."""
    lines = (DOCKER / "example.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose():
    """compose.yaml with its merges done."""
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def run_host(*words, **variables):
    """docker/run_host.sh without what the tests' own environment says about the graph."""
    foreign = ("FAST", "ROS_", "DIWA_", "RMW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    command = ["bash", str(DOCKER / "run_host.sh"), *words]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, cwd="/", check=False)


# -- images ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(DOCKER.glob("*.Dockerfile")), ids=lambda path: path.name)
def test_what_an_image_copies_and_runs_is_there(path):
    found = instructions(path)
    declared = {rest.split("=")[0] for name, rest in found if name == "ARG"}
    assert next(name for name, _ in found if name != "ARG") == "FROM"
    for name, rest in found:
        assert set(re.findall(r"\$\{(\w+)\}", rest)) <= declared, rest
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
        scripts = re.findall(r"bash (\S+\.sh)", rest) if name == "RUN" else []
        if name == "ENTRYPOINT":
            scripts = [word for word in json.loads(rest) if word.endswith(".sh")]
        assert all((ROOT / script).is_file() for script in scripts), rest
    command = json.loads(dict(found)["CMD"])
    if command[0] == "ros2":
        assert command[:3] == ["ros2", "launch", "diwa_ros"] and (ROOT / "launch" / command[3]).is_file()
    else:
        assert dict(found)["ENTRYPOINT"] == '[".venv/bin/diwa"]' and command[0] in {verb.name for verb in VERBS}


def test_images_are_built_without_what_is_not_theirs():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", ".venv-ros", ".build", "data", "runs", "security"} <= set(ignored)  # no keys in an image
    needed = ("scripts", "docker", "diwa_core", "ros2_ws", "launch", "config", "checkpoints", "pyproject.toml", "constraints.txt")
    assert not any(name in ignored for name in needed) and all((ROOT / name).exists() for name in needed)


# -- scripts ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed_and_call_scripts_that_exist(script):
    subprocess.run(["bash", "-n", script], check=True)
    for name in re.findall(r"\b((?:docker|scripts)/\w+\.(?:sh|py))\b", script.read_text()):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("distribution", ["jazzy", "lyrical"])
def test_the_packages_of_a_distribution(distribution):
    environment = os.environ | {"ROS_DISTRO": distribution}
    command = ["bash", DOCKER / "ros_packages.sh", "--list", f"ros-{distribution}-v4l2-camera"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    # what the code asks an ordinary ROS 2 for: cv_bridge by images.py, joy by teleop.launch.py, the rest by the how-to
    for name in ("cv-bridge", "joy", "rosbag2", "sros2", "rmw-fastrtps-cpp", "v4l2-camera"):
        assert f"ros-{distribution}-{name}" in listed
    assert {"python3-venv", "build-essential", "iputils-ping"} <= set(listed)
    unnamed = {name: value for name, value in os.environ.items() if name != "ROS_DISTRO"}
    refused = subprocess.run(command, env=unnamed, capture_output=True, text=True, check=False)
    assert refused.returncode and "expected the name of a ROS 2 distribution" in refused.stderr


def test_a_machine_without_ros_is_told_what_is_missing():
    for script in ("enter_workspace.sh", "build_workspace.sh"):
        environment = os.environ | {"ROS_SETUP": "/nowhere/setup.bash"}
        done = subprocess.run(["bash", DOCKER / script, "true"], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "no ROS 2 found" in done.stderr and "ROS_SETUP" in done.stderr


def test_requirements_of_the_ros_path():
    def listed(*words):
        command = [sys.executable, ROOT / "scripts" / "requirements.py", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    everything = listed("dependencies", "franka").stdout.split("\n")
    assert {"pybullet", "torch", "zarr>=3", "franky-control"} <= set(everything)
    assert set(everything) - set(listed("--without", "pybullet", "dependencies", "franka").stdout.split("\n")) == {"pybullet"}
    for words, sentence in ((("frnka",), "found 'frnka'"), (("--without", "tree", "dependencies"), "found 'tree'")):
        refused = listed(*words)
        assert refused.returncode == 2 and sentence in refused.stderr


def test_the_hosts_need_no_simulation():
    """DIWA_SIMULATION=no: every program of run_host.sh imports without pybullet and MuJoCo."""
    nodes = ("franka_controller", "encoder", "policy", "recorder", "finetune", "teleop")
    modules = [*(f"diwa_ros.{node}" for node in nodes), *(f"diwa_core.cli.{verb}" for verb in ("up", "record", "swap", "doctor"))]
    hidden = "import sys; sys.modules.update(dict.fromkeys(('pybullet', 'pybullet_data', 'mujoco', 'franky_sim')))"
    code = f"{hidden}\nimport importlib\nfor name in {modules}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code], check=True)


@WHEELS
def test_each_host_starts_its_share_of_the_graph():
    contract = 'contract:="/cell/contract.yaml"'
    variables = {"DIWA_DRY_RUN": "yes", "DIWA_CHECKPOINTS": "/checkpoints", "DIWA_BAGS": "/bags", "DIWA_CONTRACT": "/cell/contract.yaml"}
    for role, nodes, words in (
        (
            "robot",
            ["franka_controller"],
            ['robot:="/cell/mine.yaml"', 'command_sources:="policy,teleop"', contract],
        ),
        ("policy", ["encoder", "policy"], ['world_model:="/checkpoints/world_model"', 'device:="cuda"']),
        ("recorder", ["recorder"], ['folder:="/bags"', "record_at_start:=false", contract]),
        ("finetune", ["finetune"], ['checkpoints:="/checkpoints"']),
    ):
        more = {"DIWA_ROBOT": "/cell/mine.yaml", "DIWA_COMMANDS_FROM": "policy,teleop", "DIWA_DEVICE": "cuda"}
        done = run_host(role, **variables, **more)
        assert done.returncode == 0, done.stderr
        assert re.findall(r"-m diwa_ros\.(\w+)", done.stdout) == nodes
        assert all(word in shlex.split(done.stdout) for word in words), done.stdout
    simulated = run_host("robot", **variables, DIWA_ROBOT="fake-fr3")
    assert re.findall(r"-m diwa_ros\.(\w+)", simulated.stdout) == ["fake_fr3", "franka_controller"]


@WHEELS
def test_what_belongs_to_the_hosts():
    teleop = run_host("teleop", DIWA_DRY_RUN="yes", DIWA_SKILL="open_drawer", DIWA_KEYSTORE="/keystore").stdout
    asked = dict(word.split(":=") for word in shlex.split(teleop) if ":=" in word)
    assert set(asked) <= {parameter.name for parameter in Teleop.PARAMETERS} and asked["source"] == "keyboard"
    assert "--enclave /teleop" in teleop
    assert run_host("doctor", DIWA_DRY_RUN="yes").stdout == "diwa doctor --robot config/robot.yaml\n"
    assert run_host("doctor", DIWA_DRY_RUN="yes", DIWA_ROBOT="fake-fr3").stdout == "diwa doctor --robot config/fake_fr3.yaml\n"
    seen = dict(line.split("=", 1) for line in run_host("operator", "env", DIWA_KEYSTORE="/keystore").stdout.splitlines() if "=" in line)
    assert seen["FASTRTPS_DEFAULT_PROFILES_FILE"] == seen["FASTDDS_DEFAULT_PROFILES_FILE"] == str(ROOT / "config" / "fastdds.xml")
    assert (seen["ROS_SECURITY_ENABLE"], seen["ROS_SECURITY_STRATEGY"]) == ("true", "Enforce")
    assert (seen["ROS_SECURITY_KEYSTORE"], seen["ROS_SECURITY_ENCLAVE_OVERRIDE"]) == ("/keystore", "/operator")


def test_a_host_refuses_what_it_should_not_do():
    for words, variables, sentence in (
        (["robt"], {}, "found 'robt'"),
        ([], {}, "found ''"),
        (["robot"], {"DIWA_ADDRESS": "192.168.1.10"}, "everybody on that network can command the arm"),
    ):
        refused = run_host(*words, **variables)
        assert refused.returncode == 2 and sentence in refused.stderr and not refused.stdout


# -- several machines ------------------------------------------------------------------------------------------------------------------


def make_profile(out, *words):
    command = [sys.executable, ROOT / "scripts" / "dds_profile.py", "--out", out, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def addresses(root, parent):
    (found,) = (element for element in root.iter() if element.tag.endswith("}" + parent))
    return [element.text for element in found.iter() if element.tag.endswith("}address")]


def test_a_profile_for_several_machines(tmp_path):
    out = tmp_path / "new" / "fastdds.xml"
    assert make_profile(out, "--address", "192.168.1.10", "--peers", "192.168.1.11", "192.168.1.12").returncode == 0
    root = ElementTree.parse(out).getroot()
    assert addresses(root, "interfaceWhiteList") == ["127.0.0.1", "192.168.1.10"]
    assert addresses(root, "initialPeersList") == ["127.0.0.1", "192.168.1.10", "192.168.1.11", "192.168.1.12"]
    shipped = (ROOT / "config" / "fastdds.xml").read_text()
    assert re.search(r"<segment_size>\d+", out.read_text())[0] == re.search(r"<segment_size>\d+", shipped)[0]
    for words in (["--address", "0.0.0.0"], ["--address", "robot"], ["--address", "10.0.0.1", "--peers", "239.1.1.1"]):
        refused = make_profile(tmp_path / "none.xml", *words)
        assert refused.returncode == 2 and "192.168.1.10" in refused.stderr and not (tmp_path / "none.xml").exists()


def own_address():
    """This machine's address in the network of its default route, or the loopback; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


NODE = """
import rclpy, sys, time
from std_msgs.msg import String
rclpy.init()
node = rclpy.create_node(sys.argv[1])
heard = []
node.create_subscription(String, "there", heard.append, 10)
publisher = node.create_publisher(String, "there", 10)
print("ready", flush=True)
end = time.monotonic() + 100
while not any(message.data != sys.argv[1] for message in heard) and time.monotonic() < end:
    publisher.publish(String(data=sys.argv[1]))
    rclpy.spin_once(node, timeout_sec=0.1)
print("heard" if heard else "silence", flush=True)
sys.stdin.read()
"""


def test_nodes_with_that_profile_find_each_other_and_bind_to_it_alone(tmp_path):
    own, profile = own_address(), tmp_path / "fastdds.xml"
    assert make_profile(profile, "--address", own).returncode == 0
    environment = {**os.environ, **private_environment()}
    environment |= dict.fromkeys(("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"), str(profile))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    nodes = [subprocess.Popen([sys.executable, "-c", NODE, name], env=environment, **pipes) for name in ("one", "other")]
    try:
        assert [node.stdout.readline() for node in nodes] == ["ready\n"] * 2
        assert [node.stdout.readline() for node in nodes] == ["heard\n"] * 2
        mine = "".join(f"{byte:02X}" for byte in reversed(socket.inet_aton(own)))
        sockets = listening_addresses(nodes[0].pid)
        assert sockets and [found for found in sockets if not is_loopback(*found) and not found[1].endswith(mine)] == []
    finally:
        for node in nodes:
            node.communicate()


# -- compose ---------------------------------------------------------------------------------------------------------------------------


def test_every_service_runs_a_role_that_exists():
    services = compose()["services"]
    assert set(services) == set(ROLES)
    for name, service in services.items():
        assert service["entrypoint"] == ["bash", "docker/run_host.sh"] and service["command"][0] == name
        build = service["build"]
        context = (DOCKER / build["context"]).resolve()
        assert context == ROOT and (context / build["dockerfile"]).is_file()
        declared = {rest.split("=")[0] for kind, rest in instructions(context / build["dockerfile"]) if kind == "ARG"}
        assert set(build["args"]) <= declared
    gpu = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())["services"]
    assert set(gpu) == {"policy"}


def test_only_the_robot_s_side_is_privileged_and_nothing_begins_by_itself():
    for name, service in compose()["services"].items():
        assert service["network_mode"] == "host" and service["ipc"] == "host" and service["restart"] == "no"
        assert not {"privileged", "ports", "pid", "devices"} & set(service)
        if name in ("robot", "doctor"):
            assert service["cap_add"] == ["SYS_NICE"] and service["ulimits"] == {"rtprio": 99, "memlock": 100 * 2**20}
        else:
            assert "cap_add" not in service and "ulimits" not in service
        assert all(volume.endswith(":ro") for volume in service["volumes"] if ":/cell" in volume or ":/keystore" in volume)


def test_every_variable_is_explained_used_and_has_one_default():
    text = (DOCKER / "compose.yaml").read_text()
    asked: dict[str, set] = {}
    for name, default in VARIABLE.findall(text):
        asked.setdefault(name, set()).add(default)
    explained = settings()
    assert set(asked) == set(explained)
    for name, defaults in asked.items():
        assert defaults == {explained[name]}, name
    read = set(re.findall(r"DIWA_[A-Z_]+", (DOCKER / "run_host.sh").read_text()))
    passed = set(compose()["services"]["robot"]["environment"])
    assert passed - {"ROS_DOMAIN_ID"} == read - {"DIWA_DRY_RUN"}


def test_volumes_exist_and_hold_what_the_variables_name():
    for service in compose()["services"].values():
        inside = set()
        for volume in service["volumes"]:
            source, target = VARIABLE.sub(lambda match: match[2], volume).removesuffix(":ro").split(":")
            assert target not in inside
            inside.add(target)
            folder = (DOCKER / source).resolve()
            assert folder.is_dir() or {ROOT / "runs", ROOT / "security"} & {folder, *folder.parents}, volume
        for value in service["environment"].values():
            path = VARIABLE.sub(lambda match: match[2] or "", value)
            if path.startswith("/") and service["command"][0] in ("robot", "policy"):
                assert any(path.startswith(target) for target in inside | {"/bags"}), value
        assert {"/diwa/runs", "/keystore"} <= inside
