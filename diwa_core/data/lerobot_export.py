"""PlayStore -> LeRobot data set, format v3.0: Parquet files with PNG pictures inside, and metadata. Nothing is lost on the way.

Features: observation.images.static and .gripper, observation.state (robot_obs), observation.target_pose, in simulation
observation.environment_state (scene_obs), action, next.done, next.success (true on the last frame of an episode marked as a success).
The task of a frame is the skill it is labelled with, or "play".
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from diwa_core.data.store import CHUNK_FRAMES, SUCCESS, PlayStore
from diwa_core.errors import DataError, SetupError
from diwa_core.sim.skills import SKILLS

if TYPE_CHECKING:
    import pyarrow

VERSION, FILES_PER_CHUNK, FILE_BYTES = "v3.0", 1000, 100 << 20
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
PLAY = "play"
IMAGES = {"rgb_static": "observation.images.static", "rgb_gripper": "observation.images.gripper"}
VECTORS = {
    "robot_obs": "observation.state",
    "target_pose": "observation.target_pose",
    "scene_obs": "observation.environment_state",
    "actions": "action",
}
POSE_NAMES = ["x", "y", "z", "roll", "pitch", "yaw"]
NAMES = {
    "robot_obs": [*POSE_NAMES, "gripper_width", *(f"joint_{i}" for i in range(1, 8)), "gripper_action"],
    "target_pose": POSE_NAMES,
    "actions": [*(f"delta_{name}" for name in POSE_NAMES), "gripper"],
}
INDICES = {"frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64"}
FLAGS = ("next.done", "next.success")


@dataclass
class Statistics:
    """Running minimum, maximum, mean and standard deviation of one feature, per component; pictures per colour, in [0, 1]."""

    count: int = 0
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    total: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0

    def add(self, values: np.ndarray, frames: int) -> None:
        """values [n, C]: of `frames` frames."""
        values = values.astype(np.float64)
        low, high = values.min(0), values.max(0)
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        self.total, self.squares = self.total + values.mean(0) * frames, self.squares + np.square(values).mean(0) * frames
        self.count += frames

    def to_dict(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """As in stats.json."""
        mean = self.total / self.count
        values = {"min": self.low, "max": self.high, "mean": mean, "std": np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))}
        return {name: np.reshape(value, shape).tolist() for name, value in values.items()} | {"count": [self.count]}


@dataclass
class _Progress:
    """Where the next rows go."""

    file: int = 0
    bytes: int = 0
    writer: pyarrow.parquet.ParquetWriter | None = None
    episodes: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)


def export_lerobot(store: PlayStore, out: str | Path, report: Callable[[str, float], None] = lambda stage, done: None) -> Path:
    """Write the whole store to a new folder; a kill leaves nothing there.

    Raises DataError when `out` is taken or the store is empty, SetupError without pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SetupError("export: expected pyarrow, found none. Mend: pip install 'diwa[export]'") from error
    out = Path(out)
    if out.exists():
        raise DataError(f"{out}: expected a free path for a new data set, found something there. Choose another or remove it.")
    if not store.episodes:
        raise DataError(f"{store.path}: expected episodes to export, found none.")
    temporary = out.with_name(f".{out.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    progress = _Progress()
    schema = _make_schema(store)
    for number, (start, end) in enumerate(store.episodes):
        _write_episode(temporary, store, schema, progress, number, start, end)
        report("export", (number + 1) / len(store.episodes))
    progress.writer.close()
    _write_metadata(temporary, store, progress, pyarrow)
    temporary.replace(out)
    return out


def _fields(store: PlayStore) -> Iterator[tuple[str, str]]:
    """(field of the store, feature) of the vectors that are there."""
    return ((name, feature) for name, feature in VECTORS.items() if name in store.fields)


def _make_schema(store: PlayStore) -> pyarrow.Schema:
    import pyarrow as pa

    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [(feature, picture) for feature in IMAGES.values()]
    columns += [(feature, pa.list_(pa.float32(), store.group[name].shape[1])) for name, feature in _fields(store)]
    columns += [(flag, pa.bool_()) for flag in FLAGS]
    return pa.schema([*columns, ("timestamp", pa.float32()), *((name, pa.int64()) for name in INDICES)])


def _write_episode(folder: Path, store: PlayStore, schema: pyarrow.Schema, progress: _Progress, number: int, start: int, end: int) -> None:
    if progress.writer is None or progress.bytes > FILE_BYTES:
        _next_file(folder, schema, progress)
    skills: list[str] = []
    for first in range(start, end, CHUNK_FRAMES):
        last = min(end, first + CHUNK_FRAMES)
        rows = np.arange(first, last)
        labels = store.read("skill", first, last) if "skill" in store.fields else np.full(len(rows), -1)
        names = [SKILLS[label] if 0 <= label < len(SKILLS) else PLAY for label in labels]
        skills += [name for name in dict.fromkeys(names) if name not in skills]
        columns = _read_columns(store, progress, first, last)
        done = rows == end - 1
        columns |= {"next.done": done, "next.success": done & (store.marks[number] == SUCCESS)}
        columns |= {"timestamp": ((rows - start) / store.contract.rate_hz).astype(np.float32)}
        columns |= {"frame_index": rows - start, "episode_index": np.full(len(rows), number), "index": rows}
        columns |= {"task_index": np.array([progress.tasks.setdefault(name, len(progress.tasks)) for name in names])}
        _write_rows(schema, progress, columns)
    progress.episodes.append(
        {
            "episode_index": number,
            "tasks": skills,
            "length": end - start,
            "data/chunk_index": (progress.file - 1) // FILES_PER_CHUNK,
            "data/file_index": (progress.file - 1) % FILES_PER_CHUNK,
            "dataset_from_index": start,
            "dataset_to_index": end,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
    )


def _next_file(folder: Path, schema: pyarrow.Schema, progress: _Progress) -> None:
    import pyarrow.parquet as pq

    if progress.writer is not None:
        progress.writer.close()
    path = folder / DATA_PATH.format(chunk_index=progress.file // FILES_PER_CHUNK, file_index=progress.file % FILES_PER_CHUNK)
    path.parent.mkdir(parents=True, exist_ok=True)
    progress.writer, progress.bytes = pq.ParquetWriter(path, schema), 0
    progress.file += 1


def _read_columns(store: PlayStore, progress: _Progress, first: int, last: int) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name, feature in IMAGES.items():
        images = store.read(name, first, last)
        columns[feature] = [{"bytes": cv2.imencode(".png", image[:, :, ::-1])[1].tobytes(), "path": None} for image in images]
        progress.statistics.setdefault(feature, Statistics()).add(images.reshape(-1, 3) / 255.0, len(images))
    for name, feature in _fields(store):
        columns[feature] = store.read(name, first, last)
        progress.statistics.setdefault(feature, Statistics()).add(columns[feature], last - first)
    return columns


def _write_rows(schema: pyarrow.Schema, progress: _Progress, columns: dict[str, Any]) -> None:
    import pyarrow as pa

    for name in ("timestamp", *INDICES, *FLAGS):
        progress.statistics.setdefault(name, Statistics()).add(np.asarray(columns[name])[:, None], len(columns[name]))
    arrays = []
    for kind in schema:
        values = columns[kind.name]
        if pa.types.is_fixed_size_list(kind.type):
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), kind.type.list_size))
        else:
            arrays.append(pa.array(values, kind.type))
    table = pa.Table.from_arrays(arrays, schema=schema)
    progress.writer.write_table(table)
    progress.bytes += table.nbytes


def _write_metadata(folder: Path, store: PlayStore, progress: _Progress, pa: Any) -> None:
    (folder / "meta").mkdir(exist_ok=True)
    features = _describe_features(store)
    info = {
        "codebase_version": VERSION,
        "robot_type": store.contract.name,
        "total_episodes": len(store.episodes),
        "total_frames": len(store),
        "total_tasks": len(progress.tasks),
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": FILE_BYTES >> 20,
        "video_files_size_in_mb": FILE_BYTES >> 20,
        "fps": round(store.contract.rate_hz),
        "splits": {"train": f"0:{len(store.episodes)}"},
        "data_path": DATA_PATH,
        "video_path": None,
        "features": features,
    }
    shapes = {name: (3, 1, 1) if kind["dtype"] == "image" else tuple(kind["shape"]) for name, kind in features.items()}
    statistics = {name: progress.statistics[name].to_dict(shape) for name, shape in shapes.items()}
    (folder / "meta" / "info.json").write_text(json.dumps(info, indent=4))
    (folder / "meta" / "stats.json").write_text(json.dumps(statistics, indent=4))
    tasks = pa.table({"task_index": list(progress.tasks.values()), "__index_level_0__": list(progress.tasks)})
    # pandas makes the names the index of the table only where it finds this note of its own
    index = {"name": None, "field_name": "__index_level_0__", "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    column = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    note = {"index_columns": ["__index_level_0__"], "column_indexes": [], "columns": [column, index], "pandas_version": "2.0.0"}
    pa.parquet.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(note)}), folder / "meta" / "tasks.parquet")
    path = folder / EPISODES_PATH
    path.parent.mkdir(parents=True)
    pa.parquet.write_table(pa.Table.from_pylist(progress.episodes), path)


def _describe_features(store: PlayStore) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {}
    for name, feature in IMAGES.items():
        features[feature] = {"dtype": "image", "shape": list(store.group[name].shape[1:]), "names": ["height", "width", "channels"]}
    for name, feature in _fields(store):
        size = store.group[name].shape[1]
        features[feature] = {"dtype": "float32", "shape": [size], "names": NAMES.get(name, [f"{name}_{i}" for i in range(size)])}
    features |= {flag: {"dtype": "bool", "shape": [1], "names": None} for flag in FLAGS}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    return features | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in INDICES.items()}
