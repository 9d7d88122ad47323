"""Counts what arrives during one episode against what the contract promises: frames by header stamp, expected by rate and duration."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from diwa_core.contract import Contract
from diwa_core.data.bag_format import Episode

SLACK_FRAMES = 2  # topics of one tick arrive a frame apart: an episode's borders are not a loss
MAX_LOSS = 0.02
STATE_TOPICS = ("joint_states", "current_pose", "target_pose", "executed_action")  # each at least once per frame


def rated_topics(contract: Contract) -> tuple[str, ...]:
    """Topics that must arrive at the contract's rate, with their slash."""
    return tuple(f"/{name}" for name in (*(stream.topic for stream in contract.images), *STATE_TOPICS))


def header_stamp_ns(data: bytes) -> int:
    """Stamp of a serialized message that begins with a std_msgs/Header, nanoseconds; 0 where it is too short (CDR, XCDR1)."""
    if len(data) < 12:
        return 0
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return seconds * 1_000_000_000 + nanoseconds


@dataclass
class _Stream:
    frames: int = 0
    first_ns: int = 0
    last_ns: int = 0
    backwards: int = 0

    def take(self, stamp_ns: int) -> None:
        """Count a frame; a copy of the last one is none."""
        if self.frames and stamp_ns <= self.last_ns:
            self.backwards += stamp_ns < self.last_ns
        else:
            self.frames += 1
        self.first_ns = min(self.first_ns, stamp_ns) if self.first_ns else stamp_ns
        self.last_ns = stamp_ns


class EpisodeAudit:
    """Counts one episode after the other."""

    def __init__(self, contract: Contract, max_loss: float = MAX_LOSS, real_time: bool = True) -> None:
        """max_loss: share of a topic's frames, above which an episode is bad. real_time: silence of everything counts as loss, too."""
        self.rate_hz, self.max_loss, self.real_time = contract.rate_hz, max_loss, real_time
        self.rated = rated_topics(contract)
        self.begin()

    def begin(self) -> None:
        """Forget; the next episode begins."""
        self.received: dict[str, int] = {}
        self.streams = {topic: _Stream() for topic in self.rated}
        self.first_log_ns = 0

    def take(self, topic: str, log_ns: int, data: bytes) -> None:
        """Count one message that is in the bag. log_ns: when it was received."""
        self.received[topic] = self.received.get(topic, 0) + 1
        if topic in self.streams:
            self.streams[topic].take(header_stamp_ns(data))
            self.first_log_ns = self.first_log_ns or log_ns

    def finish(self, index: int, end_log_ns: int, dropped: dict[str, int], outcome: str = "", skill: str = "", note: str = "") -> Episode:
        """The episode so far, judged. end_log_ns: wall-clock time of its end; dropped: messages by topic that did not get into the bag."""
        heard = [stream for stream in self.streams.values() if stream.frames]
        begin_ns = min((stream.first_ns for stream in heard), default=0)
        end_ns = max((stream.last_ns for stream in heard), default=0)
        length_ns = end_ns - begin_ns
        if self.real_time and self.first_log_ns:
            length_ns = max(length_ns, end_log_ns - self.first_log_ns)
        sent = (stream.frames + dropped.get(topic, 0) for topic, stream in self.streams.items())
        expected = max(round(length_ns * self.rate_hz / 1e9) + 1 if heard else 1, *sent)
        missing = {topic: max(expected - stream.frames - SLACK_FRAMES, dropped.get(topic, 0), 0) for topic, stream in self.streams.items()}
        missing |= {topic: expected for topic, stream in self.streams.items() if not stream.frames}
        return Episode(
            index,
            outcome,
            skill,
            note,
            begin_ns,
            end_ns,
            reason=(reason := "; ".join(self._reasons(expected, missing, dropped))),
            bad=bool(reason),
            received=dict(self.received),
            expected=dict.fromkeys(self.rated, expected),
            missing={topic: number for topic, number in missing.items() if number},
            dropped=dict(dropped),
        )

    def _reasons(self, expected: int, missing: dict[str, int], dropped: dict[str, int]) -> list[str]:
        reasons = []
        for topic, stream in self.streams.items():
            if not stream.frames:
                reasons.append(f"{topic}: nothing received")
            elif missing[topic] > self.max_loss * expected:
                reasons.append(f"{topic}: {missing[topic]} of {expected} frames missing, allowed are {self.max_loss:.1%}")
            if stream.backwards:
                reasons.append(f"{topic}: time went backwards {stream.backwards} times")
        for topic, number in dropped.items():
            if topic not in self.streams and number > self.max_loss * (number + self.received.get(topic, 0)):
                reasons.append(f"{topic}: {number} messages dropped, writing did not keep up")
        return reasons
