"""Message definitions for bags, from the .msg files that every installed interface package carries; and QoS in rosbag2's words."""

from __future__ import annotations

import importlib
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from rclpy.duration import Duration
from rclpy.qos import QoSProfile

from diwa_core.data.bag_format import BagTopic
from diwa_core.errors import SetupError

SEPARATOR = "=" * 80


def message_class(type_name: str) -> type:
    """'sensor_msgs/msg/Image' -> the class. Raises SetupError when its package is not installed."""
    package, folder, name = type_name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.{folder}"), name)
    except (ImportError, AttributeError) as error:
        raise SetupError(f"message type {type_name}: expected package {package} to be installed, found it is not ({error}).") from error


def describe_topic(name: str, type_name: str, offers: list[QoSProfile]) -> BagTopic:
    """A topic as a bag describes it. Raises SetupError when the definition of its type is not installed."""
    definition, type_hash = message_definition(type_name)
    return BagTopic(name, type_name, definition, type_hash, tuple(qos_words(offer) for offer in offers))


@cache
def message_definition(type_name: str) -> tuple[str, str]:
    """Text of a type with the texts of all it uses, as rosbag2 writes it, and its RIHS01 hash. Raises SetupError."""
    path = _interface_file(type_name, ".json")
    hashes = {entry["type_name"]: entry["hash_string"] for entry in json.loads(path.read_text())["type_hashes"]}
    used = [f"{SEPARATOR}\nMSG: {name.replace('/msg/', '/')}\n{_text(name)}" for name in hashes if name != type_name]
    return "\n".join([_text(type_name), *used]), hashes[type_name]


def qos_words(profile: QoSProfile) -> dict[str, Any]:
    """An offered profile as rosbag2's metadata has it."""
    return {
        "history": profile.history.short_key,
        "depth": profile.depth,
        "reliability": profile.reliability.short_key,
        "durability": profile.durability.short_key,
        "deadline": _duration_words(profile.deadline),
        "lifespan": _duration_words(profile.lifespan),
        "liveliness": profile.liveliness.short_key,
        "liveliness_lease_duration": _duration_words(profile.liveliness_lease_duration),
        "avoid_ros_namespace_conventions": profile.avoid_ros_namespace_conventions,
    }


def _duration_words(duration: Duration) -> dict[str, int]:
    seconds, nanoseconds = divmod(duration.nanoseconds, 1_000_000_000)
    return {"sec": seconds, "nsec": nanoseconds}


def _text(type_name: str) -> str:
    return _interface_file(type_name, ".msg").read_text()


def _interface_file(type_name: str, suffix: str) -> Path:
    prefixes = [*filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(":")), sys.prefix]
    package, folder, name = type_name.split("/")
    for prefix in prefixes:
        path = Path(prefix) / "share" / package / folder / f"{name}{suffix}"
        if path.is_file():
            return path
    raise SetupError(f"message type {type_name}: expected share/{package}/{folder}/{name}{suffix} in {', '.join(prefixes)}, found none.")
