"""One run of a skill: what the policy does with each latent, by the rules of an episode (docs/architecture.md); no ROS in here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Move(Enum):
    """What to do with a latent."""

    IGNORE = auto()  # from before the filter was reset
    HOLD = auto()  # warm-up: publish a one-step hold chunk
    KEEP = auto()  # the last chunk still covers this frame
    SAMPLE = auto()  # publish a new chunk
    FINISH = auto()  # max_steps policy steps are over


@dataclass
class SkillRun:
    """Bookkeeping of one run; `horizon` is the length of the policy's chunks. Stamps in nanoseconds."""

    skill: str
    max_steps: int
    step_ns: int
    horizon: int
    seen_frames: int | None = None  # of the last latent, also before the run; the filter's counter falls when it is reset
    seen_ns: int = 0  # its stamp
    begun: bool = False
    first_ns: int | None = None  # stamp of the first policy step
    chunk_ns: int | None = None  # stamp of the last chunk
    steps: int = 0  # policy steps so far
    chunks: int = 0

    def decide(self, stamp_ns: int, frames: int, warmup_frames: int) -> Move:
        """The move for the latent of `stamp_ns`, the `frames`-th since the filter's reset."""
        if self._was_reset(stamp_ns, frames, warmup_frames):
            self.begun, self.chunk_ns = True, None
        self.seen_frames, self.seen_ns = frames, stamp_ns
        if not self.begun:
            return Move.IGNORE
        if self.first_ns is not None:
            self.steps = round((stamp_ns - self.first_ns) / self.step_ns)
            if self.steps >= self.max_steps:
                self.steps = self.max_steps
                return Move.FINISH
        if frames < warmup_frames:
            return Move.HOLD
        if self.chunk_ns is not None and round((stamp_ns - self.chunk_ns) / self.step_ns) < self.horizon:
            return Move.KEEP
        if self.first_ns is None:
            self.first_ns = stamp_ns
        self.chunk_ns = stamp_ns
        self.chunks += 1
        return Move.SAMPLE

    def _was_reset(self, stamp_ns: int, frames: int, warmup_frames: int) -> bool:
        """Whether the filter began anew; its very first frame may have been lost on a busy machine. Copies count for nothing."""
        if self.seen_frames is None:
            return frames <= warmup_frames
        return frames == 1 or frames < self.seen_frames or (frames == self.seen_frames and stamp_ns != self.seen_ns)
