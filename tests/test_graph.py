"""The graph description: errors that name the mistake, types that survive, and one graph for both command lines."""

import importlib.util
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diwa_core.errors import ConfigError
from diwa_ros.graph import Graph, Process, load_graph, parse_assignments, select_nodes
from diwa_ros.node import COMMON_PARAMETERS

ROOT = Path(__file__).parents[1]
TEXT = st.text(st.characters(categories=("L", "N", "P", "S"), include_characters=" "), max_size=20)


def write(folder: Path, **changes: object) -> str:
    description = {
        "arguments": [{"name": "sim", "default": True, "help": "simulated"}, {"name": "rate", "default": 30.0, "help": "hertz"}],
        "nodes": [{"name": "bridge", "when": "sim", "parameters": {"rate_hz": "$(rate)"}}, {"name": "encoder"}],
        **changes,
    }
    path = folder / "graph.yaml"
    path.write_text(yaml.safe_dump(description))
    return str(path)


def test_the_shipped_graph_has_a_program_for_every_node() -> None:
    graph = load_graph("deploy")
    for sim in (True, False):
        processes = graph.resolve({"sim": sim})
        assert [p.name for p in processes][-2:] == ["encoder", "policy"]
        assert ("calvin_bridge" in {p.name for p in processes}) == sim
        assert all(importlib.util.find_spec(f"diwa_ros.{p.executable}") for p in processes)
        assert all(Path(p.environment["FASTDDS_DEFAULT_PROFILES_FILE"]).is_file() for p in processes)


def test_the_shipped_parameters_are_declared_by_their_nodes() -> None:
    for sim in (True, False):
        for process in load_graph("deploy").resolve({"sim": sim}):
            module = importlib.import_module(f"diwa_ros.{process.executable}")
            classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
            tables = [item.PARAMETERS for item in classes if hasattr(item, "PARAMETERS")]
            declared = {parameter.name: parameter.default for parameter in (*COMMON_PARAMETERS, *tables[0])}
            assert set(process.parameters) <= set(declared), process.name
            assert all(type(value) is type(declared[name]) for name, value in process.parameters.items()), process.name


def test_an_unknown_node_key_is_answered_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'executabel'\. Did you mean 'executable'\?"):
        load_graph(write(tmp_path, nodes=[{"name": "encoder", "executabel": "encoder"}]))


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([{"name": "a", "when": "simm"}], r"a\.when: unknown argument 'simm'\. Did you mean 'sim'\?"),
        ([{"name": "a", "when": "rate"}], r"a\.when: expected an argument that is true or false"),
        ([{"name": "a", "parameters": {"x": "$(rat)"}}], r"a\.x: unknown argument 'rat'\. Did you mean 'rate'\?"),
        ([{"name": "a", "environment": {"X": "$(file:none.xml)"}}], r"a\.X: no file 'none\.xml'"),
        ([{"name": "a"}, {"name": "a"}], "node 'a' is there twice"),
        ([], "expected at least one node"),
        ([{"name": "a", "parameters": [1]}], "expected a mapping"),
    ],
)
def test_mistakes_in_a_description(tmp_path: Path, nodes: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_graph(write(tmp_path, nodes=nodes))


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    graph = load_graph(write(tmp_path))
    for given_words, message in (
        (["sim:=maybe"], "argument 'sim': expected bool, found 'maybe'"),
        (["rate:=fast"], "argument 'rate': expected float"),
        (["sim=true"], "expected name:=value, found 'sim=true'"),
        (["smi:=true"], "Did you mean 'sim'"),
    ):
        with pytest.raises(ConfigError, match=message):
            graph.resolve(parse_assignments(given_words))
    with pytest.raises(ConfigError, match="Did you mean 'deploy'"):
        load_graph("deplyo")


def test_conditions_and_references(tmp_path: Path) -> None:
    graph = load_graph(write(tmp_path))
    bridge, encoder = graph.resolve({"rate": "15"})
    assert bridge.parameters == {"rate_hz": 15.0} and type(bridge.parameters["rate_hz"]) is float
    assert [p.name for p in graph.resolve({"sim": "false"})] == ["encoder"]
    assert encoder.ros_arguments == ["-r", "__node:=encoder"]


def test_some_of_the_nodes_and_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = load_graph("deploy").resolve({"real": True})
    assert [p.name for p in select_nodes(processes, "policy, encoder")] == ["encoder", "policy"]
    assert select_nodes(processes, "") == processes
    with pytest.raises(ConfigError, match=r"found 'polcy'\. Did you mean 'policy'\?"):
        select_nodes(processes, "encoder,polcy")
    assert "--enclave" not in processes[0].ros_arguments
    monkeypatch.setenv("ROS_SECURITY_ENABLE", "true")
    assert processes[0].ros_arguments[-2:] == ["--enclave", "/franka_controller"]


def test_what_the_user_exported_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "user")
    monkeypatch.delenv("OTHER", raising=False)
    (process,) = load_graph(write(tmp_path, environment={"MINE": "file", "OTHER": "file"})).resolve({"sim": False})
    assert process.extra_environment == {"OTHER": "file"}


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
        max_size=4,
    )
)
def test_command_line_values_keep_type_and_value(parameters: dict) -> None:
    words = Process("n", "n", "", True, parameters, {}, {}).ros_arguments[2:]
    read = dict(word.split(":=", 1) for word in words[1::2])
    assert {name: (type(value), value) for name, value in parameters.items()} == {
        name: (type(value := yaml.safe_load(text)), value) for name, text in read.items()
    }


def test_launch_derives_the_same_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs where launch and launch_ros are: an ordinary ROS 2, or their sources beside the wheels."""
    launch = pytest.importorskip("launch")
    pytest.importorskip("launch_ros")
    monkeypatch.setenv("AMENT_PREFIX_PATH", os.environ.get("AMENT_PREFIX_PATH", str(ROOT / ".venv")))
    spec = importlib.util.spec_from_file_location("deploy_launch", ROOT / "launch" / "deploy.launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for sim in ("true", "false"):
        context = launch.LaunchContext()
        words = {"sim": sim, "skill": "turn_on_led", "seed": "7"}
        for entity in module.generate_launch_description().entities:
            if isinstance(entity, launch.actions.DeclareLaunchArgument):
                context.launch_configurations.setdefault(entity.name, words.get(entity.name, ""))
                if entity.name not in words:
                    context.launch_configurations[entity.name] = launch.utilities.perform_substitutions(context, entity.default_value)
        derived = [describe_launch_node(node, context) for node in module.to_actions(context)]
        assert derived == [describe_process(process) for process in load_graph("deploy").resolve(words)]


def describe_process(process: Process) -> tuple:
    return process.name, process.executable, process.required, dict(process.parameters), dict(process.extra_environment)


def describe_launch_node(node: object, context: object) -> tuple:
    from launch.utilities import normalize_to_list_of_substitutions, perform_substitutions
    from launch_ros.utilities import evaluate_parameters

    node._perform_substitutions(context)
    (parameters,) = evaluate_parameters(context, node._Node__parameters)
    environment = {perform_substitutions(context, k): perform_substitutions(context, v) for k, v in node.additional_env}
    executable = perform_substitutions(context, normalize_to_list_of_substitutions(node.node_executable))
    return node.node_name.lstrip("/"), executable, node._ExecuteLocal__on_exit is not None, parameters, environment


def test_a_description_needs_no_arguments(tmp_path: Path) -> None:
    graph = load_graph(write(tmp_path, arguments=[], nodes=[{"name": "encoder"}]))
    assert isinstance(graph, Graph) and [p.executable for p in graph.resolve()] == ["encoder"]
