"""Writes one bag: MCAP, append-only, on the disk at least twice a second, so that a kill costs less than a second.

Space is allocated before anything is written into it. A full disk, a quota or a file-size limit is therefore met while the bag can still be
closed properly: nothing that was accepted is lost and the bag is whole.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import yaml
from mcap.writer import CompressionType, IndexType
from mcap.writer import Writer as McapWriter

from diwa_core.contract import Contract
from diwa_core.data.bag_format import (
    CHECKPOINTS,
    CONTRACT,
    CONTRACT_FILE,
    EPISODES,
    RECORDING,
    BagCounts,
    BagTopic,
    Episode,
    Recording,
    contract_text,
    rosbag2_information,
    write_metadata,
)
from diwa_core.errors import DataError

COMPRESSIONS = {"none": CompressionType.NONE, "zstd": CompressionType.ZSTD}
FLUSH_S = 0.4  # with the queue in front this stays below the second that may be lost
CHUNK_BYTES = 4 << 20
ALLOCATION_BYTES = 16 << 20  # space is taken from the disk in steps of this size
INDEX_BYTES = 1 << 16  # always kept free for what closing writes, besides
CHUNK_INDEX_BYTES = 400  # for each chunk


class DiskFull(DataError):
    """No space for more messages; the bag was not harmed and can be closed."""


class BagWriter:
    """One bag being written. Not thread-safe. After DiskFull only `close` may be called."""

    def __init__(
        self,
        folder: str | Path,
        contract: Contract,
        compression: str = "none",
        min_free_bytes: int = 0,
        allocation_bytes: int = ALLOCATION_BYTES,
        notes: dict[str, str] | None = None,
    ) -> None:
        """Create `folder` and begin. min_free_bytes: the writer stops before the disk has less than this left.

        Raises DataError when the folder exists or cannot be made, DiskFull when there is no space to begin with.
        """
        self.folder = Path(folder)
        self.path = self.folder / f"{self.folder.name}_0.mcap"  # rosbag2's name of a first file
        self.topics: list[BagTopic] = []
        self.counts = BagCounts()
        self.recording = Recording(contract, notes=dict(notes or {}))
        self.min_free_bytes, self.allocation_bytes = min_free_bytes, allocation_bytes
        try:
            self.folder.mkdir(parents=True)
            self._stream = self.path.open("xb")
        except FileExistsError as error:
            raise DataError(f"bag {self.folder}: expected a new folder, found one. A bag is never overwritten: name another.") from error
        except OSError as error:
            raise DataError(f"bag {self.folder}: cannot be made: {error}.") from error
        self.bytes_written = 0  # on the disk so far
        self._allocated, self._pending, self._index_bytes = 0, 0, INDEX_BYTES
        self._channels: dict[str, int] = {}
        self._schemas: dict[str, int] = {}
        try:
            self._reserve(len(contract_text(contract)))
        except DiskFull:
            self._discard()
            raise
        self._mcap = McapWriter(self._stream, CHUNK_BYTES, COMPRESSIONS[compression], IndexType.ALL)
        self._mcap.start(profile="ros2", library="diwa")
        now_ns, text = time.time_ns(), contract_text(contract)
        self._mcap.add_attachment(now_ns, now_ns, CONTRACT_FILE, "application/yaml", text.encode())
        self._mcap.add_metadata(CONTRACT, {"identity": contract.identity, "yaml": text})
        self._mcap.add_metadata(RECORDING, self.recording.notes)
        self._sync()

    def add_topic(self, topic: BagTopic) -> None:
        """Make a topic known before its first message. Raises DiskFull."""
        qos = yaml.safe_dump(list(topic.qos), sort_keys=False).strip()
        self._index_bytes += len(topic.definition) + 3 * len(qos) + 2048  # the summary and metadata.yaml repeat it
        self._reserve(len(topic.definition) + len(qos) + 1024)
        if topic.type not in self._schemas:
            self._schemas[topic.type] = self._mcap.register_schema(topic.type, "ros2msg", topic.definition.encode())
        metadata = {"offered_qos_profiles": qos, "topic_type_hash": topic.type_hash}
        self._channels[topic.name] = self._mcap.register_channel(topic.name, "cdr", self._schemas[topic.type], metadata)
        self.topics.append(topic)
        self.counts.counts[topic.name] = 0

    def write(self, topic: str, log_ns: int, publish_ns: int, data: bytes) -> None:
        """Append one serialized message of a known topic. log_ns: when it was received; publish_ns: when it was sent. Raises DiskFull."""
        self._reserve(len(data) + 128)
        before = self._stream.tell()
        self._mcap.add_message(self._channels[topic], log_ns, data, publish_ns, self.counts.counts[topic])
        if self._stream.tell() != before:
            self._count_chunk()
        self.counts.add(topic, log_ns)

    def add_checkpoint(self, kind: str, identity: str) -> None:
        """Note a checkpoint that had to do with these messages, once. kind: 'policy' or 'world_model'. Raises DiskFull."""
        if identity in self.recording.checkpoints.setdefault(kind, []):
            return
        self._reserve(1024)
        self.recording.checkpoints[kind].append(identity)
        self._mcap.add_metadata(CHECKPOINTS, {"kind": kind, "identity": identity})

    def add_episode(self, episode: Episode) -> None:
        """Note a finished episode; the last one finds space even on a full disk."""
        self.recording.episodes.append(episode)
        self._mcap.flush()  # its record follows its messages, so that whoever reads in order knows whose they are
        self._count_chunk()
        text = episode.to_yaml()
        self._index_bytes += 3 * len(text)
        self._mcap.add_metadata(EPISODES, {"index": str(episode.index), "outcome": episode.outcome, "yaml": text})

    def flush(self) -> None:
        """Put everything on the disk. Raises DiskFull when there is less than `min_free_bytes` left, after everything is."""
        self._mcap.flush()
        self._count_chunk()
        self._sync()
        self._check_free()

    def close(self) -> Path:
        """Write the index and metadata.yaml; returns the folder. Raises DataError when even that fails: `recover_bag` mends it then."""
        try:
            information = rosbag2_information([(self.path.name, self.counts)], self.topics, self.recording)
            self._mcap.add_metadata("rosbag2", {"serialized_metadata": yaml.safe_dump(information, sort_keys=False)})
            self._mcap.finish()
            self._stream.truncate()  # gives the rest of the allocation back
            self._sync()
            self._stream.close()
            write_metadata(self.folder, information)
        except OSError as error:
            raise DataError(f"bag {self.folder}: cannot be closed: {error}. Mend: diwa data recover {self.folder}") from error
        return self.folder

    def _count_chunk(self) -> None:
        self._index_bytes += CHUNK_INDEX_BYTES
        self._pending = 0

    def _reserve(self, more: int) -> None:
        """Make sure that `more` bytes, what is pending and the index will find space."""
        self._pending += more
        needed = self._stream.tell() + self._pending + self._index_bytes
        if needed <= self._allocated:
            return
        self._check_free()
        for target in (needed + self.allocation_bytes, needed):
            try:
                os.posix_fallocate(self._stream.fileno(), self._allocated, target - self._allocated)
            except OSError as error:
                failure = error
            else:
                self._allocated = target
                return
        self._pending -= more
        raise DiskFull(
            f"bag {self.folder}: expected space for {more} bytes more, found none ({failure.strerror}); recording stops here, and what was "
            "recorded is kept. Mend: free space, or record to another disk."
        )

    def _check_free(self) -> None:
        status = os.statvfs(self.folder)
        free = status.f_bavail * status.f_frsize
        if free < self.min_free_bytes:
            raise DiskFull(
                f"bag {self.folder}: expected at least {self.min_free_bytes >> 20} MiB free on its disk, found {free >> 20} MiB; recording "
                "stops here, and what was recorded is kept. Mend: free space, record to another disk, or lower min_free_mib."
            )

    def _sync(self) -> None:
        self._stream.flush()
        os.fdatasync(self._stream.fileno())
        self.bytes_written = self._stream.tell()

    def _discard(self) -> None:
        self._stream.close()
        self.path.unlink()
        self.folder.rmdir()
