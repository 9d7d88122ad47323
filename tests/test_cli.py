"""The command line: clear errors without tracebacks, verbs imported only when asked, the doctor's advice."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from diwa_core.cli import doctor, main, preflight
from diwa_core.cli.main import VERBS

ROOT = Path(__file__).parents[1]


def run_diwa(*words: str, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "diwa_core.cli.main", *words], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_explains_itself(verb: main.Verb, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main.main([verb.name, "--help"])
    assert end.value.code == 0
    assert verb.name in capsys.readouterr().out


def test_a_refusal_is_one_message_and_no_traceback() -> None:
    result = run_diwa("up", "deploy", "skil:=open_drawer")
    assert result.returncode == 2
    assert result.stderr.strip() == "diwa: unknown argument 'skil'. Did you mean 'skill'?"


def test_an_unknown_verb_lists_the_known_ones() -> None:
    result = run_diwa("uup")
    assert result.returncode == 2
    assert "up" in result.stderr and "Traceback" not in result.stderr


def test_starting_up_imports_no_heavy_library() -> None:
    code = "import sys; from diwa_core.cli import main; main.build_parser(None); print({'torch', 'rclpy', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_doctor_names_what_is_missing_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main.main(["doctor", "--checkpoints", str(tmp_path)]) == doctor.EXIT_MISSING
    lines = capsys.readouterr().out.splitlines()
    position = next(i for i, line in enumerate(lines) if line.startswith("MISSING policies"))
    assert "mend: git checkout checkpoints" in lines[position + 1]
    assert lines[-1] == "missing: world model, policies"


def test_doctor_is_content_when_everything_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "world_model").mkdir()
    (tmp_path / "policies" / "open_drawer").mkdir(parents=True)
    assert main.main(["doctor", "--checkpoints", str(tmp_path)]) == 0, capsys.readouterr().out


def test_doctor_tells_what_killed_nodes_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fastrtps_0123456789abcdef").write_bytes(bytes(3 << 20))
    assert "3 taken by nodes" in doctor.check_shared_memory(tmp_path).found
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 << 20))
    finding = doctor.check_shared_memory(tmp_path)
    assert not finding.ok and "5 MiB free" in finding.found and "rm -f" in finding.mend


def test_doctor_tells_an_import_that_fails() -> None:
    finding = doctor.check_import("no_such_module", "diwa")
    assert not finding.ok and "no_such_module" in finding.found and finding.mend == "make setup"


def test_preflight_names_a_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = preflight.check_compiler()
    assert not finding.ok and "build-essential" in finding.mend


def test_preflight_names_the_space_to_free(tmp_path: Path) -> None:
    finding = preflight.check_disk(tmp_path, needed_gib=1e6)
    assert not finding.ok and "GiB" in finding.mend and str(tmp_path) in finding.mend
    assert preflight.check_disk(tmp_path, needed_gib=0).ok


def test_setup_without_a_fit_python_is_one_sentence_with_the_command(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh")], env={"PATH": "/usr/bin:/bin", "PYTHON": "python9.9"}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "Python 3.11 is needed" in result.stderr and "apt-get install python3.11" in result.stderr and "python9.9" in result.stderr


def test_the_setup_is_repeated_when_and_only_when_its_inputs_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location("diwa_setup", ROOT / "scripts" / "setup.py")
    setup = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(setup)
    message = "ros2_ws/src/diwa_interfaces/msg/SimState.msg"
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup.py", "ros2_ws/src/diwa_ros/setup.cfg", message):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    places = {"ROOT": ".", "INTERFACES": "ros2_ws/src/diwa_interfaces", "KEY_FILE": "key", "__file__": "scripts/setup.py"}
    for constant, path in places.items():
        monkeypatch.setattr(setup, constant, tmp_path / path)
    setup.KEY_FILE.write_text(setup.setup_key())
    assert setup.is_finished(setup.setup_key())
    for name in ("constraints.txt", message, message.replace("SimState", "New")):
        with (tmp_path / name).open("a") as file:
            file.write("# changed")
        assert not setup.is_finished(setup.setup_key()), name
        setup.KEY_FILE.write_text(setup.setup_key())


def test_pins_cover_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = {item.split(">")[0].split("<")[0].split("=")[0].split("[")[0].lower() for group in groups for item in group}
    assert asked - pinned == set()
    assert "torch==2.13.0" in lines


def test_every_imported_package_is_a_declared_dependency() -> None:
    """What happens to be installed here may be missing on a fresh machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {item.split(">")[0].lower() for item in project["dependencies"]}
    aliases = {"cv2": "opencv-python-headless", "yaml": "pyyaml", "skimage": "scikit-image", "pybullet_data": "pybullet", "PIL": "pillow"}
    ours = {"diwa_core", "diwa_ros", "diwa_interfaces"}
    for file in [*(ROOT / "diwa_core").rglob("*.py"), *(ROOT / "ros2_ws/src/diwa_ros/diwa_ros").glob("*.py")]:
        for name in imported_packages(file) - sys.stdlib_module_names - ours:
            from_ros = name in ("rclpy", "cv_bridge") or name.endswith(("_msgs", "_srvs", "_interfaces"))
            optional = name in ("calvin_env", "hydra", "omegaconf", "pyarrow")  # the user's own checkout of CALVIN; the extra `export`
            optional |= name in ("franky", "franky_sim", "mujoco")  # the extra `franka`
            assert from_ros or optional or aliases.get(name, name) in declared, f"{file.relative_to(ROOT)} imports {name}"


def imported_packages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found
