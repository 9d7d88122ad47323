"""Records messages into bags from a thread of its own: who hands them over never waits. Keeps the last seconds for saving afterwards.

`take` is called for every message; everything else may be called from the same thread at any time and returns at once, with a Future where
the work is done by the writing thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from diwa_core.contract import Contract
from diwa_core.data.bag_audit import MAX_LOSS, EpisodeAudit
from diwa_core.data.bag_format import OUTCOMES, UNMARKED, BagTopic, Episode
from diwa_core.data.bag_writer import COMPRESSIONS, FLUSH_S, BagWriter, DiskFull
from diwa_core.errors import DataError

DRAIN_S = 0.05  # the writing thread looks this often: waking it for every message would cost more than writing
RECENT = "recent"  # beginning of the name of a bag that was saved afterwards


class Packet(NamedTuple):
    """One serialized message. Times in nanoseconds since the epoch, of receiving and of sending."""

    topic: str
    log_ns: int
    publish_ns: int
    data: bytes


@dataclass(frozen=True)
class RecorderSettings:
    """folder: where bags go; queue_bytes: what may wait for the disk; recent_s and recent_bytes: what is kept for saving afterwards;
    max_loss: share of a topic's frames above which an episode is bad; real_time: False in lock-step, where silence is not loss."""

    folder: Path
    compression: str = "none"
    queue_bytes: int = 256 << 20
    recent_s: float = 30.0
    recent_bytes: int = 512 << 20
    min_free_bytes: int = 256 << 20
    max_loss: float = MAX_LOSS
    real_time: bool = True

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS:
            raise DataError(f"recorder: expected compression {' or '.join(COMPRESSIONS)}, found '{self.compression}'.")


@dataclass(frozen=True)
class ClosedBag:
    """A finished bag. last: the episode that closing ended; error: why it ended before it was asked to, empty otherwise."""

    folder: Path
    episodes: list[Episode]
    last: Episode | None = None
    error: str = ""


class RecentMessages:
    """The last `seconds` of all topics, within `max_bytes`."""

    def __init__(self, seconds: float, max_bytes: int) -> None:
        self.length_ns, self.max_bytes = round(seconds * 1e9), max_bytes
        self.packets: deque[Packet] = deque()
        self.bytes = 0

    def add(self, packet: Packet) -> None:
        """Keep one message and forget what is too old or too much."""
        self.packets.append(packet)
        self.bytes += len(packet.data)
        while self.bytes > self.max_bytes or packet.log_ns - self.packets[0].log_ns > self.length_ns:
            self.bytes -= len(self.packets.popleft().data)
            if not self.packets:
                return

    def since(self, seconds: float) -> list[Packet]:
        """The last `seconds`, or everything if 0."""
        if not self.packets:
            return []
        oldest_ns = self.packets[-1].log_ns - round(seconds * 1e9) if seconds else 0
        return [packet for packet in self.packets if packet.log_ns >= oldest_ns]

    @property
    def seconds(self) -> float:
        """How much there is."""
        return (self.packets[-1].log_ns - self.packets[0].log_ns) / 1e9 if self.packets else 0.0


class RecordingThread:
    """One bag, written by a thread. `put` never waits: what finds no room in the queue is counted and gone."""

    def __init__(self, writer: BagWriter, audit: EpisodeAudit, queue_bytes: int, skill: str = "") -> None:
        self.writer, self.audit, self.queue_bytes, self.skill = writer, audit, queue_bytes, skill
        self.begin_s = time.monotonic()
        self.dropped = 0
        self.episode = 0
        self.closed: Future[ClosedBag] = Future()
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._items: deque[tuple[int, Callable[[], None] | Packet]] = deque()
        self._bytes, self._accepting = 0, True
        self._episode_dropped: dict[str, int] = {}
        self._ended: list[Future[Episode]] = []  # asked for and not yet answered
        self._last_outcome = UNMARKED
        self._last: Future[Episode] = Future()  # the episode that closing ends
        self._thread = threading.Thread(target=self._run, name="bag-writer", daemon=True)
        self._thread.start()

    def put(self, packet: Packet) -> bool:
        """Hand over one message; False when it was dropped."""
        size = len(packet.data)
        with self._lock:
            if self._accepting and self._bytes + size <= self.queue_bytes:
                self._items.append((size, packet))
                self._bytes += size
                return True
            self._episode_dropped[packet.topic] = self._episode_dropped.get(packet.topic, 0) + 1
            self.dropped += 1
            return False

    def call(self, action: Callable[[], None]) -> None:
        """Run `action` in the writing thread, after everything that was put before."""
        with self._lock:
            self._items.append((0, action))
        self._wake.set()

    def end_episode(self, outcome: str, skill: str = "", note: str = "") -> Future[Episode]:
        """Close the running episode; the next one begins with the next message."""
        ended: Future[Episode] = Future()
        with self._lock:
            dropped, self._episode_dropped = self._episode_dropped, {}
            self._ended.append(ended)
        end_ns = time.time_ns()
        self.call(lambda: self._end_episode(ended, end_ns, dropped, outcome, skill, note))
        return ended

    def close(self, outcome: str = UNMARKED) -> Future[ClosedBag]:
        """Write what waits, end the last episode and close the bag."""
        with self._lock:
            self._accepting, self._last_outcome = False, outcome
        self._wake.set()
        return self.closed

    def _run(self) -> None:
        error = ""
        try:
            self._write_until_closed()
        except (DataError, OSError) as failure:
            error = str(failure)
        try:
            self._finish(error)
        except (DataError, OSError) as failure:
            error = f"{error} {failure}".strip()
        for ended in self._ended:
            if not ended.done():
                ended.set_exception(DataError(error or f"bag {self.writer.folder}: it was closed."))
        last = self._last.result() if self._last.done() else None
        self.closed.set_result(ClosedBag(self.writer.folder, self.writer.recording.episodes, last, error))

    def _write_until_closed(self) -> None:
        flush_s = time.monotonic() + FLUSH_S
        while True:
            self._wake.wait(DRAIN_S)
            self._wake.clear()
            closing = not self._accepting  # read before the queue: nothing comes after it
            while self._items:
                size, item = self._items[0]
                if isinstance(item, Packet):
                    self.writer.write(*item)
                    self.audit.take(item.topic, item.log_ns, item.data)
                else:
                    item()
                with self._lock:
                    self._items.popleft()
                    self._bytes -= size
                if time.monotonic() >= flush_s:
                    self.writer.flush()
                    flush_s = time.monotonic() + FLUSH_S
            if closing:
                return
            if time.monotonic() >= flush_s:
                self.writer.flush()
                flush_s = time.monotonic() + FLUSH_S

    def _finish(self, error: str) -> None:
        """End the last episode and close. What still waits after an error is lost, and counted."""
        with self._lock:
            self._accepting = False
            lost = [item for _, item in self._items if isinstance(item, Packet)]
            waiting = [item for _, item in self._items if not isinstance(item, Packet)]
            self._items.clear()
            dropped = self._episode_dropped
        for packet in lost:
            dropped[packet.topic] = dropped.get(packet.topic, 0) + 1
        self.dropped += len(lost)
        for action in waiting:  # marks of the operator count even when the disk is full
            with suppress(DataError):
                action()
        if self.audit.received or dropped:
            self._end_episode(self._last, time.time_ns(), dropped, self._last_outcome, "", error)
        self.writer.close()

    def _end_episode(self, ended: Future[Episode], end_ns: int, dropped: dict[str, int], outcome: str, skill: str, note: str) -> None:
        episode = self.audit.finish(self.episode, end_ns, dropped, outcome, skill or self.skill, note)
        self.writer.add_episode(episode)
        self.audit.begin()
        self.episode += 1
        ended.set_result(episode)


@dataclass
class BagRecorder:
    """The recorder without ROS: topics, the last seconds, and at most one recording at a time."""

    settings: RecorderSettings
    contract: Contract
    topics: dict[str, BagTopic] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)  # kind -> identity that acts now
    latched: dict[str, Packet] = field(default_factory=dict)  # last messages that a late listener would get, too
    recording: RecordingThread | None = None

    def __post_init__(self) -> None:
        self.recent = RecentMessages(self.settings.recent_s, self.settings.recent_bytes)

    def add_topic(self, topic: BagTopic) -> None:
        """Make a topic known, also to the running recording."""
        if topic.name in self.topics:
            return
        self.topics[topic.name] = topic
        if self.recording:
            self.recording.call(lambda writer=self.recording.writer: writer.add_topic(topic))

    def take(self, packet: Packet, latched: bool = False) -> None:
        """One message of a known topic. latched: a bag that begins later begins with it."""
        self.recent.add(packet)
        if latched:
            self.latched[packet.topic] = packet
        if self.recording:
            self.recording.put(packet)

    def note_checkpoint(self, kind: str, identity: str) -> None:
        """Say which checkpoint acts from now on. kind: 'policy' or 'world_model'."""
        if not identity or self.checkpoints.get(kind) == identity:
            return
        self.checkpoints[kind] = identity
        if self.recording:
            self.recording.call(lambda writer=self.recording.writer: writer.add_checkpoint(kind, identity))

    def start(self, name: str = "", skill: str = "") -> Path:
        """Begin a bag and return its folder. Raises DataError when one is being written or the folder cannot be made, DiskFull."""
        if self.recording:
            raise DataError(f"recorder: expected no recording in progress, found {self.recording.writer.folder}. Stop it first.")
        if name and (Path(name).name != name or name.startswith(".")):
            raise DataError(f"recorder: expected the name of a folder in {self.settings.folder}, found '{name}'.")
        writer = self._open(name or self._free_name(skill or "bag"), {"skill": skill})
        now_ns = time.time_ns()
        self.recording = RecordingThread(writer, self._audit(), self.settings.queue_bytes, skill)
        for packet in self.latched.values():
            self.recording.put(packet._replace(log_ns=now_ns))
        return writer.folder

    def mark(self, outcome: str, skill: str = "", note: str = "") -> Future[Episode]:
        """End the running episode with an outcome. Raises DataError on an unknown one, or when nothing is recorded."""
        check_outcome(outcome)
        if not self.recording:
            raise DataError(f"recorder: expected a recording to mark as '{outcome}', found none. Start one first.")
        return self.recording.end_episode(outcome, skill, note)

    def stop(self, outcome: str = UNMARKED) -> Future[ClosedBag]:
        """End the recording. Raises DataError on an unknown outcome, or when nothing is recorded."""
        if outcome != UNMARKED:
            check_outcome(outcome)
        if not self.recording:
            raise DataError("recorder: expected a recording to stop, found none.")
        recording, self.recording = self.recording, None
        return recording.close(outcome)

    def save_recent(self, seconds: float = 0.0, reason: str = "") -> Future[Path]:
        """Write the last seconds (0: all there is) to a bag of its own, in a thread of its own; older latched messages come first, as at a
        start. Raises DataError when there is nothing."""
        packets = self.recent.since(seconds)
        if not packets:
            raise DataError("recorder: expected recent messages to save, found none: no topic was received. Is the graph running?")
        first_ns, topics = packets[0].log_ns, {packet.topic for packet in packets}
        packets = [*(packet._replace(log_ns=first_ns) for name, packet in self.latched.items() if name not in topics), *packets]
        writer = self._open(self._free_name(RECENT), {"reason": reason})
        saved: Future[Path] = Future()
        threading.Thread(target=_save, args=(writer, packets, self._audit(), reason, saved), name="bag-saver", daemon=True).start()
        return saved

    def _open(self, name: str, notes: dict[str, str]) -> BagWriter:
        writer = BagWriter(
            self.settings.folder / name,
            self.contract,
            self.settings.compression,
            self.settings.min_free_bytes,
            notes={"name": name, **notes},
        )
        for topic in self.topics.values():
            writer.add_topic(topic)
        for kind, identity in self.checkpoints.items():
            writer.add_checkpoint(kind, identity)
        return writer

    def _audit(self) -> EpisodeAudit:
        return EpisodeAudit(self.contract, self.settings.max_loss, self.settings.real_time)

    def _free_name(self, beginning: str) -> str:
        """`beginning` and the time, numbered where that is taken."""
        name = f"{beginning}_{time.strftime('%Y%m%d_%H%M%S')}"
        names = (name, *(f"{name}_{number}" for number in range(2, 1000)))
        return next(name for name in names if not (self.settings.folder / name).exists())


def check_outcome(outcome: str) -> None:
    """Raise DataError unless `outcome` is one of OUTCOMES."""
    if outcome not in OUTCOMES:
        raise DataError(f"episode mark: expected {', '.join(OUTCOMES)}; found '{outcome}'.")


def _save(writer: BagWriter, packets: list[Packet], audit: EpisodeAudit, reason: str, saved: Future[Path]) -> None:
    try:
        error = None
        try:
            for packet in packets:
                writer.write(*packet)
                audit.take(packet.topic, packet.log_ns, packet.data)
        except DiskFull as full:
            error = full
        writer.add_episode(audit.finish(0, packets[-1].log_ns, {}, note=reason))
        writer.close()
    except (DataError, OSError) as failure:
        error = failure
    if error:
        saved.set_exception(error)
    else:
        saved.set_result(writer.folder)
