"""CALVIN's data set comes in as it was written, and nothing in it can run code or take the machine down."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diwa_core.cli.main import main
from diwa_core.contract import model_image
from diwa_core.data.calvin_import import FIELDS, IDS, LABELS, import_calvin, read_frame, read_object_array, read_recordings
from diwa_core.data.store import PlayStore
from diwa_core.errors import DataError
from diwa_core.sim.skills import SKILLS


def make_frame(n, **changes):
    rng = np.random.default_rng(n)
    frame = {name: rng.integers(0, 256, shape, dtype=np.uint8) for name, (shape, kind) in FIELDS.items() if kind == "u1"}
    frame |= {name: rng.normal(size=shape) for name, (shape, kind) in FIELDS.items() if kind == "f"}
    frame["depth_static"] = np.zeros((200, 200), np.float32)
    return frame | changes


def make_labels(windows):
    """auto_lang_ann.npy: a dictionary in an object array, as CALVIN writes it."""
    tasks, indices = [task for task, *_ in windows], [(first, last) for _, first, last in windows]
    language = {"ann": ["pull the drawer"] * len(tasks), "task": tasks, "emb": np.zeros((len(tasks), 1, 384), np.float32)}
    return {"language": language, "info": {"episodes": [], "indx": indices}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    np.save(folder / IDS, np.array([[358_482, 358_491], [360_000, 360_005]]))
    for n in (*range(358_482, 358_492), *range(360_000, 360_006)):
        np.savez_compressed(folder / f"episode_{n:07d}.npz", **make_frame(n))
    (folder / LABELS).parent.mkdir()
    labels = make_labels([("open_drawer", 358_484, 358_487), ("lift_red_block_table", 358_488, 358_491), ("turn_on_led", 360_000, 360_002)])
    np.save(folder / LABELS, labels, allow_pickle=True)
    return folder


def test_every_frame_comes_back(dataset, tmp_path, capsys):
    assert main(["data", "import-calvin", str(dataset), "--out", str(tmp_path / "store")]) == 0
    assert "1 of 3 labelled windows are of other tasks" in capsys.readouterr().out
    store = PlayStore.open(tmp_path / "store")
    assert store.episodes == [(0, 10), (10, 16)] and store.contract.name == "calvin" and store.contract.images[0].width == 200
    found = store.load()
    for row, n in enumerate((*range(358_482, 358_492), *range(360_000, 360_006))):
        frame = make_frame(n)
        np.testing.assert_array_equal(found["rgb_gripper"][row], model_image(frame["rgb_gripper"]))
        np.testing.assert_allclose(found["robot_obs"][row], frame["robot_obs"], rtol=1e-6)
        np.testing.assert_allclose(found["scene_obs"][row], frame["scene_obs"], rtol=1e-6)
        np.testing.assert_allclose(found["actions"][row][:6], np.clip(frame["rel_actions"][:6], -1, 1), rtol=1e-6)
        assert found["actions"][row][6] == np.sign(frame["rel_actions"][6])
        commanded = frame["robot_obs"][:6] if n in (358_482, 360_000) else make_frame(n - 1)["actions"][:6]
        np.testing.assert_allclose(found["target_pose"][row], commanded, rtol=1e-6)
    drawer, led = SKILLS.index("open_drawer"), SKILLS.index("turn_on_led")
    assert found["skill"].tolist() == [-1, -1, *[drawer] * 4, *[-1] * 4, *[led] * 3, -1, -1, -1]


def test_import_goes_on_where_it_was_stopped(dataset, tmp_path):
    whole = import_calvin(dataset, tmp_path / "whole").store
    store = import_calvin(dataset, tmp_path / "store").store
    store.truncate(1)
    store.append_frames({name: store.read(name, 0, 3) for name in store.fields})
    assert import_calvin(dataset, tmp_path / "store").store.content_hash == whole.content_hash


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_labels_of_every_pickle_protocol(tmp_path, protocol):
    path = tmp_path / "labels.npy"
    labels = make_labels([("open_drawer", 3, 9)])
    labels["info"]["indx"] = [(np.int64(3), np.int64(9))]
    write_object(path, pickle.dumps(np.array(labels), protocol))
    read = read_object_array(path)
    assert read["info"]["indx"] == [(3, 9)] and read["language"]["emb"].shape == (1, 1, 384)


def write_object(path, pickled):
    """A .npy file of one object with any pickle behind its header."""
    with Path(path).open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"shape": (), "fortran_order": False, "descr": "|O"})
        stream.write(pickled)


class Attack:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("call", [os.system, eval, os.remove, __import__, getattr])
def test_pickle_that_would_run_code_is_refused(tmp_path, call):
    victim = tmp_path / "victim"
    victim.touch()
    argument = {os.system: f"rm {victim}", os.remove: str(victim)}.get(call, f"__import__('os').remove({str(victim)!r})")
    write_object(tmp_path / "labels.npy", pickle.dumps({"language": Attack(call, argument)}))
    with pytest.raises(DataError, match=r"it asks for .*, which could run code"):
        read_object_array(tmp_path / "labels.npy")
    assert victim.exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_labels_are_read_or_refused(tmp_path, data):
    whole = pickle.dumps(np.array(make_labels([("open_drawer", 3, 9)])), 4)
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, max(0, len(damaged) - 1)), st.integers(0, 255)), max_size=6)):
        if damaged:
            damaged[at] = value
    write_object(tmp_path / "labels.npy", bytes(damaged))
    try:
        read_object_array(tmp_path / "labels.npy")
    except DataError:
        pass


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rgb_static": np.zeros((100, 100, 3), np.uint8)}, r"rgb_static: expected uint8 \(200, 200, 3\), found uint8 \(100, 100, 3\)"),
        ({"robot_obs": np.zeros(15, int)}, "robot_obs: expected floats"),
        ({"scene_obs": np.array([{}] * 24)}, "scene_obs: expected floats"),
    ],
)
def test_frames_of_other_shapes_are_refused(tmp_path, changes, reason):
    np.savez_compressed(tmp_path / "episode_0000001.npz", **make_frame(1, **changes))
    with pytest.raises(DataError, match=reason):
        read_frame(tmp_path / "episode_0000001.npz")


def test_missing_and_damaged_files_are_refused(dataset, tmp_path):
    with pytest.raises(DataError, match=r"Give training/ or validation/ of the data set"):
        read_recordings(tmp_path / IDS)
    (tmp_path / IDS).write_bytes((dataset / IDS).read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be read"):
        read_recordings(tmp_path / IDS)
    np.save(tmp_path / IDS, np.array([[5, 3]]))
    with pytest.raises(DataError, match="expected first frames before last ones"):
        read_recordings(tmp_path / IDS)
    with pytest.raises(DataError, match="found no file"):
        read_frame(tmp_path / "episode_0000001.npz")
    whole = (dataset / "episode_0358482.npz").read_bytes()
    (tmp_path / "episode_0000001.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as a frame"):
        read_frame(tmp_path / "episode_0000001.npz")
    fields = make_frame(1)
    del fields["rel_actions"]
    np.savez(tmp_path / "episode_0000001.npz", **fields)
    with pytest.raises(DataError, match=r"expected the fields .*rel_actions"):
        read_frame(tmp_path / "episode_0000001.npz")


def test_set_without_labels_says_so(dataset, tmp_path):
    folder = tmp_path / "validation"
    folder.mkdir()
    np.save(folder / IDS, np.array([[358_482, 358_483]]))
    for n in (358_482, 358_483):
        (folder / f"episode_{n:07d}.npz").write_bytes((dataset / f"episode_{n:07d}.npz").read_bytes())
    report = import_calvin(folder, tmp_path / "store")
    assert report.labelled == 0 and report.notes == [f"no {LABELS}: no frame carries a skill"]
