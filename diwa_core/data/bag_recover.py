"""Makes a bag whole again after a kill or a power cut: keeps every record that is whole, drops the rest and says what that was.

A torn end is cut off in place. Where something in the middle is damaged, the good records are copied and the original stays beside them.
"""

from __future__ import annotations

import os
import shutil
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO

import yaml
from mcap.data_stream import ReadDataStream, RecordBuilder
from mcap.opcode import Opcode
from mcap.records import (
    Attachment,
    AttachmentIndex,
    Channel,
    Chunk,
    ChunkIndex,
    DataEnd,
    Footer,
    Message,
    MessageIndex,
    Metadata,
    MetadataIndex,
    Schema,
    Statistics,
    SummaryOffset,
)
from mcap.writer import MCAP0_MAGIC
from zstandard import frame_content_size

from diwa_core.data.bag_audit import EpisodeAudit
from diwa_core.data.bag_format import (
    CHECKPOINTS,
    CONTRACT,
    EPISODES,
    METADATA,
    RECORDING,
    BagCounts,
    BagTopic,
    Recording,
    rosbag2_information,
    write_metadata,
)
from diwa_core.data.bag_reader import DAMAGE, unpack_chunk
from diwa_core.errors import DataError, DiwaError

HEADER_BYTES = 9  # opcode and length of a record
DAMAGED = (*DAMAGE, DiwaError)
NOTE = "recovered: the recording ended without being closed"
OURS = (CONTRACT, CHECKPOINTS, EPISODES, RECORDING)


@dataclass
class RecoveredBag:
    """What was kept. files: copies of damaged originals that were left beside; sentence: all of it in words."""

    folder: Path
    messages: int
    episodes: int
    seconds: float
    lost_bytes: int
    damaged: list[Path]
    changed: bool

    @property
    def sentence(self) -> str:
        """For people."""
        kept = f"{self.messages} messages, {self.seconds:.1f} s, {self.episodes} episodes"
        if not self.changed:
            return f"{self.folder}: whole already: {kept}."
        lost = f"{self.lost_bytes} bytes could not be read and were left out" if self.lost_bytes else "nothing that was on the disk is lost"
        beside = f" The damaged original is {', '.join(map(str, self.damaged))}." if self.damaged else ""
        return f"{self.folder}: recovered {kept}; {lost}.{beside}"


def recover_bag(bag: str | Path) -> RecoveredBag:
    """Make the bag in folder `bag` whole, in place; a whole one is left as it is.

    Raises DataError when it is no MCAP bag or holds no message. Memory is bounded by the largest chunk.
    """
    folder = Path(bag)
    paths = sorted(folder.glob("*.mcap")) if folder.is_dir() else []
    if not paths:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: expected the folder of an MCAP bag, found {found or 'nothing'}. SQLite3 bags cannot be recovered.")
    recording, damaged, lost, changed = Recording(), [], 0, not (folder / METADATA).exists()
    scans = []
    for path in paths:
        scan = scan_file(path, recording)
        if len(scan.spans) > 1:
            damaged.append(_copy_spans(path, scan.spans))
            lost += scan.lost_bytes
            recording.episodes.clear(), recording.checkpoints.clear()
            scan = scan_file(path, recording)
        if not scan.complete:
            _write_end(path, scan)
            changed, lost = True, lost + scan.lost_bytes
        scans.append(scan)
    topics = list({topic.name: topic for scan in scans for topic in scan.topics()}.values())
    files = [(path.name, scan.counts) for path, scan in zip(paths, scans, strict=True)]
    total = sum(counts.total for _, counts in files)
    if not total:
        raise DataError(f"{folder}: expected at least one whole message, found none: there is nothing to recover.")
    information = rosbag2_information(files, topics, recording)
    if changed:
        write_metadata(folder, information)
    seconds = information["duration"]["nanoseconds"] / 1e9
    return RecoveredBag(folder, total, len(recording.episodes), seconds, lost, damaged, changed)


@dataclass
class FileScan:
    """What is whole in one MCAP file. spans: [begin, end) of good records, merged; one span where only the end is torn.

    index: of the last chunk while its index records follow, channel -> (time, offset).
    """

    spans: list[tuple[int, int]] = field(default_factory=list)
    complete: bool = False
    lost_bytes: int = 0
    schemas: dict[int, Schema] = field(default_factory=dict)
    channels: dict[int, Channel] = field(default_factory=dict)
    counts: BagCounts = field(default_factory=BagCounts)
    channel_counts: dict[int, int] = field(default_factory=dict)
    chunks: list[ChunkIndex] = field(default_factory=list)
    attachments: list[AttachmentIndex] = field(default_factory=list)
    metadata: list[MetadataIndex] = field(default_factory=list)
    index: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def chunk_end(self) -> int:
        """Where the last chunk and as much of its index as was read end."""
        return self.chunks[-1].chunk_start_offset + self.chunks[-1].chunk_length + self.chunks[-1].message_index_length

    def topics(self) -> list[BagTopic]:
        """Topics of the file, described as it does."""
        topics = []
        for channel in self.channels.values():
            schema = self.schemas.get(channel.schema_id)
            offers = yaml.safe_load(channel.metadata.get("offered_qos_profiles", "")) or ()
            type_hash = channel.metadata.get("topic_type_hash", "")
            name, text = (schema.name, schema.data.decode(errors="replace")) if schema else ("", "")
            topics.append(BagTopic(channel.topic, name, text, type_hash, tuple(offers)))
        return topics

    def keep(self, begin: int, end: int) -> None:
        """Add a good record."""
        if self.spans and self.spans[-1][1] == begin:
            begin = self.spans.pop()[0]
        self.spans.append((begin, end))

    def drop_from(self, begin: int) -> None:
        """Forget the good records behind `begin`, inside or at the end of the last ones."""
        end = self.spans[-1][1]
        while self.spans[-1][0] >= begin:
            self.spans.pop()
        self.lost_bytes += end - begin
        self.spans[-1] = (self.spans[-1][0], begin)


def scan_file(path: Path, recording: Recording) -> FileScan:
    """Read every record; our own entries go to `recording`, and an episode without an end is ended. Raises DataError on a foreign file."""
    scanner = _Scanner(path, recording)
    with path.open("rb") as stream:
        scanner.run(stream)
    return scanner.scan


class _Scanner:
    def __init__(self, path: Path, recording: Recording) -> None:
        self.path, self.recording, self.scan = path, recording, FileScan()
        self.audit: EpisodeAudit | None = None
        self.indexed = False  # rosbag2 can be told to write no indexes

    def run(self, stream: IO[bytes]) -> None:
        """Look at every record of the file; raises DataError when it is none of MCAP."""
        size = os.fstat(stream.fileno()).st_size
        magic = stream.read(len(MCAP0_MAGIC))
        if magic != MCAP0_MAGIC:
            raise DataError(f"{self.path}: expected an MCAP file, found one that begins with {magic!r}. It was not changed.")
        self.scan.keep(0, len(magic))
        position = len(magic)
        while position < size:
            stream.seek(position)
            header = stream.read(HEADER_BYTES)
            end = position + HEADER_BYTES + int.from_bytes(header[1:], "little")
            opcode = header[0]
            if len(header) < HEADER_BYTES or end > size or opcode not in Opcode.__members__.values():
                break
            if opcode == Opcode.DATA_END:
                stream.seek(size - len(MCAP0_MAGIC))
                self.scan.complete = stream.read() == MCAP0_MAGIC and len(self.scan.spans) == 1
                position = size  # what follows is made anew
                break
            try:
                self._take(Opcode(opcode), stream, position, end)
            except DAMAGED:
                self.scan.lost_bytes += end - position  # its length still leads to the next record
            else:
                self.scan.keep(position, end)
            position = end
        if not self.scan.complete:
            self.scan.lost_bytes += _used_bytes(stream, position, size)
        if self.audit and self.audit.received:
            index = len(self.recording.episodes)
            self.recording.episodes.append(self.audit.finish(index, self.scan.counts.end_ns, {}, note=NOTE))

    def _take(self, opcode: Opcode, stream: IO[bytes], begin: int, end: int) -> None:
        scan, length = self.scan, end - begin - HEADER_BYTES
        if opcode in (Opcode.HEADER, Opcode.FOOTER):
            return
        data = stream.read(length)
        if opcode == Opcode.MESSAGE_INDEX:
            self.indexed = True
            self._take_index(MessageIndex.read(ReadDataStream(BytesIO(data))), begin, end)
            return
        self._check_index()
        record = ReadDataStream(BytesIO(data))
        if opcode == Opcode.CHUNK:
            self._take_chunk(Chunk.read(record), begin, end)
        elif opcode == Opcode.SCHEMA:
            self._take_records([Schema.read(record)], [0])
        elif opcode == Opcode.CHANNEL:
            self._take_records([Channel.read(record)], [0])
        elif opcode == Opcode.MESSAGE:
            self._take_records([Message.read(record, length)], [0])
        elif opcode == Opcode.ATTACHMENT:
            if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
                raise ValueError("attachment")
            item = Attachment.read(record)
            scan.attachments.append(
                AttachmentIndex(begin, end - begin, item.log_time, item.create_time, len(item.data), item.name, item.media_type)
            )
        elif opcode == Opcode.METADATA:
            item = Metadata.read(record)
            if item.name in OURS:
                self._take_ours(item)
            scan.metadata.append(MetadataIndex(offset=begin, length=end - begin, name=item.name))

    def _take_chunk(self, chunk: Chunk, begin: int, end: int) -> None:
        data = unpack_chunk(chunk)
        if len(data) != chunk.uncompressed_size or (chunk.compression == "zstd" and frame_content_size(chunk.data) != len(data)):
            raise ValueError("length")
        records, offsets = _split_chunk(data)
        times = [record.log_time for record in records if isinstance(record, Message)] or [0]
        if (chunk.message_start_time, chunk.message_end_time) != (min(times), max(times)):
            raise ValueError("times")
        self.scan.index = self._take_records(records, offsets)
        self.scan.chunks.append(
            ChunkIndex(
                chunk_length=end - begin,
                chunk_start_offset=begin,
                compression=chunk.compression,
                compressed_size=len(chunk.data),
                message_end_time=chunk.message_end_time,
                message_index_length=0,
                message_index_offsets={},
                message_start_time=chunk.message_start_time,
                uncompressed_size=chunk.uncompressed_size,
            )
        )

    def _take_index(self, index: MessageIndex, begin: int, end: int) -> None:
        """An index has no checksum, but what it must be is known."""
        scan, chunk = self.scan, self.scan.chunks[-1]
        if begin != scan.chunk_end or index.records != scan.index.get(index.channel_id):
            raise ValueError("index")
        chunk.message_index_offsets[index.channel_id] = begin
        chunk.message_index_length += end - begin

    def _check_index(self) -> None:
        """Leave a chunk out whose index is not whole: readers would not find its messages. (The last one's index is written anew.)"""
        scan = self.scan
        if self.indexed and scan.chunks and len(scan.chunks[-1].message_index_offsets) < len(scan.index):
            scan.drop_from(scan.chunks[-1].chunk_start_offset)
        scan.index = {}

    def _take_records(self, records: list, offsets: list[int]) -> dict[int, list[tuple[int, int]]]:
        """Count records; returns the index of their messages: channel -> (time, offset)."""
        scan, index = self.scan, {}
        scan.schemas |= {record.id: record for record in records if isinstance(record, Schema)}
        channels = scan.channels | {record.id: record for record in records if isinstance(record, Channel)}
        if any(record.channel_id not in channels for record in records if isinstance(record, Message)):
            raise ValueError("message without a channel")
        scan.channels = channels
        for channel in channels.values():
            scan.counts.counts.setdefault(channel.topic, 0)
        for record, offset in zip(records, offsets, strict=True):
            if isinstance(record, Message):
                topic = channels[record.channel_id].topic
                scan.counts.add(topic, record.log_time)
                scan.channel_counts[record.channel_id] = scan.channel_counts.get(record.channel_id, 0) + 1
                index.setdefault(record.channel_id, []).append((record.log_time, offset))
                if self.audit:
                    self.audit.take(topic, record.log_time, record.data)
        return index

    def _take_ours(self, item: Metadata) -> None:
        self.recording.take_record(item.name, item.metadata)
        if item.name == CONTRACT:
            self.audit = EpisodeAudit(self.recording.contract, real_time=False)
        elif item.name == EPISODES and self.audit:
            self.audit.begin()


def _split_chunk(data: bytes) -> tuple[list, list[int]]:
    """Records of an unpacked chunk and their offsets in it."""
    stream, records, offsets = ReadDataStream(BytesIO(data)), [], []
    while stream.count < len(data):
        offset = stream.count
        opcode, length = stream.read1(), stream.read8()
        if opcode == Opcode.MESSAGE:
            records.append(Message.read(stream, length))
        elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
            records.append((Schema if opcode == Opcode.SCHEMA else Channel).read(stream))
        else:
            stream.read(length)
            continue
        offsets.append(offset)
    return records, offsets


def _used_bytes(stream: IO[bytes], begin: int, end: int) -> int:
    """Bytes of [begin, end) up to the last one that is not zero: space that was only allocated holds zeros."""
    used, position = 0, begin
    stream.seek(begin)
    while position < end:
        block = stream.read(min(1 << 20, end - position))
        if not block:
            break
        kept = len(block.rstrip(b"\0"))
        used = position + kept - begin if kept else used
        position += len(block)
    return used


def _copy_spans(path: Path, spans: list[tuple[int, int]]) -> Path:
    """Put a file with only the good records in the place of `path`; returns where the original went."""
    staging, original = path.with_suffix(".mcap.new"), path.with_suffix(".mcap.damaged")
    with path.open("rb") as source, staging.open("wb") as target:
        for begin, end in spans:
            source.seek(begin)
            while begin < end:
                block = source.read(min(1 << 20, end - begin))
                target.write(block)
                begin += len(block)
        target.flush()
        os.fsync(target.fileno())
    shutil.move(path, original)
    staging.replace(path)
    return original


def _write_end(path: Path, scan: FileScan) -> None:
    """Cut the torn end off and write the summary of what is left."""
    begin = scan.spans[0][1]
    closing = RecordBuilder()
    if scan.index and scan.chunk_end == begin:
        chunk = scan.chunks[-1]
        begin, chunk.message_index_length = begin - chunk.message_index_length, 0
        for channel, entries in scan.index.items():
            chunk.message_index_offsets[channel] = begin + closing.count
            MessageIndex(channel, entries).write(closing)
        chunk.message_index_length = closing.count
    DataEnd(0).write(closing)
    opening = closing.end()
    start = begin + len(opening)
    summary, offsets = RecordBuilder(), []
    groups = (
        (Opcode.SCHEMA, scan.schemas.values()),
        (Opcode.CHANNEL, scan.channels.values()),
        (Opcode.STATISTICS, [_statistics(scan)]),
        (Opcode.CHUNK_INDEX, scan.chunks),
        (Opcode.ATTACHMENT_INDEX, scan.attachments),
        (Opcode.METADATA_INDEX, scan.metadata),
    )
    for opcode, records in groups:
        group = summary.count
        for record in records:
            record.write(summary)
        if summary.count > group:
            offsets.append(SummaryOffset(group_opcode=opcode, group_start=start + group, group_length=summary.count - group))
    offset_start = start + summary.count
    for offset in offsets:
        offset.write(summary)
    text = summary.end()
    footer = RecordBuilder()
    Footer(start, offset_start, 0).write(footer)  # no checksum: 0 says so
    with path.open("r+b") as stream:
        stream.truncate(begin)
        stream.seek(begin)
        stream.write(opening + text + footer.end() + MCAP0_MAGIC)
        stream.flush()
        os.fsync(stream.fileno())


def _statistics(scan: FileScan) -> Statistics:
    return Statistics(
        attachment_count=len(scan.attachments),
        channel_count=len(scan.channels),
        channel_message_counts=scan.channel_counts,
        chunk_count=len(scan.chunks),
        message_count=scan.counts.total,
        message_end_time=scan.counts.end_ns,
        message_start_time=scan.counts.begin_ns,
        metadata_count=len(scan.metadata),
        schema_count=len(scan.schemas),
    )
