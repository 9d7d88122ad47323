"""What a bag of ours says about itself: topics, episodes, contract, and the metadata.yaml that rosbag2 reads (version 9).

A bag is a folder with one MCAP file and metadata.yaml. Our own entries are MCAP metadata records, which survive a kill, and are repeated in
`custom_data` of metadata.yaml: CONTRACT, CHECKPOINTS, EPISODES and RECORDING, each one YAML text. contract.yaml is an MCAP attachment too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diwa_core.config import from_dict, parse_untrusted_yaml
from diwa_core.contract import Contract
from diwa_core.errors import ConfigError, DataError

METADATA, ROSBAG2_VERSION = "metadata.yaml", 9
CONTRACT, CHECKPOINTS, EPISODES, RECORDING = (f"diwa.{name}" for name in ("contract", "checkpoints", "episodes", "recording"))
CONTRACT_FILE = "contract.yaml"
SUCCESS, FAILURE, DISCARD, UNMARKED = "success", "failure", "discard", ""
OUTCOMES = (SUCCESS, FAILURE, DISCARD)


@dataclass(frozen=True)
class BagTopic:
    """One topic. name: as in the graph's root, with its slash; type: 'sensor_msgs/msg/Image'; definition: the .msg text with all it uses.

    qos: the publishers' offers, each a mapping in rosbag2's words.
    """

    name: str
    type: str
    definition: str
    type_hash: str = ""
    qos: tuple[dict[str, Any], ...] = ()


@dataclass
class Episode:
    """What was kept of one episode. Stamps in nanoseconds, by the messages' headers; counts by topic.

    received: messages in the bag; expected: frames by rate and duration; missing: of those; dropped: by the recorder's own queue.
    """

    index: int
    outcome: str = UNMARKED
    skill: str = ""
    note: str = ""
    begin_ns: int = 0
    end_ns: int = 0
    bad: bool = False
    reason: str = ""
    received: dict[str, int] = field(default_factory=dict)
    expected: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """Seconds between its first and its last stamp."""
        return (self.end_ns - self.begin_ns) / 1e9

    @property
    def usable(self) -> bool:
        """Whether it may be trained on."""
        return not self.bad and self.outcome != DISCARD

    def to_yaml(self) -> str:
        """One line per field."""
        return yaml.safe_dump(asdict(self), sort_keys=False)

    @staticmethod
    def from_yaml(text: str) -> Episode:
        """Read what `to_yaml` wrote. Raises ConfigError or DataError."""
        return from_dict(Episode, _parse(text), "episode of a bag")


@dataclass
class Recording:
    """Our own entries of one bag. checkpoints: kind -> identities seen, in order; notes: name, skill, reason of the recording, free."""

    contract: Contract | None = None
    checkpoints: dict[str, list[str]] = field(default_factory=dict)
    episodes: list[Episode] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def to_custom_data(self) -> dict[str, str]:
        """Name -> YAML text, as rosbag2 keeps it."""
        texts = {
            CHECKPOINTS: yaml.safe_dump(self.checkpoints),
            EPISODES: yaml.safe_dump([asdict(episode) for episode in self.episodes], sort_keys=False),
            RECORDING: yaml.safe_dump(self.notes),
        }
        return texts | ({CONTRACT: contract_text(self.contract)} if self.contract else {})

    @staticmethod
    def from_custom_data(texts: Mapping[str, str]) -> Recording:
        """Read what `to_custom_data` wrote; what is not there stays empty. Raises ConfigError or DataError."""
        recording = Recording()
        if CONTRACT in texts:
            recording.contract = Contract.from_dict(_parse(texts[CONTRACT]))
        recording.checkpoints = dict(_parse(texts.get(CHECKPOINTS, "{}")))
        recording.episodes = [from_dict(Episode, values, "episode of a bag") for values in _parse(texts.get(EPISODES, "[]"))]
        recording.notes = dict(_parse(texts.get(RECORDING, "{}")))
        return recording

    def take_record(self, name: str, values: Mapping[str, str]) -> None:
        """Add one MCAP metadata record of ours; others are ignored. Raises ConfigError or DataError."""
        if name == CONTRACT:
            self.contract = Contract.from_dict(_parse(values["yaml"]))
        elif name == CHECKPOINTS:
            self.checkpoints.setdefault(values["kind"], []).append(values["identity"])
        elif name == EPISODES:
            self.episodes.append(Episode.from_yaml(values["yaml"]))
        elif name == RECORDING:
            self.notes.update(values)


@dataclass
class BagCounts:
    """What an MCAP file holds. Times in nanoseconds since the epoch; counts by topic name."""

    counts: dict[str, int] = field(default_factory=dict)
    begin_ns: int = 0
    end_ns: int = 0

    @property
    def total(self) -> int:
        """Messages of all topics."""
        return sum(tuple(self.counts.values()))  # a copy: another thread may be counting

    def add(self, topic: str, log_ns: int, number: int = 1) -> None:
        """Count messages of a topic, the last one received at `log_ns`."""
        self.begin_ns = min(self.begin_ns, log_ns) if self.end_ns else log_ns
        self.end_ns = max(self.end_ns, log_ns)
        self.counts[topic] = self.counts.get(topic, 0) + number


def contract_text(contract: Contract) -> str:
    """The contract as YAML."""
    return yaml.safe_dump(contract.to_dict(), sort_keys=False)


def rosbag2_information(files: list[tuple[str, BagCounts]], topics: list[BagTopic], recording: Recording) -> dict[str, Any]:
    """The mapping under 'rosbag2_bagfile_information' of a bag of MCAP files (name, what it holds)."""
    counts = BagCounts(begin_ns=min(each.begin_ns for _, each in files), end_ns=max(each.end_ns for _, each in files))
    for _, each in files:
        counts.counts.update({topic: counts.counts.get(topic, 0) + number for topic, number in each.counts.items()})
    return {
        "version": ROSBAG2_VERSION,
        "storage_identifier": "mcap",
        **_time_span(counts),
        "message_count": counts.total,
        "topics_with_message_count": [
            {
                "topic_metadata": {
                    "name": topic.name,
                    "type": topic.type,
                    "serialization_format": "cdr",
                    "offered_qos_profiles": list(topic.qos),
                    "type_description_hash": topic.type_hash,
                },
                "message_count": counts.counts.get(topic.name, 0),
            }
            for topic in topics
        ],
        "compression_format": "",
        "compression_mode": "",
        "relative_file_paths": [name for name, _ in files],
        "files": [{"path": name, **_time_span(each), "message_count": each.total} for name, each in files],
        "custom_data": recording.to_custom_data(),
        "ros_distro": os.environ.get("ROS_DISTRO", "jazzy"),
    }


def write_metadata(folder: Path, information: dict[str, Any]) -> None:
    """Write metadata.yaml in one step: a bag that has it is whole."""
    staging = folder / f".{METADATA}.new"
    with staging.open("w") as stream:
        yaml.dump({"rosbag2_bagfile_information": information}, stream, _RosbagDumper, sort_keys=False)
        stream.flush()
        os.fsync(stream.fileno())
    staging.replace(folder / METADATA)


def _time_span(counts: BagCounts) -> dict[str, dict[str, int]]:
    return {
        "starting_time": {"nanoseconds_since_epoch": counts.begin_ns},
        "duration": {"nanoseconds": max(0, counts.end_ns - counts.begin_ns)},
    }


class _RosbagDumper(yaml.SafeDumper):
    """Without anchors: yaml-cpp reads them, people do not."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _parse(text: str) -> Any:
    try:
        return parse_untrusted_yaml(text)
    except ConfigError as error:
        raise DataError(f"bag: its own entries cannot be read: {error}") from error
