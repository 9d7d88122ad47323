"""The graph description: which processes run, with which parameters. `diwa up` and the launch file both read it here.

Pure Python without rclpy or launch, so that both command lines derive the same list of processes.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diwa_core.config import load_yaml
from diwa_core.errors import ConfigError

_REFERENCE = re.compile(r"\$\((file:)?([^()]+)\)")


@dataclass(frozen=True)
class Argument:
    """Something the user may set with name:=value. Its type is that of the default."""

    name: str
    default: Any
    help: str


@dataclass(frozen=True)
class NodeDescription:
    """One node. `executable` is a module of diwa_ros, the name if empty.

    `when`: what must hold, joined by 'and': 'argument', 'not argument' (true or false ones) or 'argument == value'.
    """

    name: str
    executable: str = ""
    when: str = ""
    required: bool = True
    parameters: dict[str, Any] = field(default_factory=dict)
    remaps: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphDescription:
    """A description file."""

    nodes: tuple[NodeDescription, ...]
    arguments: tuple[Argument, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    namespace: str = ""


@dataclass(frozen=True)
class Process:
    """One node, ready to start. If a required one ends, the graph ends."""

    name: str
    executable: str
    namespace: str
    required: bool
    parameters: dict[str, Any]
    remaps: dict[str, str]
    environment: dict[str, str]

    @property
    def enclave(self) -> list[str]:
        """What follows --ros-args to name the node's keys, where SROS 2 is on."""
        return enclave_arguments(self.namespace, self.name)

    @property
    def ros_arguments(self) -> list[str]:
        """What follows --ros-args; values keep their type: strings are quoted."""
        rules = [f"__node:={self.name}"]
        rules += [f"__ns:={self.namespace}"] if self.namespace else []
        rules += [f"{old}:={new}" for old, new in self.remaps.items()]
        values = [f"{name}:={_to_yaml(value)}" for name, value in self.parameters.items()]
        return [*(word for rule in rules for word in ("-r", rule)), *(word for value in values for word in ("-p", value)), *self.enclave]

    @property
    def extra_environment(self) -> dict[str, str]:
        """Variables to set: those of the description that the user has not exported."""
        return {name: value for name, value in self.environment.items() if name not in os.environ}


class Graph:
    """A checked description and the folder whose files it may name."""

    def __init__(self, description: GraphDescription, folder: Path) -> None:
        """Raises ConfigError on names used twice and on conditions and references that name no argument."""
        self.description = description
        self.folder = folder
        _check_unique("argument", [argument.name for argument in description.arguments])
        self.resolve()

    def resolve(self, given: Mapping[str, Any] | None = None) -> list[Process]:
        """Processes in starting order for the given arguments (strings or values). Raises ConfigError on an unknown one or a wrong type."""
        values = {argument.name: argument.default for argument in self.description.arguments}
        for name, value in (given or {}).items():
            values[name] = self._read_argument(name, value)
        processes = [self._process(node, values) for node in self.description.nodes if self._is_wanted(node, values)]
        _check_unique("node", [process.name for process in processes])
        if not processes:
            raise ConfigError("graph description: expected at least one node, found none.")
        return processes

    def _process(self, node: NodeDescription, values: dict[str, Any]) -> Process:
        environment = {**self.description.environment, **node.environment}
        return Process(
            name=node.name,
            executable=node.executable or node.name,
            namespace=self.description.namespace,
            required=node.required,
            parameters={name: self._fill(value, values, f"{node.name}.{name}") for name, value in node.parameters.items()},
            remaps=dict(node.remaps),
            environment={name: str(self._fill(value, values, f"{node.name}.{name}")) for name, value in environment.items()},
        )

    def _is_wanted(self, node: NodeDescription, values: dict[str, Any]) -> bool:
        if not node.when:
            return True
        return all(self._holds(term.strip(), values, f"{node.name}.when") for term in node.when.split(" and "))

    def _holds(self, term: str, values: dict[str, Any], where: str) -> bool:
        name, is_comparison, wanted = (word.strip() for word in term.partition("=="))
        if is_comparison:
            return str(self._value(name, values, where)) == wanted
        name = term.removeprefix("not ")
        value = self._value(name, values, where)
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: expected an argument that is true or false, found '{name}' = {value!r}.")
        return value != term.startswith("not ")

    def _fill(self, text: Any, values: dict[str, Any], where: str) -> Any:
        """Replace references. A text that is one reference takes the argument's type."""
        if not isinstance(text, str):
            return text
        whole = _REFERENCE.fullmatch(text)
        if whole and not whole[1]:
            return self._value(whole[2], values, where)
        return _REFERENCE.sub(lambda m: str(self._file(m[2], where) if m[1] else self._value(m[2], values, where)), text)

    def _file(self, name: str, where: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise ConfigError(f"{where}: no file '{name}' in {self.folder}.")
        return path

    def _value(self, name: str, values: dict[str, Any], where: str) -> Any:
        if name not in values:
            raise ConfigError(f"{where}: unknown argument '{name}'.{_suggest(name, values)}")
        return values[name]

    def _read_argument(self, name: str, value: Any) -> Any:
        """Convert a command-line string to the type of the argument's default."""
        defaults = {argument.name: argument.default for argument in self.description.arguments}
        if name not in defaults:
            raise ConfigError(f"unknown argument '{name}'.{_suggest(name, defaults)}")
        wanted = type(defaults[name])
        if isinstance(value, str) and wanted is not str:
            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ConfigError(f"argument '{name}': expected {wanted.__name__}, found '{value}'.") from error
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise ConfigError(f"argument '{name}': expected {wanted.__name__}, found {value!r}.")
        return value


def select_nodes(processes: list[Process], names: str) -> list[Process]:
    """Those named in 'encoder,policy', in starting order; all when it is empty. Raises ConfigError on a name that is not there."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [process.name for process in processes]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"only: expected nodes of this graph, found '{name}'.{_suggest(name, known)}")
    return [process for process in processes if process.name in wanted or not wanted]


def enclave_path(namespace: str, name: str) -> str:
    """The SROS 2 enclave of a node, for --ros-args --enclave."""
    return f"{'/' + namespace.strip('/') if namespace.strip('/') else ''}/{name}"


def enclave_arguments(namespace: str, name: str) -> list[str]:
    """What names the keys of a node, where SROS 2 is on; nothing where it is not."""
    return ["--enclave", enclave_path(namespace, name)] if os.environ.get("ROS_SECURITY_ENABLE") == "true" else []


def parse_assignments(words: Iterable[str]) -> dict[str, str]:
    """['sim:=false'] -> {'sim': 'false'}; raises ConfigError on another form."""
    assignments = {}
    for word in words:
        name, separator, value = word.partition(":=")
        if not separator or not name:
            raise ConfigError(f"expected name:=value, found '{word}'.")
        assignments[name] = value
    return assignments


def config_folder() -> Path:
    """config/ of the repository, or of the share folder where colcon installed it."""
    source = Path(__file__).resolve().parents[4] / "config"
    prefixes = [Path(prefix) for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(":") if prefix]
    candidates = [source, *(prefix / "share" / "diwa_ros" / "config" for prefix in prefixes)]
    for folder in candidates:
        if (folder / "deploy.yaml").is_file():
            return folder
    raise ConfigError(f"no folder of graph descriptions; looked in {', '.join(map(str, candidates))}. Source the workspace or pass a file.")


def load_graph(name_or_path: str) -> Graph:
    """A graph by the name of a file in config/ ('deploy') or by its path. Raises ConfigError naming what is there."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = config_folder() / f"{name_or_path}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ConfigError(f"no graph description {path}.{_suggest(path.stem, names)}")
    return Graph(load_yaml(GraphDescription, path), path.resolve().parent)


def _to_yaml(value: Any) -> str:
    """JSON, with the point that YAML 1.1 wants in every float."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def _check_unique(what: str, names: list[str]) -> None:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise ConfigError(f"graph description: {what} '{repeated}' is there twice; give each a name of its own.")


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known) or 'none'}."
