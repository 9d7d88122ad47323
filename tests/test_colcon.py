"""Both ROS packages build with colcon, as a user with an ordinary ROS 2 builds them, and install what ros2 run and ros2 launch look for."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ROOT / "ros2_ws" / "src"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_workspace_builds(tmp_path: Path) -> None:
    prefix = Path(sys.prefix)
    fix = PACKAGES / "diwa_interfaces" / "drop_missing_includes.cmake"
    command = [prefix / "bin" / "colcon", "--log-base", tmp_path / "log", "build", "--base-paths", PACKAGES]
    command += ["--build-base", tmp_path / "build", "--install-base", tmp_path / "install"]
    command += ["--cmake-args", "-GNinja", f"-DCMAKE_PROJECT_INCLUDE={fix}", "-DBUILD_TESTING=OFF"]
    foreign = ("PYTHONPATH", "LD_LIBRARY_PATH", "_ROS_WHEELS_BOOTSTRAP_COMPLETE")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    environment |= {"AMENT_PREFIX_PATH": str(prefix), "CMAKE_PREFIX_PATH": str(prefix), "PATH": f"{prefix / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    share = tmp_path / "install" / "diwa_ros" / "share" / "diwa_ros"
    assert (share / "launch" / "deploy.launch.py").is_file()
    descriptions = {path.name for path in (ROOT / "config").iterdir() if path.suffix in (".yaml", ".xml")}
    assert {path.name for path in (share / "config").iterdir()} == descriptions
    settings = configparser.ConfigParser()
    settings.read(PACKAGES / "diwa_ros" / "setup.cfg")
    programs = {line.split(" = ")[0] for line in settings["options.entry_points"]["console_scripts"].split("\n") if line}
    assert {path.name for path in (tmp_path / "install" / "diwa_ros" / "lib" / "diwa_ros").iterdir()} == programs

    code = "import diwa_interfaces.msg as msg, diwa_ros.graph as graph; print(msg.__file__, graph.config_folder()); msg.SimState()"
    sourced = f'. {tmp_path}/install/setup.sh && exec {sys.executable} -c "{code}"'
    used = subprocess.run(["sh", "-c", sourced], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True).stdout.split()
    assert all(path.startswith(str(tmp_path / "install")) for path in used), used
