"""CALVIN's own data set -> PlayStore.

A folder holds one episode_XXXXXXX.npz per frame and ep_start_end_ids.npy (first and last frame of each recording, both inclusive);
language labels lie in lang_annotations/auto_lang_ann.npy, a pickle: it is read by an unpickler that knows arrays, text and numbers only.

CALVIN does not store the commanded pose: `actions` are absolute, so the command that led to frame t is the one of frame t - 1, and the TCP
itself on the first frame of a recording.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.lib import format as npy

from diwa_core.contract import ACTION_SIZE, ROBOT_OBS_SIZE, TARGET_POSE_SIZE, Contract, ImageStream, model_image
from diwa_core.data.store import SCENE_OBS_SIZE, PlayStore
from diwa_core.errors import DataError
from diwa_core.sim.skills import SKILLS

SIZES = {"rgb_static": 200, "rgb_gripper": 84}  # pixels
MAX_PICKLE_BYTES = 1 << 30
MAX_FRAMES = 10_000_000
IDS, LABELS = "ep_start_end_ids.npy", "lang_annotations/auto_lang_ann.npy"
FIELDS: dict[str, tuple[tuple[int, ...], str]] = {
    **{name: ((size, size, 3), "u1") for name, size in SIZES.items()},
    "robot_obs": ((ROBOT_OBS_SIZE,), "f"),
    "scene_obs": ((SCENE_OBS_SIZE,), "f"),
    "actions": ((ACTION_SIZE,), "f"),
    "rel_actions": ((ACTION_SIZE,), "f"),
}


@dataclass
class CalvinReport:
    """The store, how many frames carry the label of a skill of ours, and what was left out."""

    store: PlayStore
    labelled: int = 0
    notes: list[str] = field(default_factory=list)


def calvin_contract() -> Contract:
    """The contract of CALVIN's cameras."""
    images = [ImageStream(stream.name, stream.topic, SIZES[stream.name], SIZES[stream.name]) for stream in Contract().images]
    return replace(Contract(), name="calvin", images=tuple(images))


def import_calvin(folder: str | Path, out: str | Path, report: Callable[[str, float], None] = lambda stage, done: None) -> CalvinReport:
    """Make or continue a store of one folder (training/ or validation/) of the data set.

    Raises DataError when the folder is not one, or a file of it is missing, damaged or holds what it should not.
    """
    folder = Path(folder)
    recordings = read_recordings(folder / IDS)
    settings = {"generator": "calvin", "recordings": len(recordings), "frames": sum(last - first + 1 for first, last in recordings)}
    notes: list[str] = []
    labels = read_labels(folder / LABELS, notes)
    store = PlayStore.create_or_continue(out, calvin_contract(), settings)
    result = CalvinReport(store, notes=notes)
    total = settings["frames"]
    with store.writing():
        for first, last in recordings[len(store.episodes) :]:
            _append_recording(store, folder, first, last, labels, lambda: report("import", (len(store) + store.pending) / total))
            store.end_episode()
    result.labelled = int((store.load(("skill",))["skill"] >= 0).sum())
    return result


def _append_recording(
    store: PlayStore, folder: Path, first: int, last: int, labels: list[tuple[int, int, int]], report: Callable[[], None]
) -> None:
    command, number = None, first
    while number <= last:
        rows = []
        for n in range(number, min(last + 1, number + store.room)):
            frame = read_frame(folder / f"episode_{n:07d}.npz")
            target, command = frame["robot_obs"][:TARGET_POSE_SIZE] if command is None else command, frame["actions"][:TARGET_POSE_SIZE]
            rows.append(_make_row(frame, target, _find_label(labels, n)))
        store.append_frames({name: np.stack([row[name] for row in rows]) for name in store.fields})
        number += len(rows)
        report()


def _make_row(frame: dict[str, np.ndarray], target_pose: np.ndarray, skill: int) -> dict[str, Any]:
    action = np.clip(frame["rel_actions"], -1, 1)
    action[6] = 1.0 if action[6] >= 0 else -1.0
    row = {name: model_image(frame[name]) for name in SIZES}
    row |= {"robot_obs": frame["robot_obs"], "target_pose": target_pose, "actions": action}
    return row | {"scene_obs": frame["scene_obs"], "skill": np.int8(skill)}


def _find_label(labels: list[tuple[int, int, int]], number: int) -> int:
    """The skill of the latest window that holds a frame, -1 for none."""
    return next((skill for first, last, skill in reversed(labels) if first <= number <= last), -1)


# -- files -----------------------------------------------------------------------------------------------------------------------------


def read_recordings(path: Path) -> list[tuple[int, int]]:
    """(first, last) frame of every recording. Raises DataError."""
    ids = _read_npy(path, "the recordings' first and last frames [N, 2]")
    if ids.ndim != 2 or ids.shape[1] != 2 or ids.dtype.kind not in "iu" or not len(ids):
        raise DataError(f"{path}: expected whole numbers [N, 2], found {ids.dtype} {ids.shape}.")
    found = [(int(first), int(last)) for first, last in ids]
    if any(first < 0 or last < first for first, last in found) or sum(last - first + 1 for first, last in found) > MAX_FRAMES:
        raise DataError(f"{path}: expected first frames before last ones and at most {MAX_FRAMES} frames, found others.")
    return found


def read_frame(path: Path) -> dict[str, np.ndarray]:
    """One frame's arrays, floats as float64. Raises DataError on a missing file, field, shape or type; never unpickles."""
    frame = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name, (shape, kind) in FIELDS.items():
                with archive.open(f"{name}.npy") as stream:
                    found, _, dtype = _read_header(stream)
                    if found != shape or dtype.hasobject or not (dtype == np.uint8 if kind == "u1" else dtype.kind == kind):
                        raise DataError(f"{path}: {name}: expected {'uint8' if kind == 'u1' else 'floats'} {shape}, found {dtype} {found}.")
                    data = stream.read(int(np.prod(shape)) * dtype.itemsize)
                values = np.frombuffer(data, dtype).reshape(shape)
                frame[name] = values if kind == "u1" else values.astype(np.float64)
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected this frame of the data set, found no file. Copy the data set again.") from error
    except KeyError as error:
        raise DataError(f"{path}: expected the fields {', '.join(FIELDS)}; {error}.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read as a frame ({error}). Copy it again.") from error
    return frame


def read_labels(path: Path, notes: list[str]) -> list[tuple[int, int, int]]:
    """(first frame, last frame, number of the skill) of every labelled window of a skill of ours; [] without the file. Raises DataError."""
    if not path.exists():
        notes.append(f"no {LABELS}: no frame carries a skill")
        return []
    labels = read_object_array(path)
    try:
        tasks, windows = list(labels["language"]["task"]), [(int(first), int(last)) for first, last in labels["info"]["indx"]]
        if len(tasks) != len(windows):
            raise ValueError(f"{len(tasks)} tasks for {len(windows)} windows")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path}: expected language.task and info.indx of one length, found others ({error}).") from error
    known = [(*window, SKILLS.index(task)) for task, window in zip(tasks, windows, strict=True) if task in SKILLS]
    if len(known) < len(tasks):
        notes.append(f"{len(tasks) - len(known)} of {len(tasks)} labelled windows are of other tasks and carry no skill")
    return known


def read_object_array(path: Path) -> Any:
    """What lies in a .npy file of one object, without running any of it. Raises DataError on anything but arrays, text and numbers."""
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise DataError(f"{path}: expected at most {MAX_PICKLE_BYTES} bytes, found {path.stat().st_size}.")
    with path.open("rb") as stream:
        try:
            shape, _, dtype = _read_header(stream)
            if not dtype.hasobject or shape != ():
                raise ValueError(f"expected one object, found {dtype} {shape}")
            value = _PlainUnpickler(stream).load()
        except (pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, ImportError) as error:
            raise DataError(
                f"{path}: expected a dictionary of arrays, text and numbers, found what cannot be read safely: {error}."
            ) from error
        except (MemoryError, OverflowError, RecursionError, SystemError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: is damaged ({type(error).__name__}: {error}). Copy it again.") from error
    return value.item() if isinstance(value, np.ndarray) and value.shape == () else value


class _PlainUnpickler(pickle.Unpickler):
    """Knows what numpy needs to rebuild arrays and scalars, and nothing else."""

    ALLOWED: ClassVar = {
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # bytes, in the oldest protocols
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")
        return super().find_class(module, name)


def _read_npy(path: Path, what: str) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path}: expected {what}, found no file. Give training/ or validation/ of the data set.")
    try:
        with path.open("rb") as stream:
            shape, fortran, dtype = _read_header(stream)
            expected = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
            if dtype.hasobject or expected > path.stat().st_size:
                raise ValueError(f"{dtype} {shape} does not fit into {path.stat().st_size} bytes")
            return np.frombuffer(stream.read(expected), dtype).reshape(shape, order="F" if fortran else "C")
    except (ValueError, EOFError, OSError, TypeError, SyntaxError, OverflowError) as error:
        raise DataError(f"{path}: expected {what}, found what cannot be read ({error}).") from error


def _read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype at the beginning of a .npy file."""
    version = npy.read_magic(stream)
    return npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)
