"""The export has the files, columns and types of LeRobot's format v3.0, and what was in the store."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_store import make_episode

from diwa_core.cli.main import main
from diwa_core.contract import Contract
from diwa_core.data import lerobot_export
from diwa_core.data.lerobot_export import export_lerobot
from diwa_core.data.store import SUCCESS, PlayStore
from diwa_core.errors import DataError
from diwa_core.sim.skills import SKILLS


@pytest.fixture
def store(tmp_path):
    made = PlayStore.create(tmp_path / "play", Contract())
    for number, length in enumerate((9, 300, 5)):
        episode = make_episode(length, seed=number)
        episode["skill"] = np.full(length, -1 if number == 0 else number, np.int8)
        made.append_episode(episode, SUCCESS if number == 2 else -1)
    return made


def test_every_frame_is_there_as_it_was(store, tmp_path):
    assert main(["data", "export", str(store.path), "--out", str(tmp_path / "out")]) == 0
    rows = pq.read_table(tmp_path / "out" / "data" / "chunk-000" / "file-000.parquet").to_pylist()
    loaded = store.load()
    assert [row["index"] for row in rows] == list(range(314))
    for number in (0, 9, 308, 313):
        row = rows[number]
        picture = np.array(Image.open(io.BytesIO(row["observation.images.gripper"]["bytes"])))
        np.testing.assert_array_equal(picture, loaded["rgb_gripper"][number])
        np.testing.assert_array_equal(np.float32(row["action"]), loaded["actions"][number])
        np.testing.assert_array_equal(np.float32(row["observation.state"]), loaded["robot_obs"][number])
    assert [row["frame_index"] for row in rows[7:11]] == [7, 8, 0, 1] and rows[10]["timestamp"] == pytest.approx(1 / 30)
    assert [row["index"] for row in rows if row["next.done"]] == [8, 308, 313]
    assert [row["index"] for row in rows if row["next.success"]] == [313]
    assert [row["task_index"] for row in (rows[0], rows[9], rows[313])] == [0, 1, 2]


def test_metadata_describes_the_files(store, tmp_path):
    out = export_lerobot(store, tmp_path / "out")
    info, stats = (json.loads((out / "meta" / name).read_text()) for name in ("info.json", "stats.json"))
    assert info["codebase_version"] == "v3.0" and info["fps"] == 30
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 314, 3)
    schema = pq.read_schema(out / info["data_path"].format(chunk_index=0, file_index=0))
    assert set(info["features"]) == set(schema.names) == set(stats)
    for name, kind in info["features"].items():
        if kind["dtype"] == "image":
            assert str(schema.field(name).type) == "struct<bytes: binary, path: string>"
        else:
            name_of = {"float32": "float"}.get(kind["dtype"], kind["dtype"])
            size = kind["shape"][0]
            wanted = name_of if size == 1 else f"fixed_size_list<element: {name_of}>[{size}]"
            assert str(schema.field(name).type) == wanted
    np.testing.assert_allclose(stats["action"]["mean"], store.load(("actions",))["actions"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["action"]["std"], store.load(("actions",))["actions"].std(0), rtol=1e-4)
    red = store.load(("rgb_static",))["rgb_static"][..., 0] / 255
    assert np.shape(stats["observation.images.static"]["mean"]) == (3, 1, 1)
    assert stats["observation.images.static"]["mean"][0][0][0] == pytest.approx(red.mean())
    tasks = pq.read_table(out / "meta" / "tasks.parquet").to_pydict()
    assert tasks == {"task_index": [0, 1, 2], "__index_level_0__": ["play", SKILLS[1], SKILLS[2]]}
    note = json.loads(pq.read_schema(out / "meta" / "tasks.parquet").metadata[b"pandas"])
    assert note["index_columns"] == ["__index_level_0__"] and {column["field_name"] for column in note["columns"]} == set(tasks)
    episodes = pq.read_table(out / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    assert [(row["dataset_from_index"], row["dataset_to_index"], row["length"]) for row in episodes] == [
        (0, 9, 9),
        (9, 309, 300),
        (309, 314, 5),
    ]
    assert [row["tasks"] for row in episodes] == [["play"], [SKILLS[1]], [SKILLS[2]]]


def test_large_data_is_split_into_files(store, tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_export, "FILE_BYTES", 1 << 20)
    monkeypatch.setattr(lerobot_export, "FILES_PER_CHUNK", 1)
    out = export_lerobot(store, tmp_path / "out")
    episodes = pq.read_table(out / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    for row in episodes:
        path = lerobot_export.DATA_PATH.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        assert row["episode_index"] in pq.read_table(out / path).to_pydict()["episode_index"]
    assert [row["data/chunk_index"] for row in episodes] == [0, 0, 1]


def test_taken_path_and_empty_store_are_refused(store, tmp_path):
    with pytest.raises(DataError, match="expected a free path"):
        export_lerobot(store, store.path)
    with pytest.raises(DataError, match="expected episodes to export, found none"):
        export_lerobot(PlayStore.create(tmp_path / "empty", Contract()), tmp_path / "out")
