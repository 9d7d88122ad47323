"""PlayStore: what is written comes back, and what is missing, foreign or broken is refused."""

import json

import numpy as np
import pytest

from diwa_core.contract import Contract
from diwa_core.data.store import FIELDS, PlayStore
from diwa_core.errors import ContractError, DataError


def make_episode(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    episode = {}
    for name, kind in FIELDS.items():
        if np.dtype(kind.dtype).kind in "ui":
            episode[name] = rng.integers(0, 100, (length, *kind.shape)).astype(kind.dtype)
        else:
            episode[name] = rng.normal(size=(length, *kind.shape)).astype(kind.dtype)
    return episode


@pytest.fixture
def store(tmp_path):
    made = PlayStore.create(tmp_path / "play", Contract(), {"seed": 4})
    made.append_episode(make_episode(300, seed=1))
    made.append_episode(make_episode(7, seed=2))
    return made


def test_episodes_come_back_bit_by_bit(store):
    opened = PlayStore.open(store.path)
    assert opened.episodes == [(0, 300), (300, 307)]
    assert opened.contract == Contract() and opened.settings == {"seed": 4}
    loaded = opened.load()
    for name, values in make_episode(300, seed=1).items():
        np.testing.assert_array_equal(loaded[name][:300], values)
    for name, values in make_episode(7, seed=2).items():
        np.testing.assert_array_equal(loaded[name][300:], values)


def test_append_after_reopening(store):
    PlayStore.open(store.path).append_episode(make_episode(5, seed=3))
    assert PlayStore.open(store.path).episodes[-1] == (307, 312)


def test_content_hash_follows_content_only(store, tmp_path):
    other = PlayStore.create(tmp_path / "other", Contract(), {"seed": 5})
    other.append_episode(make_episode(300, seed=1))
    assert other.content_hash != store.content_hash
    other.append_episode(make_episode(7, seed=2))
    assert other.content_hash == PlayStore.open(store.path).content_hash


def test_cut_off_episode_does_not_count(store):
    array = store.group["actions"]
    array.resize((400, 7))
    opened = PlayStore.open(store.path)
    assert len(opened) == 307
    opened.append_episode(make_episode(3, seed=9))
    np.testing.assert_array_equal(opened.load(("actions",))["actions"][307:], make_episode(3, seed=9)["actions"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda e: e.pop("actions"), "fields"),
        (lambda e: e.update(rgb_static=e["rgb_static"][:, :32]), "rgb_static"),
        (lambda e: e.update(rgb_static=e["rgb_static"].astype(np.float32)), "uint8"),
        (lambda e: e.update(robot_obs=e["robot_obs"][:-1]), "robot_obs"),
        (lambda e: e["target_pose"].__setitem__((2, 1), np.nan), "finite"),
    ],
)
def test_bad_episode_is_refused_and_leaves_the_store(store, change, word):
    episode = make_episode(6)
    change(episode)
    with pytest.raises(ContractError, match=word):
        store.append_episode(episode)
    assert PlayStore.open(store.path).episodes == [(0, 300), (300, 307)]


def test_missing_store(tmp_path):
    with pytest.raises(DataError, match="found nothing"):
        PlayStore.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="Zarr group"):
        PlayStore.open(tmp_path / "empty")


def test_taken_path(store):
    with pytest.raises(DataError, match="free path"):
        PlayStore.create(store.path, Contract())


def test_unknown_field(store):
    with pytest.raises(DataError, match="'depth'"):
        store.load(("depth",))


def edit_header(store: PlayStore, change) -> None:
    path = store.path / "zarr.json"
    header = json.loads(path.read_text())
    change(header["attributes"])
    path.write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: a.update(version=2), "found diwa_play version 2"),
        (lambda a: a.update(format="other"), "found other"),
        (lambda a: a.pop("contract"), "contract"),
        (lambda a: a["contract"].update(colour="red"), "colour"),
    ],
)
def test_foreign_store(store, change, word):
    edit_header(store, change)
    with pytest.raises(DataError, match=word):
        PlayStore.open(store.path)


def test_not_json(store):
    (store.path / "zarr.json").write_text("{ not json")
    with pytest.raises(DataError, match="Zarr group"):
        PlayStore.open(store.path)


def test_field_that_is_missing_or_short(store):
    store.group["robot_obs"].resize((100, 15))
    with pytest.raises(DataError, match="expected 307 frames, found 100"):
        PlayStore.open(store.path)
    del store.group["robot_obs"]
    with pytest.raises(DataError, match="'robot_obs'"):
        PlayStore.open(store.path)


def test_broken_and_missing_chunks(store):
    chunk = store.path / "rgb_static" / "c" / "0" / "0" / "0" / "0"
    content = chunk.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for broken in (content[: len(content) // 2], content[:-1], bytes(flipped), b""):
        chunk.write_bytes(broken)
        with pytest.raises(DataError, match="rgb_static"):
            PlayStore.open(store.path).load(("rgb_static",))
    chunk.unlink()
    with pytest.raises(DataError, match="rgb_static"):
        PlayStore.open(store.path)


def test_an_episode_whose_end_was_never_written_does_not_count(store):
    store.group["episode_ends"].resize((3,))  # what a kill between the two steps of the commit leaves
    opened = PlayStore.open(store.path)
    assert opened.episodes == [(0, 300), (300, 307)] and len(opened) == 307
    opened.append_episode(make_episode(5, seed=3))
    assert PlayStore.open(store.path).episodes == [(0, 300), (300, 307), (307, 312)]


def test_a_store_is_continued_only_with_the_settings_it_was_begun_with(store):
    assert PlayStore.create_or_continue(store.path, Contract(), {"seed": 4}).episodes == store.episodes
    with pytest.raises(DataError, match="expected a store made with seed = 5, found seed = 4"):
        PlayStore.create_or_continue(store.path, Contract(), {"seed": 5})
    with pytest.raises(DataError, match="noise"):
        PlayStore.create_or_continue(store.path, Contract(), {"seed": 4, "noise": 1.0})


def test_two_writers_of_one_store_do_not_append_the_same_episodes_twice(store):
    with store.writing():
        with pytest.raises(DataError, match="another process is writing this store"), PlayStore.open(store.path).writing():
            pass
        assert len(PlayStore.open(store.path)) == len(store)  # reading is free
    with store.writing():
        pass


def test_a_store_is_begun_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr("diwa_core.data.store.os", None)  # ends as a kill before the last step does
    with pytest.raises(AttributeError):
        PlayStore.create_or_continue(tmp_path / "play", Contract(), {"seed": 4})
    monkeypatch.undo()
    assert not (tmp_path / "play").exists()
    assert PlayStore.create_or_continue(tmp_path / "play", Contract(), {"seed": 4}).episodes == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["play"]
