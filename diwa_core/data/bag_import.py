"""Bags -> PlayStore: frames on the camera clock by the code of the live encoder, cut into episodes at marks, gaps, resets and idle time.

A take is what lies between two marks, or a whole bag without any. Its episodes follow one another without a gap; its mark belongs to the
last of them. Every bag leaves one line in the store's imports.jsonl: what was kept, what was not and why. That line is written last, so an
import that was stopped goes on with the first bag that has none.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from diwa_core.contract import Contract, hold_action, model_image
from diwa_core.data.alignment import FROZEN_FRAMES, FROZEN_MOTION_M, Frame, FrameAligner
from diwa_core.data.bag_format import DISCARD, Episode
from diwa_core.data.bag_format import FAILURE as MARKED_FAILURE
from diwa_core.data.bag_format import SUCCESS as MARKED_SUCCESS
from diwa_core.data.bag_reader import BagReader
from diwa_core.data.marks import is_motion
from diwa_core.data.messages import SampleReader, list_sources, read_image, to_ns
from diwa_core.data.store import FAILURE, FIELDS, SUCCESS, PlayStore
from diwa_core.errors import ConfigError, ContractError, DataError, DiwaError
from diwa_core.sim.skills import SKILLS

LEDGER = "imports.jsonl"
MARK_TOPIC, MARK_TYPE = "episode_mark", "diwa_interfaces/msg/EpisodeMark"
SIM_TOPIC, SIM_TYPE = "sim/state", "diwa_interfaces/msg/SimState"
IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
MARKS = {MARKED_SUCCESS: SUCCESS, MARKED_FAILURE: FAILURE}
HOLE_S = 1.0  # a longer gap is a hole between two recordings, a shorter one is loss
WAIT_FRAMES = 64  # how many frames may wait for the simulator's state of theirs


@dataclass(frozen=True)
class ImportSettings:
    """How bags become episodes; a store keeps them, and goes on only with the same.

    max_skew_s, frozen_*: as for the encoder. idle_s: a longer rest is cut out but for idle_margin_s at both ends (0: keep all).
    max_loss: share of lost frames above which a take is bad and left out, unless keep_bad. min_frames: of an episode worth keeping.
    """

    max_skew_s: float = 0.04
    frozen_frames: int = FROZEN_FRAMES
    frozen_motion_m: float = FROZEN_MOTION_M
    idle_s: float = 1.0
    idle_margin_s: float = 0.34
    max_loss: float = 0.05
    keep_bad: bool = False
    min_frames: int = 8


@dataclass
class BagAudit:
    """What became of one bag; plain JSON. frames: aligned; idle, lost, frozen_or_incomplete: frames that were not or not kept."""

    bag: str
    identity: str
    notes: list[str] = field(default_factory=list)
    messages: dict[str, int] = field(default_factory=dict)
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)  # topic -> count, first reason
    frames: int = 0
    kept: int = 0
    idle: int = 0
    lost: int = 0
    incomplete: int = 0
    duration_s: float = 0.0
    takes: list[dict[str, Any]] = field(default_factory=list)
    episodes: int = 0

    @property
    def idle_share(self) -> float:
        """Share of the aligned frames that the idle filter took out."""
        return self.idle / self.frames if self.frames else 0.0

    def note(self, text: str) -> None:
        """Add a sentence once."""
        if text not in self.notes:
            self.notes.append(text)

    def refuse(self, topic: str, reason: str) -> None:
        """Count a message that could not be used."""
        entry = self.refused.setdefault(topic, {"count": 0, "reason": reason})
        entry["count"] += 1


# -- one bag ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class AlignedFrame:
    """A frame with what only the simulator knows: scene_obs [24] and the number of its episode, None on a robot."""

    frame: Frame
    scene_obs: np.ndarray | None = None
    sim_episode: int | None = None


def resolve_topics(bag: BagReader, contract: Contract, renamed: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Stream name -> (topic, type) in the bag. renamed: topic of the contract -> topic in the bag.

    Topics may lie in a namespace, cameras may be compressed (`<topic>/compressed`). Raises DataError naming what is missing.
    """
    unknown = sorted(set(renamed) - {source.topic for source in list_sources(contract).values()} - {SIM_TOPIC, MARK_TOPIC})
    if unknown:
        raise ConfigError(f"topic '{unknown[0]}': expected one of the contract's, found none of that name to read from elsewhere.")
    found, missing = {}, []
    for name, source in list_sources(contract).items():
        topic = find_topic(bag, source.topic, renamed)
        types = IMAGE_TYPES if source.type == IMAGE_TYPES[0] else (source.type,)
        if topic is None and source.type == IMAGE_TYPES[0]:
            topic = find_topic(bag, f"{source.topic}/compressed", renamed)
        if topic is None:
            same = [other for other, info in bag.topics.items() if info.type in types]
            missing.append(f"/{source.topic} ({source.type}; the bag has {', '.join(sorted(same)) or 'none'} of that type)")
        else:
            bag.check_type(topic, types)
            found[name] = (topic, bag.topics[topic].type)
    if missing:
        raise DataError(f"{bag.path}: expected {'; '.join(missing)}. Name what was renamed: --topic camera/static/image_raw=/camera/color.")
    return found


def find_topic(bag: BagReader, topic: str, renamed: dict[str, str]) -> str | None:
    """The bag's name of a relative topic; None if it is not there or not unique."""
    if topic in renamed:
        return renamed[topic] if renamed[topic] in bag.topics else None
    if f"/{topic}" in bag.topics:
        return f"/{topic}"
    inside = [name for name in bag.topics if name.endswith(f"/{topic}")]
    return inside[0] if len(inside) == 1 else None


def read_frames(
    bag: BagReader, contract: Contract, settings: ImportSettings, audit: BagAudit, renamed: dict[str, str] | None = None
) -> Iterator[AlignedFrame]:
    """The frames of a bag as the live encoder would have aligned them, in order. Raises DataError when topics are missing."""
    streams = resolve_topics(bag, contract, renamed or {})
    names = {topic: name for name, (topic, _) in streams.items()}
    samples = SampleReader(contract, read_any_image(contract))
    aligner = FrameAligner(contract, settings.max_skew_s, 1.0, settings.frozen_frames, settings.frozen_motion_m)
    sim_topic = find_topic(bag, SIM_TOPIC, renamed or {})
    truth = SimTruth() if sim_topic else None
    if sim_topic:
        bag.check_type(sim_topic, (SIM_TYPE,))
    for topic, log_ns, data in bag.messages({*names, *([sim_topic] if sim_topic else [])}):
        audit.messages[topic] = audit.messages.get(topic, 0) + 1
        try:
            message = bag.decode(topic, data)
            if topic == sim_topic:
                truth.take(message)
            else:
                take_sample(aligner, names[topic], samples, message, log_ns, audit)
        except (DiwaError, AttributeError) as error:
            audit.refuse(topic, str(error))
            continue
        frames = [AlignedFrame(frame) for frame in aligner.pop()]
        for name, watch in aligner.freezes.items():
            if watch.is_frozen:
                audit.note(f"{name} repeated one picture while the arm moved: its frames until the next picture were left out")
        yield from truth.complete(frames) if truth else frames
    if truth:
        yield from truth.rest()
    audit.incomplete = aligner.skipped


def take_sample(aligner: FrameAligner, name: str, samples: SampleReader, message: Any, log_ns: int, audit: BagAudit) -> None:
    """Hand one message to the aligner; a clock that jumps back makes it begin anew. Raises ContractError on a message that is no sample."""
    stamp_ns, value = samples.stamp_ns(name, message), samples.value(name, message)
    try:
        aligner.add(name, stamp_ns, value, log_ns / 1e9)
    except DataError:
        back_s = (aligner.streams[name].newest_ns - stamp_ns) / 1e9
        audit.note(f"the clock of {name} jumped back by {back_s:.3f} s: an episode ends there and another begins")
        aligner.restart()
        aligner.add(name, stamp_ns, value, log_ns / 1e9)


class SimTruth:
    """Gives frames the simulator's state of the same stamp; states and frames come in any order."""

    def __init__(self) -> None:
        self.states: dict[int, tuple[np.ndarray, int]] = {}
        self.newest_ns = -1
        self.waiting: deque[AlignedFrame] = deque()

    def take(self, message: Any) -> None:
        """Keep a SimState."""
        stamp_ns = to_ns(message.header.stamp)
        self.states[stamp_ns] = (np.array(message.scene_obs, np.float64), int(message.episode))
        self.newest_ns = stamp_ns
        if len(self.states) > 4 * WAIT_FRAMES:
            del self.states[next(iter(self.states))]

    def complete(self, frames: Iterable[AlignedFrame]) -> Iterator[AlignedFrame]:
        """The frames, these and earlier ones, whose state is known by now or will not come any more."""
        self.waiting.extend(frames)
        while self.waiting:
            stamp_ns = self.waiting[0].frame.stamp_ns
            if stamp_ns not in self.states and self.newest_ns < stamp_ns and len(self.waiting) <= WAIT_FRAMES:
                return
            yield self._give()

    def rest(self) -> Iterator[AlignedFrame]:
        """The frames still waiting at the end."""
        while self.waiting:
            yield self._give()

    def _give(self) -> AlignedFrame:
        aligned = self.waiting.popleft()
        aligned.scene_obs, aligned.sim_episode = self.states.get(aligned.frame.stamp_ns, (None, None))
        return aligned


def read_any_image(contract: Contract) -> Callable[[Any], np.ndarray]:
    """A reader of Image and CompressedImage; of a compressed one the size is looked at before it is unpacked."""
    limit = max(stream.height * stream.width for stream in contract.images) * 64

    def read(message: Any) -> np.ndarray:
        return decompress_image(message, limit) if hasattr(message, "format") else read_image(message)

    return read


def decompress_image(message: Any, max_pixels: int) -> np.ndarray:
    """sensor_msgs/CompressedImage (JPEG or PNG) -> uint8 RGB [H, W, 3]. Raises ContractError."""
    data = np.frombuffer(message.data, np.uint8)
    try:
        width, height = PillowImage.open(io.BytesIO(data)).size
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if width * height <= max_pixels else None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError, cv2.error) as error:
        raise ContractError(f"compressed image: expected JPEG or PNG, found {len(data)} bytes of '{message.format}' ({error}).") from error
    if pixels is None:
        raise ContractError(
            f"compressed image: expected a whole one of the contract's size, found {height} x {width} of '{message.format}'."
        )
    return pixels


# -- episodes --------------------------------------------------------------------------------------------------------------------------


def find_takes(bag: BagReader, renamed: dict[str, str], audit: BagAudit) -> list[Episode]:
    """The marked parts of a bag in order of time: what the recorder noted, or, in a bag of `ros2 bag record`, one before each mark."""
    if bag.recording.episodes:
        return sorted(bag.recording.episodes, key=lambda episode: episode.end_ns)
    topic = find_topic(bag, MARK_TOPIC, renamed)
    if topic is None:
        return []
    bag.check_type(topic, (MARK_TYPE,))
    takes: list[Episode] = []
    for message in bag.messages({topic}):
        try:
            mark = bag.decode(topic, message.data)
        except DataError as error:
            audit.refuse(topic, str(error))
            continue
        end_ns = to_ns(mark.header.stamp) or message.log_ns
        takes.append(Episode(len(takes), str(mark.outcome), str(mark.skill), str(mark.note), 0, end_ns))
    takes.sort(key=lambda take: take.end_ns)
    for before, take in itertools.pairwise(takes):
        take.begin_ns = before.end_ns + 1
    return takes


class EpisodeWriter:
    """Cuts the frames of one bag into episodes of a store."""

    def __init__(self, store: PlayStore, takes: list[Episode], settings: ImportSettings, audit: BagAudit) -> None:
        self.store, self.takes, self.settings, self.audit = store, takes, settings, audit
        self.step_ns = round(1e9 / store.contract.rate_hz)
        self.idle_frames = round(settings.idle_s * store.contract.rate_hz)
        self.margin = round(settings.idle_margin_s * store.contract.rate_hz)
        self.last: AlignedFrame | None = None
        self.take: Episode | None = None
        self._begin_take(None)
        self._begin_episode()
        self._begin_run()

    def add(self, aligned: AlignedFrame) -> None:
        """Take the next frame; the one before is written, for its action is known now."""
        take = self._find_take(aligned.frame.stamp_ns)
        if self.last is None:
            self._begin_take(take)
        else:
            gap_ns = aligned.frame.stamp_ns - self.last.frame.stamp_ns
            follows = 0 < gap_ns < 1.5 * self.step_ns and aligned.sim_episode == self.last.sim_episode
            self._push(self.last, aligned.frame.previous_action if follows else None)
            if not follows:
                self._end_run()
                self._count_gap(gap_ns)
            if take is not self.take:
                self._end_take()
                self._begin_take(take)
        self.last = aligned
        self.audit.frames += 1

    def close(self) -> None:
        """Write what is left; note marks that belong to nothing."""
        if self.last is not None:
            self._push(self.last, None)
            self._end_take()
        seen = {take["index"] for take in self.audit.takes}
        for take in self.takes:
            if take.index not in seen and take.outcome:
                self.audit.note(f"a mark '{take.outcome}' has no frames before it and was ignored")

    # -- takes -------------------------------------------------------------------------------------------------------------------------

    def _find_take(self, stamp_ns: int) -> Episode | None:
        take = next((take for take in self.takes if stamp_ns <= take.end_ns), None)
        return take if take is not None and take.begin_ns <= stamp_ns else None

    def _begin_take(self, take: Episode | None) -> None:
        self.take = take
        self.take_begin = len(self.store.episodes)
        self.take_frames = self.take_lost = 0
        self.markable: int | None = None  # the episode between whose end and the mark nothing happened

    def _end_take(self) -> None:
        self._end_run()
        take = self.take or Episode(-1)
        share = self.take_lost / max(1, self.take_lost + self.take_frames)
        reason = take.reason if take.bad else ""
        if share > self.settings.max_loss:
            reason = f"lost {100 * share:.1f} % of its frames, more than {100 * self.settings.max_loss:g} %"
        if take.outcome == DISCARD:
            reason = "marked to be discarded"
        if reason and (take.outcome == DISCARD or not self.settings.keep_bad):
            self.audit.kept -= len(self.store) - self.store.episodes[self.take_begin][0] if self._episodes_of_take() else 0
            self.store.truncate(self.take_begin)
        elif take.outcome in MARKS and self.markable is not None:
            self.store.set_mark(self.markable, MARKS[take.outcome])
            if take.skill and take.skill not in SKILLS:
                self.audit.note(f"a mark '{take.outcome}' names the skill '{take.skill}', none of {', '.join(SKILLS)}: it has no label")
        elif take.outcome in MARKS:
            self.audit.note(f"a mark '{take.outcome}' has no episode that reaches it and was ignored")
        self.audit.takes.append(
            {
                "index": take.index,
                "outcome": take.outcome,
                "skill": take.skill,
                "frames": self.take_frames,
                "lost": self.take_lost,
                "episodes": self._episodes_of_take(),
                "bad": reason,
            }
        )

    def _episodes_of_take(self) -> int:
        return len(self.store.episodes) - self.take_begin

    def _count_gap(self, gap_ns: int) -> None:
        missing = round(gap_ns / self.step_ns) - 1
        if gap_ns > HOLE_S * 1e9:
            self.audit.note(f"a hole of {gap_ns / 1e9:.1f} s: an episode ends there and another begins")
        elif missing > 0:
            self.audit.lost += missing
            self.take_lost += missing

    # -- frames ------------------------------------------------------------------------------------------------------------------------

    def _push(self, aligned: AlignedFrame, action: np.ndarray | None) -> None:
        """One frame with the action that followed; None: nothing recorded followed, so a hold."""
        gripper = float(aligned.frame.observation.robot_obs[14])
        self.take_frames += 1
        row = self._make_row(aligned, hold_action(gripper) if action is None else action)
        if is_motion(row["actions"], gripper) or not self.idle_frames:
            for held in self.held:
                self._write(held)
            self._begin_run()
            self.has_motion, self.markable = True, None
            self._write(row)
            return
        self.rest_frames += 1
        if self.rest_frames <= self.margin:
            self._write(row)
            return
        self.held.append(row)
        if self.rest_frames == self.idle_frames:
            self._end_episode()
        while self.rest_frames >= self.idle_frames and len(self.held) > self.margin:
            self.held.popleft()
            self.audit.idle += 1

    def _begin_run(self) -> None:
        """From here on nothing rests."""
        self.rest_frames = 0
        self.held: deque[dict[str, np.ndarray]] = deque()

    def _end_run(self) -> None:
        """The next frame does not follow the last one."""
        if self.idle_frames and self.rest_frames >= self.idle_frames:
            self.audit.idle += len(self.held)
        else:
            for held in self.held:
                self._write(held)
        self._begin_run()
        self._end_episode()

    def _make_row(self, aligned: AlignedFrame, action: np.ndarray) -> dict[str, np.ndarray]:
        observation = aligned.frame.observation
        row = {name: model_image(image) for name, image in observation.images.items()}
        row |= {"robot_obs": observation.robot_obs, "target_pose": observation.target_pose, "actions": action}
        row["skill"] = np.int8(self._skill_label())
        if "scene_obs" in self.store.fields:
            if aligned.scene_obs is None:
                stamp_s = aligned.frame.stamp_ns / 1e9
                raise DataError(f"{self.audit.bag}: expected {SIM_TOPIC} at every frame of this store, found none at {stamp_s:.3f} s.")
            row["scene_obs"] = aligned.scene_obs
        return row

    def _skill_label(self) -> int:
        """Of an attempt, if anything tells how it ended: a mark, or the simulator's truth. Otherwise it is play."""
        take = self.take
        known = take is not None and take.skill in SKILLS and ("scene_obs" in self.store.fields or take.outcome in MARKS)
        return SKILLS.index(take.skill) if known else -1

    # -- writing -----------------------------------------------------------------------------------------------------------------------

    def _begin_episode(self) -> None:
        self.rows: list[dict[str, np.ndarray]] = []
        self.room = self.store.room
        self.has_motion = False

    def _write(self, row: dict[str, np.ndarray]) -> None:
        self.rows.append(row)
        if len(self.rows) == self.room:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.store.append_frames({name: np.stack([row[name] for row in self.rows]) for name in self.store.fields})
            self.rows = []
        self.room = self.store.room

    def _end_episode(self) -> None:
        frames = self.store.pending + len(self.rows)
        if not self.has_motion and self.idle_frames:
            self.audit.idle += frames
            self.store.drop_frames()
        elif frames < self.settings.min_frames:
            self.store.drop_frames()
        else:
            self._flush()
            self.markable = len(self.store.episodes)
            self.store.end_episode()
            self.audit.kept += frames
        self._begin_episode()


def import_bag(
    path: str | Path, store: PlayStore, settings: ImportSettings | None = None, renamed: dict[str, str] | None = None
) -> BagAudit:
    """Append the episodes of one bag to a store of the same contract. Raises DataError when nothing of it can be used."""
    settings, renamed = settings or ImportSettings(), renamed or {}
    audit = BagAudit(Path(path).name, identify_bag(path))
    with BagReader(path) as bag:
        check_contract(bag, store.contract)
        writer = EpisodeWriter(store, find_takes(bag, renamed, audit), settings, audit)
        first_ns = last_ns = None
        for aligned in read_frames(bag, store.contract, settings, audit, renamed):
            first_ns, last_ns = first_ns or aligned.frame.stamp_ns, aligned.frame.stamp_ns
            writer.add(aligned)
        writer.close()
        for note in bag.notes:
            audit.note(note)
        if not audit.frames:
            raise DataError(f"{path}: expected frames with every stream of the contract, found none. {explain(audit)}")
        audit.duration_s = max(0.0, (last_ns - first_ns) / 1e9)
    audit.episodes = sum(take["episodes"] for take in audit.takes)
    return audit


def check_contract(bag: BagReader, contract: Contract) -> None:
    """Raise ContractError unless a bag that carries a contract carries this one."""
    difference = contract.difference(bag.recording.contract) if bag.recording.contract else None
    if difference:
        raise ContractError(f"{bag.path}: {difference}. Import it into a store of its own contract.")


def explain(audit: BagAudit) -> str:
    """What was wrong with a bag, in one line."""
    counts = ", ".join(f"{topic}: {count}" for topic, count in sorted(audit.messages.items())) or "none"
    refused = "".join(f" {topic}: {entry['count']} refused ({entry['reason']})" for topic, entry in audit.refused.items())
    return f"Messages read: {counts}.{refused} {' '.join(audit.notes)}".strip()


def identify_bag(path: str | Path) -> str:
    """16 hex digits over names, sizes, beginnings and ends of a bag's files."""
    path, digest = Path(path), hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file() and not file.name.startswith("."))
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:16]


# -- many bags -------------------------------------------------------------------------------------------------------------------------


@dataclass
class ImportReport:
    """What an import did. audits: of the bags added now; done: how many were there before; refused: bag -> reason."""

    store: PlayStore
    audits: list[BagAudit] = field(default_factory=list)
    done: int = 0
    refused: dict[str, str] = field(default_factory=dict)


def import_bags(
    paths: Iterable[str | Path],
    out: str | Path,
    contract: Contract | None = None,
    settings: ImportSettings | None = None,
    renamed: dict[str, str] | None = None,
    workers: int = 1,
    report: Callable[[str, float], None] = lambda stage, done: None,
) -> ImportReport:
    """Make or continue a store of bags, `workers` at a time; the same store for any number of workers.

    contract: for bags that carry none; without it theirs, or the play table's. A bag that cannot be used is reported and left out.
    Raises DataError when the store was made otherwise, or holds another bag of the same name.
    """
    paths, settings, renamed = [Path(path) for path in paths], settings or ImportSettings(), renamed or {}
    doubled = [name for name, count in Counter(path.name for path in paths).items() if count > 1]
    if doubled or workers < 1:
        raise ConfigError(f"bags: expected different names and at least one worker, found '{doubled[:1]}' twice, {workers} workers.")
    result = ImportReport(None)  # type: ignore[arg-type]
    contract, fields = _look_into(paths, contract, renamed, result)
    result.store = store = _open_store(Path(out), contract, settings, fields)
    with store.writing():
        ledger = read_ledger(store.path)
        store.truncate(sum(entry["episodes"] for entry in ledger))
        wanted = _not_yet_imported([path for path in paths if str(path) not in result.refused], ledger, result)
        parts = store.path / ".parts"
        shutil.rmtree(parts, ignore_errors=True)
        jobs = [(path, parts / str(number), contract, settings, renamed, fields) for number, path in enumerate(wanted)]
        for number, (path, outcome) in enumerate(zip(wanted, _run(jobs, workers), strict=True), start=1):
            if isinstance(outcome, str):
                result.refused[str(path)] = outcome
            else:
                part = PlayStore.open(jobs[number - 1][1])
                store.extend(part)
                shutil.rmtree(part.path)
                _append_ledger(store.path, outcome)
                result.audits.append(outcome)
            report("import", number / len(wanted))
        shutil.rmtree(parts, ignore_errors=True)
    return result


def _import_part(
    path: Path, part: Path, contract: Contract, settings: ImportSettings, renamed: dict[str, str], fields: tuple[str, ...]
) -> BagAudit | str:
    """One bag into a store of its own; the reason when it cannot be used."""
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        return import_bag(path, PlayStore.create(part, contract, fields=fields), settings, renamed)
    except DiwaError as error:
        return str(error)


def _run(jobs: list[tuple], workers: int) -> Iterator[BagAudit | str]:
    if workers == 1 or len(jobs) < 2:
        yield from (_import_part(*job) for job in jobs)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs)), cv2.setNumThreads, (1,)) as pool:
        waiting = [pool.apply_async(_import_part, job) for job in jobs]
        yield from (result.get() for result in waiting)
        pool.close()
        pool.join()  # workers that end by themselves give their semaphores back


def _look_into(
    paths: list[Path], contract: Contract | None, renamed: dict[str, str], result: ImportReport
) -> tuple[Contract, tuple[str, ...]]:
    """The one contract of all bags and the fields of their store; bags that cannot be opened are refused."""
    simulated = []
    for path in paths:
        try:
            with BagReader(path) as bag:
                found = bag.recording.contract
                contract = contract or found
                if found and contract.difference(found):
                    raise ContractError(f"{path}: {contract.difference(found)}. Import it into a store of its own.")
                simulated.append(find_topic(bag, SIM_TOPIC, renamed) is not None)
        except DiwaError as error:
            result.refused[str(path)] = str(error)
    return contract or Contract(), tuple(name for name in FIELDS if name != "scene_obs" or (simulated and all(simulated)))


def _open_store(path: Path, contract: Contract, settings: ImportSettings, fields: tuple[str, ...]) -> PlayStore:
    made = {"generator": "bags", **asdict(settings)}
    if not (path / "zarr.json").exists():
        return PlayStore.create(path, contract, made, fields)
    store = PlayStore.create_or_continue(path, contract, made)
    if "scene_obs" in store.fields and "scene_obs" not in fields:
        raise DataError(f"{path}: a store with the simulator's scene_obs; expected {SIM_TOPIC} in every bag. Choose another store.")
    return store


def read_ledger(store: Path) -> list[dict[str, Any]]:
    """The audits of all bags in a store; [] for one that was not made of bags. Raises DataError when it cannot be read."""
    path = store / LEDGER
    text = path.read_text() if path.exists() else ""
    lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]  # the last line was cut off by a crash
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(
            f"{path}: expected a line of JSON for every bag, found other text ({error}). Import the bags into a new store."
        ) from error


def _append_ledger(store: Path, audit: BagAudit) -> None:
    """Rewrites the ledger, which drops a line that was cut off; a crash leaves the old one or the new one."""
    entries = [*read_ledger(store), asdict(audit)]
    temporary = store / f".{LEDGER}"
    with temporary.open("w") as stream:
        stream.writelines(json.dumps(entry) + "\n" for entry in entries)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, store / LEDGER)


def _not_yet_imported(paths: list[Path], ledger: list[dict[str, Any]], result: ImportReport) -> list[Path]:
    """The bags without a line in the ledger. Raises DataError when one has changed since."""
    known = {entry["bag"]: entry["identity"] for entry in ledger}
    wanted = []
    for path in paths:
        if path.name not in known:
            wanted.append(path)
        elif known[path.name] != identify_bag(path):
            raise DataError(f"{path}: was imported before with other contents. Import it into a new store, or under another name.")
        else:
            result.done += 1
    return wanted
