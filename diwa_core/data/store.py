"""PlayStore: recorded frames and episodes as a Zarr v3 group; arrays are time-major and chunked by time.

Fields, N frames: rgb_static, rgb_gripper uint8 [N, 64, 64, 3]; robot_obs [N, 15], target_pose [N, 6], actions [N, 7] float32, where
actions[t] is executed from frame t to t + 1; scene_obs [N, 24] float32 (simulation only); skill int8 [N], which of SKILLS was
attempted (-1: none). Episodes: `episode_ends` int64 [E], their exclusive ends; `episode_marks` int8 [E], how they ended (SUCCESS,
FAILURE or UNMARKED; absent while nothing is marked).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from diwa_core.config import to_dict
from diwa_core.contract import ACTION_SIZE, IMAGE_SIZE, ROBOT_OBS_SIZE, TARGET_POSE_SIZE, Contract
from diwa_core.errors import ContractError, DataError, DiwaError

FORMAT, FORMAT_VERSION = "diwa_play", 1
CHUNK_FRAMES = 256
SCENE_OBS_SIZE = 24
SUCCESS, FAILURE, UNMARKED = 1, 0, -1


@dataclass(frozen=True)
class Field:
    """Shape of one frame and element type of a stored array; `optional` fields may be absent from a store."""

    shape: tuple[int, ...]
    dtype: str
    optional: bool = False


FIELDS = {
    "rgb_static": Field((IMAGE_SIZE, IMAGE_SIZE, 3), "uint8"),
    "rgb_gripper": Field((IMAGE_SIZE, IMAGE_SIZE, 3), "uint8"),
    "robot_obs": Field((ROBOT_OBS_SIZE,), "float32"),
    "target_pose": Field((TARGET_POSE_SIZE,), "float32"),
    "actions": Field((ACTION_SIZE,), "float32"),
    "scene_obs": Field((SCENE_OBS_SIZE,), "float32", optional=True),
    "skill": Field((), "int8", optional=True),
}


@dataclass
class PlayStore:
    """An open store. Make one with `create` or `open`; `append_episode` writes, `load` and `episodes` read.

    Long episodes are written in parts: `append_frames` as often as needed, then `end_episode`; until then nothing of them counts.
    """

    path: Path
    group: zarr.Group
    contract: Contract
    fields: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    pending: int = 0  # frames appended since the last end of an episode

    @staticmethod
    def create(path: str | Path, contract: Contract, settings: dict | None = None, fields: tuple[str, ...] = tuple(FIELDS)) -> PlayStore:
        """Make an empty store; `settings` (plain JSON: seed, generator) travel with it. Raises DataError if `path` is taken."""
        path = Path(path)
        if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
            raise DataError(f"{path}: expected a free path for a new play store, found something there. Choose another or remove it.")
        missing = [name for name, kind in FIELDS.items() if not kind.optional and name not in fields]
        unknown = [name for name in fields if name not in FIELDS]
        if missing or unknown:
            raise DataError(f"{path}: a play store needs {missing or 'nothing more'} and does not know {unknown or 'nothing else'}.")
        temporary = path.with_name(f".{path.name}.new")  # so that a kill leaves a whole store or none
        shutil.rmtree(temporary, ignore_errors=True)
        group = zarr.open_group(temporary, mode="w", zarr_format=3)
        header = {"format": FORMAT, "version": FORMAT_VERSION, "contract": contract.to_dict(), "settings": settings or {}}
        group.attrs.update(header)
        for name in fields:
            kind = FIELDS[name]
            group.create_array(
                name,
                shape=(0, *kind.shape),
                chunks=(CHUNK_FRAMES, *kind.shape),
                dtype=kind.dtype,
                # the checksum also guards blosc, which reads past the end of a chunk that was cut off
                compressors=[
                    BloscCodec(cname="zstd", clevel=1, shuffle="noshuffle" if kind.dtype == "uint8" else "shuffle"),
                    Crc32cCodec(),
                ],
            )
        group.create_array("episode_ends", shape=(0,), chunks=(4096,), dtype="int64")
        os.replace(temporary, path)
        return PlayStore(path, zarr.open_group(path, mode="r+"), contract, tuple(fields), settings or {})

    @staticmethod
    def create_or_continue(path: str | Path, contract: Contract, settings: dict) -> PlayStore:
        """Make an empty store, or open one that was begun with the same contract and settings, to append what is missing.

        Raises DataError if `path` holds anything else.
        """
        if not (Path(path) / "zarr.json").exists():
            return PlayStore.create(path, contract, settings)
        store = PlayStore.open(path)
        difference = contract.difference(store.contract)
        for key in sorted(settings.keys() | store.settings.keys()):
            wanted, found = settings.get(key), store.settings.get(key)
            if wanted != found:
                difference = f"expected a store made with {key} = {wanted}, found {key} = {found}"
        if difference:
            raise DataError(f"{path}: {difference}. Ask for the same settings, choose another path, or remove this store.")
        return store

    @contextmanager
    def writing(self) -> Iterator[None]:
        """For those who append what is missing: two at once would append the same. Raises DataError while another one does."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{self.path}: another process is writing this store. Wait for it, or choose another path.") from error
            yield
        finally:
            os.close(folder)

    @staticmethod
    def open(path: str | Path) -> PlayStore:
        """Open a store for reading and appending; raises DataError if it is missing, foreign, of another version or broken."""
        path = Path(path)
        if not path.is_dir():
            raise DataError(f"{path}: expected a play store (Zarr group), found nothing. Make one with `python -m diwa_core.sim.play`.")
        try:
            group = zarr.open_group(path, mode="r+")
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: expected a Zarr group, found {type(error).__name__}: {error}.") from error
        found = (group.attrs.get("format"), group.attrs.get("version"))
        if found != (FORMAT, FORMAT_VERSION):
            newer = found[0] == FORMAT and isinstance(found[1], int) and found[1] > FORMAT_VERSION
            mend = " Update diwa to the version that wrote it." if newer else ""
            raise DataError(f"{path}: expected format {FORMAT} version {FORMAT_VERSION}, found {found[0]} version {found[1]}.{mend}")
        try:
            contract = Contract.from_dict(group.attrs["contract"])
        except (KeyError, DiwaError) as error:
            raise DataError(f"{path}: the store's contract cannot be read: {error}") from error
        store = PlayStore(path, group, contract, tuple(name for name in FIELDS if name in group), dict(group.attrs.get("settings", {})))
        store._check()
        return store

    def _check(self) -> None:
        """Raise DataError unless all fields are there with the right shapes and equal lengths."""
        for name, kind in FIELDS.items():
            if name not in self.fields:
                if not kind.optional:
                    raise DataError(f"{self.path}: expected field '{name}', found only {list(self.fields)}. The store is broken.")
                continue
            array = self.group[name]
            if array.shape[1:] != kind.shape or str(array.dtype) != kind.dtype:
                raise DataError(f"{self.path}: field '{name}': expected {kind.dtype} {kind.shape}, found {array.dtype} {array.shape[1:]}.")
            if array.shape[0] < len(self):
                raise DataError(f"{self.path}: field '{name}': expected {len(self)} frames, found {array.shape[0]}. The store is broken.")
            if array.nchunks_initialized < -(-len(self) // CHUNK_FRAMES):
                found = f"{array.nchunks_initialized} chunks"
                raise DataError(f"{self.path}: field '{name}': expected {array.nchunks} chunks, found {found}. The store is broken.")

    def __len__(self) -> int:
        """Frames in complete episodes."""
        return self.episodes[-1][1] if self.episodes else 0

    @property
    def episodes(self) -> list[tuple[int, int]]:
        """Start and exclusive end frame of every episode."""
        if "episode_ends" not in self.group:
            raise DataError(f"{self.path}: expected the array 'episode_ends', found none. The store is broken.")
        ends = [int(end) for end in self.group["episode_ends"][:]]
        if ends and ends[-1] == 0:
            ends.pop()  # its entry was made, but a crash came before its value
        return list(zip([0, *ends][: len(ends)], ends, strict=True))

    @property
    def marks(self) -> list[int]:
        """How every episode ended: SUCCESS, FAILURE or UNMARKED."""
        count = len(self.episodes)
        marks = [int(mark) for mark in self.group["episode_marks"][:count]] if "episode_marks" in self.group else []
        return marks + [UNMARKED] * (count - len(marks))

    def append_episode(self, episode: dict[str, np.ndarray], mark: int = UNMARKED) -> None:
        """Append one episode: every field of the store as an array [T, ...].

        Raises ContractError on a missing field, a wrong shape, unequal lengths or values that are not finite.
        """
        self.drop_frames()
        self.append_frames(episode)
        self.end_episode()
        if mark != UNMARKED:
            self.set_mark(len(self.episodes) - 1, mark)

    def append_frames(self, frames: dict[str, np.ndarray]) -> None:
        """Append frames of the episode being written; raises as `append_episode`."""
        arrays = self._validate(frames)
        start = len(self) + self.pending
        end = start + len(arrays["actions"])
        with zarr.config.set({"array.write_empty_chunks": True}):  # so that a chunk that is not there is always an error
            for name, values in arrays.items():
                array = self.group[name]
                array.resize((end, *array.shape[1:]))
                array[start:end] = values
        self.pending = end - len(self)

    def end_episode(self) -> None:
        """Make an episode of the frames appended; raises DataError when there are none."""
        if not self.pending:
            raise DataError(f"{self.path}: expected frames before the end of an episode, found none.")
        count, end = len(self.episodes), len(self) + self.pending
        if "episode_marks" in self.group:
            self.group["episode_marks"].resize((count,))  # what a crash or `truncate` left behind
        ends = self.group["episode_ends"]  # written last: an episode cut off by a crash does not count
        ends.resize((count + 1,))
        ends[count] = end
        self.pending = 0

    def set_mark(self, episode: int, mark: int) -> None:
        """Say how an episode ended."""
        count = len(self.episodes)
        if "episode_marks" not in self.group:
            self.group.create_array("episode_marks", shape=(0,), chunks=(4096,), dtype="int8", fill_value=UNMARKED)
        marks = self.group["episode_marks"]
        marks.resize((count,))
        marks[episode] = mark

    def drop_frames(self) -> None:
        """Forget the frames of an episode that was not ended."""
        self.pending = 0

    def truncate(self, episodes: int) -> None:
        """Keep the first `episodes` only, and no frames of an episode that was not ended."""
        self.drop_frames()
        self.group["episode_ends"].resize((min(episodes, len(self.episodes)),))

    def extend(self, other: PlayStore) -> None:
        """Append all episodes of a store with the same fields, with their marks."""
        for (start, end), mark in zip(other.episodes, other.marks, strict=True):
            while start < end:
                stop = min(end, start + self.room)
                self.append_frames({name: other.read(name, start, stop) for name in self.fields})
                start = stop
            self.end_episode()
            if mark != UNMARKED:
                self.set_mark(len(self.episodes) - 1, mark)

    @property
    def room(self) -> int:
        """Frames until the chunk being filled is full: parts of this length are written fastest."""
        return CHUNK_FRAMES - (len(self) + self.pending) % CHUNK_FRAMES

    def _validate(self, episode: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if set(episode) != set(self.fields):
            raise ContractError(f"episode: expected fields {sorted(self.fields)}, found {sorted(episode)}.")
        length = len(episode["actions"])
        arrays = {}
        for name, values in episode.items():
            kind, values = FIELDS[name], np.asarray(values)
            if values.shape != (length, *kind.shape) or length == 0:
                raise ContractError(f"episode field '{name}': expected shape {(length, *kind.shape)} with frames, found {values.shape}.")
            if kind.dtype == "uint8" and values.dtype != np.uint8:
                raise ContractError(f"episode field '{name}': expected uint8, found {values.dtype}.")
            if not np.isfinite(values).all():
                raise ContractError(f"episode field '{name}': expected finite values, found some that are not.")
            arrays[name] = values.astype(kind.dtype)
        return arrays

    def load(self, fields: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Read whole fields (None: all) into memory as numpy arrays [N, ...]; raises DataError on an unknown field."""
        names = self.fields if fields is None else tuple(fields)
        unknown = [name for name in names if name not in self.fields]
        if unknown:
            raise DataError(f"{self.path}: expected fields among {list(self.fields)}, found {unknown}.")
        return {name: self.read(name, 0, len(self)) for name in names}

    def read(self, name: str, start: int, end: int) -> np.ndarray:
        """Frames [start, end) of one field; raises DataError if they cannot be decoded."""
        try:
            return np.asarray(self.group[name][start:end])
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.path}: field '{name}' frames {start}..{end} cannot be read: {error}. The store is broken.") from error

    @property
    def content_hash(self) -> str:
        """First 16 hex digits of the SHA-256 over contract, episodes with their marks and every field's bytes (not the compression)."""
        marks = [self.marks] if set(self.marks) - {UNMARKED} else []
        digest = hashlib.sha256(json.dumps([to_dict(self.contract), self.episodes, *marks], sort_keys=True).encode())
        for name in self.fields:
            digest.update(name.encode())
            for start in range(0, len(self), CHUNK_FRAMES):
                digest.update(np.ascontiguousarray(self.read(name, start, min(start + CHUNK_FRAMES, len(self)))).tobytes())
        return digest.hexdigest()[:16]
