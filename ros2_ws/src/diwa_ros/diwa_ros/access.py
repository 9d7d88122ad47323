"""Who may command the arm: one publisher on the command topic for each node that the configuration names, which usually is one."""

from __future__ import annotations

from dataclasses import dataclass, field

from rclpy.node import Node

UNKNOWN = "_NODE_NAME_UNKNOWN_"  # what ROS calls the node of a publisher that it has found before its node


@dataclass(frozen=True)
class Verdict:
    """accepted: commands may be taken; intruder: somebody else publishes, too; text: for people; publishers: node -> GID, hexadecimal."""

    accepted: bool
    intruder: bool
    text: str
    publishers: dict[str, str] = field(default_factory=dict)


def judge_publishers(publishers: list[tuple[str, str]], allowed: tuple[str, ...]) -> Verdict:
    """Judge the publishers of the command topic, (full node name, GID) each, by the full names of the nodes that may command.

    A message does not tell its publisher in rclpy, so while one is there that must not be, nobody's commands are taken.
    """
    names = [name for name, _ in publishers]
    expected, found = " or ".join(allowed), ", ".join(sorted(names))
    known = dict(publishers)
    if not publishers:
        return Verdict(False, False, f"nobody publishes commands; waiting for {expected}")
    strangers = [name for name in names if name not in allowed]
    if strangers == [UNKNOWN] and len(publishers) == 1:
        return Verdict(False, False, "a publisher was found whose node is not yet known", known)
    if strangers:
        return Verdict(False, True, f"expected commands of {expected} only, found publishers {found}: no command is taken", known)
    if len(known) < len(publishers):
        return Verdict(False, True, f"expected one publisher of commands for each node, found {found}: no command is taken", known)
    return Verdict(True, False, f"commands come from {found}", known)


class CommandSource:
    """Watches the publishers of one topic, and the order of the messages when only one is accepted."""

    def __init__(self, node: Node, topic: str, allowed: tuple[str, ...]) -> None:
        """topic: resolved; allowed: node names, relative to the namespace of `node` unless they begin with a slash."""
        self.node, self.topic = node, topic
        namespace = node.get_namespace().rstrip("/")
        self.allowed = tuple(name if name.startswith("/") else f"{namespace}/{name}" for name in allowed)
        self.accepted: dict[str, str] = {}  # publishers last accepted, node -> GID
        self.sequence = 0  # number of the last message, of a single one
        self.verdict = judge_publishers([], self.allowed)

    def look(self) -> Verdict:
        """Judge who publishes now."""
        infos = self.node.get_publishers_info_by_topic(self.topic)
        found = [(_full_name(info.node_namespace, info.node_name), bytes(info.endpoint_gid).hex()) for info in infos]
        self.verdict = judge_publishers(found, self.allowed)
        if self.verdict.accepted and self.verdict.publishers != self.accepted:
            self.accepted, self.sequence = self.verdict.publishers, 0
        return self.verdict

    def takes(self, sequence: int | None) -> bool:
        """Whether a message, the `sequence`-th of its publisher (None: not counted), may be from an accepted one.

        With a single one it cannot be when the number does not grow: somebody sent it who has already gone again.
        """
        if not self.look().accepted:
            return False
        if sequence is None or len(self.accepted) > 1:
            return True
        grows = sequence > self.sequence
        self.sequence = max(self.sequence, sequence)
        return grows


def _full_name(namespace: str, name: str) -> str:
    return UNKNOWN if name == UNKNOWN else f"{namespace.rstrip('/')}/{name}"
