"""SROS 2 for a graph: one enclave per node and one for the operator, each allowed exactly what its node does.

Pure Python without rclpy: what a node does is said here once, and a test holds it against the nodes as they run.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from diwa_core.contract import Contract
from diwa_core.errors import ConfigError
from diwa_ros.contracts import read_contract
from diwa_ros.graph import Process, enclave_path

POLICY_VERSION = "0.2.0"  # of the sros2 policy schema
CAMERAS = "<cameras>"  # stands for the image topics of the contract
STATES = ("joint_states", "current_pose", "target_pose")
MARKS = "episode_mark"
RECORDED = (  # by the recorder, besides the cameras
    *STATES,
    *("sim/state", "sim/command", "executed_action", "latent", "latent/candidate", "action_chunk", "controller/status", "/diagnostics"),
    *("policy/status", "policy/history", "policy/shadow", "world_model/surprise"),
)


@dataclass(frozen=True)
class Access:
    """What one node may do: names relative to its namespace, '~/' for its own, '/' for absolute ones."""

    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    serve: tuple[str, ...] = ()
    call: tuple[str, ...] = ()
    execute: tuple[str, ...] = ()  # actions served
    request: tuple[str, ...] = ()  # actions called

    def __add__(self, other: Access) -> Access:
        return Access(*(tuple(dict.fromkeys(mine + theirs)) for mine, theirs in zip(self.fields(), other.fields(), strict=True)))

    def fields(self) -> tuple[tuple[str, ...], ...]:
        """All six, in order."""
        return self.publish, self.subscribe, self.serve, self.call, self.execute, self.request


PARAMETERS = (
    "describe_parameters",
    "get_parameter_types",
    "get_parameters",
    "list_parameters",
    "set_parameters",
    "set_parameters_atomically",
)
LIFECYCLE = ("change_state", "get_state", "get_available_states", "get_available_transitions", "get_transition_graph")
COMMON = Access(
    publish=("/rosout", "/parameter_events", "/diagnostics", "~/transition_event"),
    serve=tuple(f"~/{name}" for name in (*PARAMETERS, *LIFECYCLE, "get_type_description")),
)
NODES = {  # executable -> what it does beside COMMON
    "calvin_bridge": Access(publish=(CAMERAS, *STATES, "sim/state"), subscribe=("sim/command",), serve=("sim/reset",)),
    "franka_controller": Access(
        publish=("executed_action", "controller/status"),
        subscribe=("action_chunk", "world_model/surprise"),
        serve=("controller/enable", "controller/stop", "controller/resume"),
    ),
    "fake_fr3": Access(publish=(CAMERAS, "sim/state"), serve=("sim/reset",)),
    "encoder": Access(
        publish=("latent", "latent/candidate", "world_model/surprise"),
        subscribe=(CAMERAS, *STATES, "executed_action"),
        serve=("encoder/reset", "encoder/world_model"),
    ),
    "policy": Access(
        publish=("action_chunk", "policy/status", "policy/history", "policy/shadow"),
        subscribe=("latent", "latent/candidate", "controller/status"),
        serve=("policy/load", "policy/rollback"),
        call=("encoder/reset", "encoder/world_model"),
        execute=("run_skill",),
    ),
    "recorder": Access(
        publish=(MARKS, "recorder/status", "recorder/episode"),
        subscribe=(CAMERAS, *RECORDED, MARKS),
        serve=tuple(f"recorder/{name}" for name in ("start", "stop", "mark", "save")),
        execute=("record",),
    ),
    "finetune": Access(execute=("finetune",)),
    "teleop": Access(publish=("action_chunk", MARKS), subscribe=("executed_action",)),
}
TELEOP = "teleop"
BACKENDS = {  # parameter `backend` of the controller -> what it adds
    "calvin": Access(publish=("sim/command",), subscribe=("sim/state",)),
    "dry_run": Access(publish=STATES),
    "franky": Access(publish=(*STATES, "external_wrench_in_base_frame"), serve=("controller/recover", "controller/home")),
}
OPERATOR = Access(  # a person's tools: may look, stop, resume and start a skill, but not publish a command
    subscribe=(
        "/diagnostics",
        "controller/status",
        "policy/status",
        "policy/history",
        "policy/shadow",
        "executed_action",
        "latent",
        "world_model/surprise",
        "action_chunk",
        "sim/state",
        "recorder/status",
        "recorder/episode",
        CAMERAS,
        *STATES,
    ),
    publish=("/rosout", "/parameter_events", MARKS),
    call=(
        *(f"controller/{name}" for name in ("enable", "stop", "resume", "recover", "home")),
        *("encoder/reset", "policy/load", "policy/rollback", "sim/reset"),
        *(f"recorder/{name}" for name in ("start", "stop", "mark", "save")),
    ),
    request=("run_skill", "record", "finetune"),
)


def node_access(process: Process) -> Access:
    """Everything the process does, with its remappings and the image topics of its contract. Raises ConfigError for an unknown node."""
    if process.executable not in NODES:
        raise ConfigError(f"security: expected one of {', '.join(NODES)}, found the node '{process.executable}'. Add it to security.py.")
    access = COMMON + NODES[process.executable]
    if process.executable == "franka_controller":
        access += BACKENDS.get(process.parameters.get("backend", "calvin"), Access())
    if process.executable == "recorder":
        access += Access(subscribe=tuple(split_names(process.parameters.get("extra_topics", ""))))
    if process.executable == "teleop" and process.parameters.get("source", "joy") == "joy":
        access += Access(subscribe=("joy",))
    return _fill(access, read_contract(process.parameters.get("contract", "")), process.remaps)


def with_teleop(processes: list[Process]) -> list[Process]:
    """The same, and the teleoperation if the controller obeys it: then its enclave is the only other one that may publish commands."""
    sources = [name for process in processes for name in split_names(process.parameters.get("command_sources", ""))]
    return [*processes, Process(TELEOP, TELEOP, processes[0].namespace, False, {}, {}, {})] if TELEOP in sources else processes


def write_policies(processes: list[Process], folder: Path) -> list[Path]:
    """policies.xml and make_keystore.sh for the graph, in `folder`; returns their paths. Raises ConfigError for an unknown node."""
    root = ElementTree.Element("policy", version=POLICY_VERSION)
    enclaves = ElementTree.SubElement(root, "enclaves")
    for process in processes:
        _add_enclave(enclaves, process.namespace, process.name, node_access(process))
    namespace = processes[0].namespace
    _add_enclave(enclaves, namespace, "operator", _fill(OPERATOR, Contract(), {}))
    ElementTree.indent(root)
    folder.mkdir(parents=True, exist_ok=True)
    policies, script = folder / "policies.xml", folder / "make_keystore.sh"
    policies.write_text(ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n")
    script.write_text(_keystore_script([enclave.attrib["path"] for enclave in enclaves]))
    script.chmod(0o755)
    return [policies, script]


def split_names(text: str) -> list[str]:
    """'a, b' -> ['a', 'b']."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _fill(access: Access, contract: Contract, remaps: dict[str, str]) -> Access:
    cameras = tuple(stream.topic for stream in contract.images)

    def fill(names: tuple[str, ...]) -> tuple[str, ...]:
        spread = (topic for name in names for topic in (cameras if name == CAMERAS else (name,)))
        return tuple(dict.fromkeys(remaps.get(topic, topic) for topic in spread))

    return replace(access, **{name: fill(getattr(access, name)) for name in access.__dataclass_fields__})


def _add_enclave(enclaves: ElementTree.Element, namespace: str, name: str, access: Access) -> None:
    enclave = ElementTree.SubElement(enclaves, "enclave", path=enclave_path(namespace, name))
    profile = ElementTree.SubElement(ElementTree.SubElement(enclave, "profiles"), "profile", ns=namespace or "/", node=name)
    own = enclave_path(namespace, name)
    for names, kind, item, verb in (
        (access.publish, "topics", "topic", "publish"),
        (access.subscribe, "topics", "topic", "subscribe"),
        (access.serve, "services", "service", "reply"),
        (access.call, "services", "service", "request"),
        (access.execute, "actions", "action", "execute"),
        (access.request, "actions", "action", "call"),
    ):
        _add_names(profile, kind, item, verb, [own + name[1:] if name.startswith("~/") else name for name in names])


def _add_names(profile: ElementTree.Element, kind: str, item: str, verb: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        parent = ElementTree.SubElement(profile, kind, {verb: "ALLOW"})
        for name in names:
            ElementTree.SubElement(parent, item).text = name


def _keystore_script(paths: list[str]) -> str:
    """The commands of the sros2 package that turn policies.xml into keys; for a ROS 2 installation that has it."""
    lines = [
        "#!/bin/sh",
        "# Makes keystore/ beside this file: one key and one signed permission per enclave of policies.xml. Needs the sros2 package.",
        "set -e",
        'cd "$(dirname "$0")"',
        "ros2 security create_keystore keystore",
    ]
    for path in map(shlex.quote, paths):
        lines += [f"ros2 security create_enclave keystore {path}", f"ros2 security create_permission keystore {path} policies.xml"]
    return "\n".join(lines) + "\n"
