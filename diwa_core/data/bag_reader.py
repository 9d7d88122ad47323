"""Reading bags of any origin: MCAP and SQLite3, whole, split, compressed, unindexed, cut off or damaged.

What cannot be read is left out and said in `notes`, a sentence each; a bag of which nothing can be read raises DataError. Bags are not
trusted: memory is bounded by what a bag's file holds and the limits below, and no code comes out of them (message types are ours).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lz4.frame
import yaml
import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import Channel, Chunk, Metadata, MetadataIndex, Schema
from rosbags.rosbag2 import Reader as RosbagsReader
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from diwa_core.data.bag_format import METADATA, Recording
from diwa_core.errors import DataError, DiwaError

MAGIC = b"\x89MCAP0\r\n"
FOOTER_BYTES = 29
MAX_CHUNK_BYTES = 256 << 20  # of one MCAP chunk or message, unpacked
MAX_TEXT_BYTES = 16 << 20  # of metadata.yaml
MAX_DEFINITION_BYTES = 1 << 18
INTERFACES = "diwa_interfaces"
PARSERS = {"ros2msg": get_types_from_msg, "ros2idl": get_types_from_idl}
# What readers of damaged data raise: each library has its own ways.
DAMAGE = (
    *(McapError, SerdeError, zstandard.ZstdError, struct.error, RuntimeError, ValueError, KeyError, IndexError),
    *(StopIteration, TypeError, AttributeError, OverflowError, EOFError, AssertionError, OSError, MemoryError, RecursionError),
)


class BagMessage(NamedTuple):
    """One serialized message, as bytes or a view of them. log_ns: when it was recorded."""

    topic: str
    log_ns: int
    data: bytes | memoryview


@dataclass
class TopicInfo:
    """What a bag says about a topic. type: 'sensor_msgs/msg/Image'; definition: (encoding, text), empty where the bag has none."""

    type: str
    definition: tuple[str, str] = ("", "")


class BagReader:
    """An open bag; use it as a context manager.

    path: a bag's folder, with or without metadata.yaml, or one of its files (.mcap, .db3, either with .zstd behind it).
    topics: name -> TopicInfo; recording: our own entries, empty in a foreign bag; notes: what could not be read and what was kept.
    """

    def __init__(self, path: str | Path) -> None:
        """Find out what is there. Raises DataError when nothing of it can be read."""
        self.path = Path(path)
        self.notes: list[str] = []
        self.topics: dict[str, TopicInfo] = {}
        self.recording = Recording()
        self._stack = contextlib.ExitStack()
        self._unpack_messages = False
        try:
            self._files = [_open_file(file, self.notes) for file in self._find_files()]
            self._survey()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> BagReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was unpacked."""
        self._stack.close()

    def messages(self, topics: set[str]) -> Iterator[BagMessage]:
        """The messages of some topics in the order of recording; damage ends a file's part and is noted."""
        for file in self._files:
            for message in file.messages(topics):
                if not self._unpack_messages:
                    yield message
                    continue
                try:
                    yield message._replace(data=_unzstd(message.data, MAX_CHUNK_BYTES))
                except DAMAGE as error:
                    self._note(f"a message on {message.topic} cannot be unpacked ({error}) and was left out")

    def decode(self, topic: str, data: bytes | memoryview) -> Any:
        """The message in `data`, with the fields of its type. Raises DataError."""
        try:
            return load_types().deserialize_cdr(data, self.topics[topic].type)
        except DAMAGE as error:
            raise DataError(f"{topic}: expected a {self.topics[topic].type}, found {len(data)} bytes that are none ({error}).") from error

    def check_type(self, topic: str, expected: tuple[str, ...]) -> None:
        """Raise DataError unless a topic is of one of the `expected` types, defined as we know it."""
        found, (encoding, text) = self.topics[topic].type, self.topics[topic].definition
        if found not in expected:
            raise DataError(f"{self.path}: {topic}: expected {' or '.join(expected)}, found {found}.")
        if encoding not in PARSERS or not text:
            return
        if not _same_definition(found, encoding, text):
            raise DataError(
                f"{self.path}: {topic}: expected {found} as this version of diwa knows it, found other fields in the bag. "
                "Import it with the version that recorded it."
            )

    # -- what is there -----------------------------------------------------------------------------------------------------------------

    def _find_files(self) -> list[Path]:
        path = self.path
        if path.is_file():
            return [self._unpack(path)]
        if not path.is_dir():
            raise DataError(f"{path}: expected a bag (a folder, .mcap or .db3), found nothing there. Check the path.")
        present = [file for file in path.iterdir() if file.name.removesuffix(".zstd").endswith((".mcap", ".db3"))]
        if not present:
            raise DataError(f"{path}: expected .mcap or .db3 files in the bag, found {_list(sorted(f.name for f in path.iterdir()))}.")
        present.sort(key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)])
        information = self._read_metadata()
        self._unpack_messages = information.get("compression_mode") in ("message", "MESSAGE")
        listed = information.get("relative_file_paths")
        listed = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
        names = [Path(name).name for name in listed] or [file.name for file in present]
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            self._note(f"{METADATA} lists {_list(missing)}, which is not there; the other files were read")
        names = [name for name in names if name not in missing] or [file.name for file in present]
        return [self._unpack(path / name) for name in names]

    def _read_metadata(self) -> dict:
        """What is under rosbag2_bagfile_information, and our own entries in it; {} with a note where that cannot be read."""
        file = self.path / METADATA
        if not file.exists():
            self._note(f"{METADATA} is missing, so the recording was cut off; the files themselves were read")
            return {}
        try:
            if file.stat().st_size > MAX_TEXT_BYTES:
                raise ValueError(f"{file.stat().st_size} bytes are too many")
            information = yaml.load(file.read_text(), yaml.CSafeLoader)["rosbag2_bagfile_information"]
            custom = {key: text for key, text in (information.get("custom_data") or {}).items() if isinstance(text, str)}
        except (*DAMAGE, yaml.YAMLError) as error:
            self._note(f"{METADATA} cannot be read ({_first_line(error)}); the files themselves were read")
            return {}
        try:
            self.recording = Recording.from_custom_data(custom)
        except (*DAMAGE, DiwaError) as error:
            self._note(f"the entries of the recorder in {METADATA} cannot be read ({_first_line(error)})")
        return information

    def _unpack(self, file: Path) -> Path:
        """The file itself, or an unpacked copy of a compressed one."""
        if file.suffix != ".zstd":
            return file
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        unpacked, left = folder / file.stem, shutil.disk_usage(folder).free - (1 << 30)
        try:
            with file.open("rb") as packed, unpacked.open("wb") as target:
                source = zstandard.ZstdDecompressor().stream_reader(packed)
                while block := source.read(1 << 20):
                    left -= len(block)
                    if left < 0:
                        raise DataError(f"{file}: expected room to unpack it into {folder}, found too little. Make space or set TMPDIR.")
                    target.write(block)
        except zstandard.ZstdError as error:
            self._note(f"{file.name} is damaged ({error}); what could be unpacked was read")
        return unpacked

    def _survey(self) -> None:
        """Topics of all files and, where metadata.yaml has none, the recorder's entries."""
        has_entries = bool(self.recording.contract or self.recording.episodes)
        for file in self._files:
            self.topics |= {name: topic for name, topic in file.topics.items() if name not in self.topics}
            for name, values in () if has_entries else file.entries:
                try:
                    self.recording.take_record(name, values)
                except (*DAMAGE, DiwaError) as error:
                    self._note(f"an entry {name} of the recorder cannot be read ({_first_line(error)})")
        if not self.topics:
            found = f" ({'; '.join(self.notes)})" if self.notes else ""
            raise DataError(f"{self.path}: expected topics in the bag, found none{found}.")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


# -- files -----------------------------------------------------------------------------------------------------------------------------


class McapFile:
    """One MCAP file, read from front to back, so that it need be neither indexed nor whole.

    topics: those of the whole file; entries: its metadata records (name, values).
    """

    def __init__(self, path: Path, notes: list[str]) -> None:
        self.path, self.notes = path, notes
        self.topics: dict[str, TopicInfo] = {}
        self.entries: list[tuple[str, dict[str, str]]] = []
        self._schemas: dict[int, Schema] = {}
        self._channels: dict[int, Channel] = {}
        if not self._read_summary():
            for _ in self._scan(None):
                pass

    def _read_summary(self) -> bool:
        """Topics and entries from the end of a whole file, which saves a survey of it; False where there is none."""
        size = self.path.stat().st_size
        try:
            with self.path.open("rb") as stream:
                stream.seek(-(FOOTER_BYTES + len(MAGIC)), os.SEEK_END)
                footer = stream.read(FOOTER_BYTES)
                if stream.read() != MAGIC or footer[0] != Opcode.FOOTER:
                    return False
                stream.seek(struct.unpack_from("<Q", footer, 9)[0])
                for opcode, content in _read_records(stream, size):
                    if opcode == Opcode.FOOTER:
                        break
                    if opcode == Opcode.METADATA_INDEX:
                        self._read_entry(MetadataIndex.read(ReadDataStream(io.BytesIO(content))).offset, size)
                    else:
                        self._take_record(opcode, content, survey=True)
        except DAMAGE:
            self.topics, self.entries = {}, []
        return bool(self.topics)

    def _read_entry(self, offset: int, size: int) -> None:
        with self.path.open("rb") as stream:
            stream.seek(offset)
            self._take_record(*next(_read_records(stream, size)), survey=True)

    def messages(self, topics: set[str]) -> Iterator[BagMessage]:
        """Messages of `topics` in the order of the file, which is that of their arrival, whatever the clock did."""
        yield from self._scan(topics)

    def _scan(self, topics: set[str] | None) -> Iterator[BagMessage]:
        """Go through the file; None: a survey, for everything but the messages."""
        count = 0
        with self.path.open("rb") as stream:
            size = self.path.stat().st_size
            if stream.read(len(MAGIC)) != MAGIC:
                raise DataError(f"{self.path}: expected an MCAP file, found {'an empty one' if not size else 'something else'}.")
            try:
                for opcode, content in _read_records(stream, size):
                    if opcode == Opcode.CHUNK:
                        for message in self._open_chunk(content, topics):
                            count += 1
                            yield message
                    elif opcode == Opcode.MESSAGE:
                        if topics is not None and (message := self._message(content, topics)):
                            count += 1
                            yield message
                    else:
                        self._take_record(opcode, content, survey=topics is None)
                        if opcode == Opcode.DATA_END:
                            return
                end = "has no end"
            except DAMAGE as error:
                end = f"is damaged at byte {stream.tell()} of {size} ({_first_line(error)})"
        if topics is not None:
            self._note(f"{self.path.name} {end}: the {count} messages before that were kept")

    def _open_chunk(self, content: bytes, topics: set[str] | None) -> list[BagMessage]:
        chunk = _read_chunk(memoryview(content))
        where = f"a chunk at {chunk.message_start_time / 1e9:.3f} s of {self.path.name}"
        try:
            data = unpack_chunk(chunk)
        except DAMAGE as error:
            self._note(f"{where} is damaged ({_first_line(error)}) and was left out")
            return []
        messages = []
        try:
            for opcode, record in _split_records(memoryview(data)):
                if opcode != Opcode.MESSAGE:
                    self._take_record(opcode, record, survey=topics is None)
                elif topics is not None and (message := self._message(record, topics)):
                    messages.append(message)
        except DAMAGE as error:
            self._note(f"{where} is damaged ({_first_line(error)}): what came before was kept")
        return messages

    def _message(self, content: bytes | memoryview, topics: set[str]) -> BagMessage | None:
        channel_id, _, log_ns, _ = struct.unpack_from("<HIQQ", content)
        channel = self._channels[channel_id]
        return BagMessage(channel.topic, log_ns, content[22:]) if channel.topic in topics else None

    def _take_record(self, opcode: int, content: bytes | memoryview, survey: bool) -> None:
        if not survey:
            return
        record = io.BytesIO(content)
        if opcode == Opcode.SCHEMA:
            schema = Schema.read(ReadDataStream(record))
            self._schemas[schema.id] = schema
        elif opcode == Opcode.CHANNEL:
            channel = Channel.read(ReadDataStream(record))
            self._channels[channel.id] = channel
            schema = self._schemas.get(channel.schema_id)
            if schema and channel.message_encoding == "cdr":
                definition = (schema.encoding, schema.data[:MAX_DEFINITION_BYTES].decode(errors="replace"))
                self.topics[channel.topic] = TopicInfo(schema.name, definition)
        elif opcode == Opcode.METADATA:
            metadata = Metadata.read(ReadDataStream(record))
            self.entries.append((metadata.name, metadata.metadata))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class SqliteFile:
    """One SQLite3 file, through rosbags."""

    entries: tuple = ()

    def __init__(self, path: Path, notes: list[str]) -> None:
        self.path, self.notes = path, notes
        if not path.stat().st_size:
            raise DataError(f"{path}: expected a SQLite3 bag, found an empty file.")
        with self._open() as reader:
            self.topics = {
                connection.topic: TopicInfo(connection.msgtype, (_encoding(connection.msgdef.format), connection.msgdef.data))
                for connection in reader.connections
            }

    def messages(self, topics: set[str]) -> Iterator[BagMessage]:
        """Messages of `topics` by their time."""
        count = 0
        with self._open() as reader:
            connections = [connection for connection in reader.connections if connection.topic in topics]
            try:
                for connection, log_ns, data in reader.messages(connections) if connections else ():
                    count += 1
                    yield BagMessage(connection.topic, log_ns, data)
            except Exception as error:  # apsw's errors have no base class that is public and none of ours
                if isinstance(error, DiwaError):
                    raise
                self.notes.append(f"{self.path.name} is damaged ({_first_line(error)}): the {count} messages before that were kept")

    @contextlib.contextmanager
    def _open(self) -> Iterator[RosbagsReader]:
        try:
            reader = RosbagsReader(self.path)
            reader.open()
        except Exception as error:  # as above
            raise DataError(
                f"{self.path}: expected a SQLite3 bag, found one that cannot be read ({_first_line(error)}). SQLite3 keeps nothing of a "
                "recording that was cut off: record to MCAP."
            ) from error
        try:
            yield reader
        finally:
            reader.close()


def _open_file(path: Path, notes: list[str]) -> McapFile | SqliteFile:
    if path.suffix == ".mcap":
        return McapFile(path, notes)
    if path.suffix == ".db3":
        return SqliteFile(path, notes)
    mend = " Convert ROS 1 bags with rosbags-convert." if path.suffix == ".bag" else ""
    raise DataError(f"{path}: expected a bag (.mcap or .db3), found '{path.suffix or path.name}'.{mend}")


def _read_records(stream: io.BufferedIOBase, size: int) -> Iterator[tuple[int, bytes]]:
    """(opcode, content) of the records of an MCAP file of `size` bytes. Raises ValueError where one is cut off, after its beginning."""
    while header := stream.read(9):
        if len(header) < 9:
            raise ValueError("a record is cut off")
        opcode, length = struct.unpack("<BQ", header)
        if opcode == 0:  # the disk's space was taken, but not yet written
            raise ValueError("nothing was written here")
        content = stream.read(min(length, size))
        if len(content) == length or opcode == Opcode.CHUNK:
            yield opcode, content
        if len(content) < length:
            raise ValueError("a record is cut off")


def _split_records(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(opcode, content) of the records in an unpacked chunk, without a copy: pictures are large. Raises as `_read_records`."""
    at = 0
    while at < len(data):
        opcode, length = struct.unpack_from("<BQ", data, at)
        at += 9
        if opcode == 0 or length > len(data) - at:
            raise ValueError("a record is cut off")
        yield opcode, data[at : at + length]
        at += length


def _read_chunk(content: memoryview) -> Chunk:
    """As mcap's Chunk.read, without its copy of the data."""
    begin_ns, end_ns, size, checksum, name_length = struct.unpack_from("<QQQII", content)
    at = 32 + name_length
    (length,) = struct.unpack_from("<Q", content, at)
    return Chunk(
        compression=str(content[32:at], "utf-8"),
        data=content[at + 8 : at + 8 + length],
        message_start_time=begin_ns,
        message_end_time=end_ns,
        uncompressed_crc=checksum,
        uncompressed_size=size,
    )


def unpack_chunk(chunk: Chunk) -> bytes | memoryview:
    """The records in a chunk; of one that is cut off, the part that is there. Raises ValueError when they were changed."""
    if chunk.uncompressed_size > MAX_CHUNK_BYTES:
        raise ValueError(f"{chunk.uncompressed_size} bytes unpacked are too many")
    if chunk.compression == "zstd":
        data = _unzstd(chunk.data, chunk.uncompressed_size)
    elif chunk.compression == "lz4":
        data = lz4.frame.LZ4FrameDecompressor().decompress(chunk.data, max_length=chunk.uncompressed_size)
    elif not chunk.compression:
        data = chunk.data
    else:
        raise ValueError(f"compression '{chunk.compression}' is unknown")
    if chunk.uncompressed_crc and len(data) == chunk.uncompressed_size and chunk.uncompressed_crc != zlib.crc32(data):
        raise ValueError("checksum does not match")
    return data


def _unzstd(data: bytes | memoryview, most: int) -> bytes:
    """Unpacked `data`, at most `most` bytes of it."""
    stream = zstandard.ZstdDecompressor(max_window_size=MAX_CHUNK_BYTES).stream_reader(data)
    parts = []
    while most > 0:
        try:
            part = stream.read(min(most, 1 << 22))
        except zstandard.ZstdError:
            if not parts:
                raise
            break
        if not part:
            break
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


# -- types -----------------------------------------------------------------------------------------------------------------------------


@cache
def load_types() -> Typestore:
    """The types of ROS 2 Jazzy and ours, from their .msg files."""
    types = get_typestore(Stores.ROS2_JAZZY)
    known = {}
    for file in sorted(_find_interfaces().glob("*.msg")):
        known |= get_types_from_msg(file.read_text(), f"{INTERFACES}/msg/{file.stem}")
    types.register(known)
    return types


def _find_interfaces() -> Path:
    """The folder with our .msg files: of the installed package, or of the sources."""
    prefixes = [*filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)), sys.prefix]
    source = Path(__file__).parents[2] / "ros2_ws" / "src" / INTERFACES / "msg"
    for folder in (source, *(Path(prefix) / "share" / INTERFACES / "msg" for prefix in prefixes)):
        if folder.is_dir():
            return folder
    raise DataError(f"{INTERFACES}: expected its .msg files in {', '.join(prefixes)}, found none. Install or build the package.")


@cache
def _same_definition(name: str, encoding: str, text: str) -> bool:
    """Whether a bag's definition of a type has the fields we know. It is parsed, never run."""
    try:
        parsed = PARSERS[encoding](text, name) if encoding == "ros2msg" else PARSERS[encoding](text)
    except Exception:  # the parser's errors are many
        return False
    known = load_types().fielddefs
    return name in parsed and all(
        used in known and [(f.lower(), t) for f, t in known[used][1]] == [(f.lower(), t) for f, t in fields[1]]
        for used, fields in parsed.items()
    )


def _encoding(kind: Any) -> str:
    return {"MSG": "ros2msg", "IDL": "ros2idl"}.get(kind.name, "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
