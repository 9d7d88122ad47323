"""Bags become episodes: the frames they hold, cut where they must be, with marks; and every kind of bad bag is refused or salvaged."""

import shutil
import sqlite3
import struct
from dataclasses import replace

import numpy as np
import pytest
from bag_support import START_NS, STEP_NS, FakeBag, action, frame_image
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin

from diwa_core.cli.main import main
from diwa_core.contract import Contract, model_image
from diwa_core.data.bag_format import CONTRACT, EPISODES, Episode, Recording
from diwa_core.data.bag_import import LEDGER, ImportSettings, find_takes, import_bag, import_bags, read_ledger
from diwa_core.data.bag_reader import BagReader
from diwa_core.data.store import FAILURE, FIELDS, SUCCESS, UNMARKED, PlayStore
from diwa_core.errors import ConfigError, ContractError, DataError
from diwa_core.sim.skills import SKILLS

STATIC = "camera/static/image_raw"
PLAIN_FIELDS = tuple(name for name in FIELDS if name != "scene_obs")


def import_one(tmp_path, bag, path=None, contract=None, fields=PLAIN_FIELDS, **settings):
    """(store, audit) of one bag: a FakeBag, or the path of one."""
    path = path or bag.write(tmp_path / "bag")
    store = PlayStore.create(tmp_path / "store", contract or Contract(), fields=fields)
    audit = import_bag(path, store, ImportSettings(**{"frozen_motion_m": 0.0, **settings}))
    return store, audit


def expect_frames(store, ticks, episode=0):
    """The episode holds these ticks, every field of them, and the action that led from each to the next."""
    start, end = store.episodes[episode]
    assert end - start == len(ticks)
    found = {name: store.read(name, start, end) for name in store.fields}
    for row, n in enumerate(ticks):
        np.testing.assert_array_equal(found["rgb_static"][row], frame_image(n))
        np.testing.assert_array_equal(found["rgb_gripper"][row], frame_image(n + 7))
    n = np.array(ticks)
    np.testing.assert_allclose(found["robot_obs"][:, 0], 0.001 * n, rtol=1e-6)
    np.testing.assert_allclose(found["robot_obs"][:, 7:14], np.repeat(0.01 * n[:, None], 7, 1), rtol=1e-6)
    np.testing.assert_allclose(found["robot_obs"][:, 6], 0.04, rtol=1e-6)
    np.testing.assert_allclose(found["target_pose"][:, 0], 0.001 * n + 0.01, rtol=1e-6)
    np.testing.assert_array_equal(found["actions"][:-1], [action(k + 1, True) for k in ticks[:-1]])


# -- what bags hold --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", StoragePlugin)
@pytest.mark.parametrize("prefix", ["/", "/robot1/"])
def test_every_frame_of_a_plain_bag_comes_back(tmp_path, storage, prefix):
    path = FakeBag(40, first=5, prefix=prefix).write(tmp_path / "bag", storage)
    store, audit = import_one(tmp_path, None, path)
    expect_frames(store, range(5, 45))
    assert (audit.frames, audit.kept, audit.idle, audit.lost, audit.notes) == (40, 40, 0, 0, [])
    assert audit.duration_s == pytest.approx(39 / 30) and audit.messages["/joint_states".replace("/", prefix, 1)] == 40


def test_last_action_of_an_episode_holds_because_nothing_follows_it(tmp_path):
    store, _ = import_one(tmp_path, FakeBag(12))
    np.testing.assert_array_equal(store.read("actions", 11, 12)[0], [0, 0, 0, 0, 0, 0, 1])


@pytest.mark.parametrize("mode", [CompressionMode.FILE, CompressionMode.MESSAGE, CompressionMode.STORAGE])
@pytest.mark.parametrize("storage", StoragePlugin)
def test_compressed_bags(tmp_path, storage, mode):
    if (storage, mode) == (StoragePlugin.SQLITE3, CompressionMode.STORAGE):
        pytest.skip("SQLite3 has no compression of its own")
    path = FakeBag(10).write(tmp_path / "bag", storage, (mode, CompressionFormat.ZSTD))
    expect_frames(import_one(tmp_path, None, path)[0], range(10))


def test_compressed_images_and_the_one_image_path(tmp_path):
    images = tuple(replace(stream, height=200, width=200) for stream in Contract().images)
    contract = replace(Contract(), images=images)
    store, _ = import_one(tmp_path, FakeBag(9, size=200, compressed="png"), contract=contract)
    np.testing.assert_array_equal(store.read("rgb_static", 3, 4)[0], model_image(frame_image(3, 200)))
    rough, _ = import_one(tmp_path / "jpeg", FakeBag(9, size=200, compressed="jpeg"), contract=contract)
    difference = rough.read("rgb_static", 3, 4)[0].astype(int) - model_image(frame_image(3, 200))
    assert 0 < np.abs(difference).mean() < 3, "JPEG loses a little, and red stays red"


def test_recorders_own_entries_give_contract_and_takes(tmp_path):
    """What the recorder noted rules: a discarded and a bad take are left out, the marks stay with theirs."""
    stamp = lambda n: START_NS + n * STEP_NS  # noqa: E731
    takes = [
        Episode(0, "success", "open_drawer", begin_ns=stamp(0), end_ns=stamp(19)),
        Episode(1, "discard", begin_ns=stamp(20), end_ns=stamp(39)),
        Episode(2, "failure", "turn_on_led", begin_ns=stamp(40), end_ns=stamp(59)),
        Episode(3, "", begin_ns=stamp(60), end_ns=stamp(79), bad=True, reason="lost 9 % of rgb_static"),
    ]
    path = FakeBag(90, contract=Contract()).write(tmp_path / "bag")
    text = (path / "metadata.yaml").read_text()
    entries = Recording(Contract(), episodes=takes).to_custom_data()
    assert CONTRACT in text
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    information = yaml.load(text)
    information["rosbag2_bagfile_information"]["custom_data"][EPISODES] = entries[EPISODES]
    with (path / "metadata.yaml").open("w") as stream:
        yaml.dump(information, stream)
    store, audit = import_one(tmp_path, None, path)
    assert store.marks == [SUCCESS, FAILURE, UNMARKED]
    expect_frames(store, range(20), 0)
    expect_frames(store, range(40, 60), 1)
    expect_frames(store, range(80, 90), 2)
    assert [take["bad"] for take in audit.takes] == ["", "marked to be discarded", "", "lost 9 % of rgb_static", ""]
    skills = store.load(("skill",))["skill"]
    assert set(skills[:20]) == {SKILLS.index("open_drawer")}
    assert set(skills[20:40]) == {SKILLS.index("turn_on_led")} and set(skills[40:]) == {-1}, "what nobody judged is play"
    assert store.marks == PlayStore.open(store.path).marks and audit.kept == len(store) == 50


def test_marks_of_a_plain_recording_end_takes(tmp_path):
    bag = FakeBag(60, simulated=True, marks={19: ("success", "close_drawer"), 39: ("failure", "open_drawer")})
    store, audit = import_one(tmp_path, bag, fields=tuple(FIELDS))
    assert store.episodes == [(0, 20), (20, 40), (40, 60)] and store.marks == [SUCCESS, FAILURE, UNMARKED]
    skills = store.load(("skill",))["skill"]
    assert skills[:40].tolist() == [SKILLS.index("close_drawer")] * 20 + [SKILLS.index("open_drawer")] * 20
    np.testing.assert_array_equal(store.load(("scene_obs",))["scene_obs"][:, 3], np.arange(60))
    np.testing.assert_array_equal(store.read("actions", 19, 20)[0], action(20, True)), "the recording went on, so the action is known"
    assert audit.episodes == 3


def test_resets_of_the_simulation_end_episodes(tmp_path):
    store, _ = import_one(tmp_path, FakeBag(40, simulated=True, episode=lambda n: n // 20), fields=tuple(FIELDS))
    assert store.episodes == [(0, 20), (20, 40)]
    np.testing.assert_array_equal(store.read("actions", 19, 20)[0][:6], np.zeros(6))


# -- idle time -------------------------------------------------------------------------------------------------------------------------


def test_rest_is_cut_out_but_for_its_ends(tmp_path):
    """20 moving, 100 at rest, 20 moving: two episodes, each with ten frames of the rest."""
    bag = FakeBag(140, moves=lambda n: not 20 < n <= 120)
    store, audit = import_one(tmp_path, bag)
    assert store.episodes == [(0, 30), (30, 60)]
    np.testing.assert_array_equal(store.read("rgb_static", 29, 31), [frame_image(29), frame_image(110)])
    assert audit.idle == 80 and audit.idle_share == pytest.approx(80 / 140) and audit.kept == 60


def test_short_rest_stays_and_none_is_cut_on_request(tmp_path):
    bag = FakeBag(60, moves=lambda n: not 20 < n <= 45)
    expect_count = {"short": ({}, 60, 0), "all": ({"idle_s": 0.0}, 60, 0), "strict": ({"idle_s": 0.5, "idle_margin_s": 0.1}, 41, 19)}
    for name, (settings, kept, idle) in expect_count.items():
        _, audit = import_one(tmp_path / name, bag, **settings)
        assert (audit.kept, audit.idle) == (kept, idle), name


def test_mark_after_a_rest_belongs_to_what_was_done_before(tmp_path):
    """The operator looks first and presses the key then."""
    bag = FakeBag(100, moves=lambda n: n <= 20, marks={90: ("success", "open_drawer")})
    store, audit = import_one(tmp_path, bag)
    assert store.episodes == [(0, 30)] and store.marks == [SUCCESS] and audit.idle == 70


def test_nothing_but_rest_leaves_nothing(tmp_path):
    store, audit = import_one(tmp_path, FakeBag(80, moves=lambda n: False, marks={70: ("success", "")}))
    assert len(store) == 0 and audit.idle_share == 1 and any("no episode that reaches it" in note for note in audit.notes)


# -- bad input -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.97])
def test_truncated_mcap_keeps_what_came_before(tmp_path, keep):
    path = FakeBag(80).write(tmp_path / "bag")
    file = path / "bag.mcap"
    with file.open("r+b") as stream:
        stream.truncate(int(file.stat().st_size * keep))
    store, audit = import_one(tmp_path, None, path)
    assert 0.7 * keep * 80 < len(store) <= 80 and any("messages before that were kept" in note for note in audit.notes)
    expect_frames(store, range(len(store)))


def test_preallocated_end_of_a_killed_recording_is_no_data(tmp_path):
    path = FakeBag(30).write(tmp_path / "bag")
    file = path / "bag.mcap"
    data = file.read_bytes()
    end = data.rindex(b"\x0f\x04\x00\x00\x00\x00\x00\x00\x00")  # the data end record
    file.write_bytes(data[:end] + bytes(1 << 20))
    (path / "metadata.yaml").unlink()
    store, audit = import_one(tmp_path, None, path)
    expect_frames(store, range(30))
    assert len(audit.notes) == 2 and "metadata.yaml is missing" in audit.notes[0] and "nothing was written here" in audit.notes[1]


def test_damaged_chunk_is_left_out_and_the_rest_is_kept(tmp_path):
    path = FakeBag(120).write(tmp_path / "bag", compression=(CompressionMode.STORAGE, CompressionFormat.ZSTD))
    file = path / "bag.mcap"
    data = bytearray(file.read_bytes())
    middle = data.index(b"zstd", len(data) // 3) + 40
    data[middle : middle + 200] = bytes(200)
    file.write_bytes(data)
    store, audit = import_one(tmp_path, None, path, max_loss=1.0)
    assert 40 < len(store) < 120 and len(store.episodes) == 2
    assert any("damaged" in note for note in audit.notes)


def test_unindexed_mcap_is_read_whole(tmp_path):
    path = FakeBag(20).write(tmp_path / "bag")
    file = path / "bag.mcap"
    data = file.read_bytes()
    file.write_bytes(data[:-28] + struct.pack("<QQI", 0, 0, 0) + data[-8:])  # a footer without a summary
    store, audit = import_one(tmp_path, None, file)
    expect_frames(store, range(20))
    assert audit.notes == []


@pytest.mark.parametrize(
    ("name", "contents", "reason"),
    [
        ("empty.mcap", b"", "found an empty one"),
        ("empty.db3", b"", "found an empty file"),
        ("text.mcap", b"time,x,y\n1,2,3\n" * 40, "expected an MCAP file, found something else"),
        ("text.db3", b"time,x,y\n1,2,3\n" * 40, "cannot be read"),
        ("ros1.bag", b"#ROSBAG V2.0\n", "Convert ROS 1 bags with rosbags-convert"),
        ("header.mcap", b"\x89MCAP0\r\n", "expected topics in the bag, found none"),
    ],
)
def test_foreign_and_empty_files_are_refused(tmp_path, name, contents, reason):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=reason):
        import_one(tmp_path, None, tmp_path / name)


def test_folders_that_are_no_bags_are_refused(tmp_path):
    with pytest.raises(DataError, match="found nothing there"):
        BagReader(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"expected .mcap or .db3 files in the bag, found notes.txt"):
        BagReader(tmp_path)


def test_truncated_sqlite_is_refused_with_the_reason(tmp_path):
    path = FakeBag(20).write(tmp_path / "bag", StoragePlugin.SQLITE3)
    with (path / "bag.db3").open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(DataError, match="SQLite3 keeps nothing of a recording that was cut off: record to MCAP"):
        import_one(tmp_path, None, path)


def test_foreign_database_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "other.db3") as connection:
        connection.execute("CREATE TABLE people (name TEXT)")
    with pytest.raises(DataError, match="missing tables"):
        import_one(tmp_path, None, tmp_path / "other.db3")


def test_missing_and_renamed_topics(tmp_path):
    path = FakeBag(20, prefix="/").write(tmp_path / "bag")
    with pytest.raises(DataError, match=r"expected /camera/front.* \(sensor_msgs/msg/Image; the bag has /camera/gripper.*, /camera/static"):
        images = (replace(Contract().images[0], topic="camera/front"), Contract().images[1])
        import_one(tmp_path, None, path, contract=replace(Contract(), images=images))
    contract = replace(Contract(), images=images)
    store = PlayStore.create(tmp_path / "renamed", contract, fields=PLAIN_FIELDS)
    import_bag(path, store, ImportSettings(frozen_motion_m=0.0), {"camera/front": f"/{STATIC}"})
    expect_frames(store, range(20))
    with pytest.raises(ConfigError, match="topic 'camera/side'"):
        import_bag(path, store, None, {"camera/side": f"/{STATIC}"})
    with pytest.raises(
        DataError, match="expected sensor_msgs/msg/Image or sensor_msgs/msg/CompressedImage, found sensor_msgs/msg/JointState"
    ):
        import_bag(path, store, None, {"camera/front": "/joint_states"})


def test_types_that_changed_since_are_refused(tmp_path):
    path = FakeBag(10).write(tmp_path / "bag")
    file = path / "bag.mcap"
    file.write_bytes(file.read_bytes().replace(b"float32[7] action", b"float64[7] action").replace(b"float32[7] actio_", b""))
    with pytest.raises(DataError, match=r"executed_action: expected .*ExecutedAction as this version of diwa knows it"):
        import_one(tmp_path, None, path)


def test_images_that_change_size_midway_end_the_episode_there(tmp_path):
    image = lambda n, size: frame_image(n, 64 if n < 37 else 32)  # noqa: E731
    store, audit = import_one(tmp_path, FakeBag(60, image=image))
    expect_frames(store, range(30))  # the other view shows frame n + 7
    refused = audit.refused["/camera/gripper/image_raw"]
    assert refused["count"] == 30 and "expected uint8 (64, 64, 3), found uint8 (32, 32, 3)" in refused["reason"]


def test_values_that_are_not_finite_are_left_out(tmp_path):
    class Broken(FakeBag):
        def tick(self, n, stamp_ns):
            messages = super().tick(n, stamp_ns)
            if n == 20:
                messages["joint_states"].position[:] = np.nan
            return messages

    store, audit = import_one(tmp_path / "near", Broken(40))
    assert audit.refused["/joint_states"]["count"] == 1 and audit.kept == 40
    joints = store.load(("robot_obs",))["robot_obs"][:, 7]
    assert joints[20] == joints[19] != joints[21], "the sample before is near enough"
    store, audit = import_one(tmp_path / "strict", Broken(40), max_skew_s=0.01)
    assert store.episodes == [(0, 20), (20, 39)] and audit.lost == 1


@pytest.mark.parametrize("jump_s", [-100.0, -0.01, 3600.0])
def test_clock_that_jumps_ends_an_episode(tmp_path, jump_s):
    stamp_ns = lambda n: START_NS + n * STEP_NS + round(jump_s * 1e9) * (n >= 30)  # noqa: E731
    path = FakeBag(60, stamp_ns=stamp_ns).write(tmp_path / "bag")
    store, audit = import_one(tmp_path, None, path)
    if jump_s > -1 / 30 and jump_s < 0:
        assert store.episodes == [(0, 60)], "less than a step back is jitter"
        return
    expect_frames(store, range(30), 0)
    assert len(store.episodes) == 2 and store.episodes[1][1] >= 58
    assert any(("jumped back" if jump_s < 0 else "a hole of 3600.0 s") in note for note in audit.notes)


def test_lost_frames_split_and_too_many_make_a_take_bad(tmp_path):
    few = FakeBag(100, skip={STATIC: {50}})
    store, audit = import_one(tmp_path / "few", few)
    assert store.episodes == [(0, 50), (50, 99)] and audit.lost == 1
    many = FakeBag(100, skip={STATIC: set(range(9, 100, 10))})
    store, audit = import_one(tmp_path / "many", many)
    assert len(store) == 0 and audit.kept == 0 and "lost 9.1 % of its frames, more than 5 %" in audit.takes[0]["bad"]
    store, audit = import_one(tmp_path / "kept", many, keep_bad=True)
    assert len(store) > 80 and audit.takes[0]["bad"]


def test_frozen_camera_gives_no_frames(tmp_path):
    image = lambda n, size: frame_image(min(n, 30), size)  # noqa: E731
    store, audit = import_one(tmp_path, FakeBag(90, image=image), frozen_motion_m=0.0)
    assert len(store) < 50 and any("repeated one picture" in note for note in audit.notes)


def test_mark_without_an_episode_is_ignored_and_said(tmp_path):
    bag = FakeBag(40, marks={19: ("success", "")}, skip={STATIC: set(range(20))})
    store, audit = import_one(tmp_path, bag)
    assert store.marks == [UNMARKED] and any("no frames before it and was ignored" in note for note in audit.notes)


def test_bag_without_one_whole_frame_says_what_is_there(tmp_path):
    with pytest.raises(DataError, match=r"expected frames with every stream .* found none. Messages read: .*/joint_states: 5"):
        import_one(tmp_path, FakeBag(20, skip={"joint_states": set(range(5, 20)), STATIC: set(range(10))}))


def test_newer_store_and_foreign_contract_are_refused(tmp_path):
    path = FakeBag(10, contract=replace(Contract(), rate_hz=15.0)).write(tmp_path / "bag")
    store = PlayStore.create(tmp_path / "store", Contract(), fields=PLAIN_FIELDS)
    with pytest.raises(ContractError, match=r"contract field 'rate_hz': expected 30.0, found 15.0"):
        import_bag(path, store)
    store.group.attrs["version"] = 2
    with pytest.raises(DataError, match=r"expected format diwa_play version 1, found diwa_play version 2. Update diwa"):
        import_bags([path], store.path)


def test_missing_file_of_a_split_bag(tmp_path):
    whole = FakeBag(20).write(tmp_path / "bag")
    text = (whole / "metadata.yaml").read_text().replace("- bag.mcap", "- bag.mcap\n  - bag_1.mcap", 1)
    (whole / "metadata.yaml").write_text(text)
    store, audit = import_one(tmp_path, None, whole)
    expect_frames(store, range(20))
    assert audit.notes == ["metadata.yaml lists bag_1.mcap, which is not there; the other files were read"]


def test_small_file_cannot_ask_for_much_memory(tmp_path):
    """A chunk that claims to unpack to gigabytes, or does, is left out."""
    import zstandard

    bomb = zstandard.compress(bytes(300 << 20))
    for claimed in (1 << 40, 300 << 20):
        content = struct.pack("<QQQI", 0, 0, claimed, 0) + struct.pack("<I", 4) + b"zstd" + struct.pack("<Q", len(bomb)) + bomb
        path = tmp_path / f"{claimed}.mcap"
        header = b"\x01" + struct.pack("<Q", 8) + bytes(8)
        path.write_bytes(b"\x89MCAP0\r\n" + header + b"\x06" + struct.pack("<Q", len(content)) + content)
        with pytest.raises(DataError, match="bytes unpacked are too many"):
            BagReader(path)


# -- many bags -------------------------------------------------------------------------------------------------------------------------


def test_import_goes_on_where_it_was_stopped(tmp_path, capsys):
    """Two bags; then a crash that left half an episode and a cut-off line; then a third bag: the same store as in one go."""
    bags = [FakeBag(30, first=100 * k).write(tmp_path / f"bag{k}") for k in range(3)]
    import_bags(bags, tmp_path / "whole")
    store = import_bags(bags[:2], tmp_path / "store").store
    store.append_episode({name: store.read(name, 0, 9) for name in store.fields})
    with (store.path / LEDGER).open("a") as stream:
        stream.write('{"bag": "bag2", "ident')
    assert main(["data", "import", *map(str, bags), "--out", str(store.path), "--workers", "1"]) == 0
    assert "2 bags were there before" in capsys.readouterr().out
    whole, store = PlayStore.open(tmp_path / "whole"), PlayStore.open(store.path)
    assert store.content_hash == whole.content_hash and [entry["bag"] for entry in read_ledger(store.path)] == ["bag0", "bag1", "bag2"]


def test_any_number_of_workers_gives_the_same_store(tmp_path):
    bags = [FakeBag(20, first=100 * k, marks={100 * k + 19: ("success", "")}).write(tmp_path / f"bag{k}") for k in range(2)]
    hashes = {workers: import_bags(bags, tmp_path / f"store{workers}", workers=workers).store.content_hash for workers in (1, 2)}
    assert hashes[1] == hashes[2]


def test_bad_bag_among_good_ones_is_reported(tmp_path, capsys):
    good = FakeBag(20).write(tmp_path / "good")
    (tmp_path / "bad.mcap").write_bytes(b"no bag")
    assert main(["data", "import", str(good), str(tmp_path / "bad.mcap"), "--out", str(tmp_path / "store")]) == 1
    out = capsys.readouterr().out
    assert "good: 1 episodes, 20 of 20 frames kept" in out and "bad.mcap: refused:" in out
    assert not any(path.name.startswith(".parts") for path in (tmp_path / "store").iterdir())


def test_changed_bag_of_the_same_name_is_refused(tmp_path):
    path = FakeBag(20).write(tmp_path / "bag")
    import_bags([path], tmp_path / "store")
    shutil.rmtree(path)
    FakeBag(25).write(path)
    with pytest.raises(DataError, match="was imported before with other contents"):
        import_bags([path], tmp_path / "store")


def test_other_settings_need_another_store(tmp_path):
    path = FakeBag(20).write(tmp_path / "bag")
    import_bags([path], tmp_path / "store")
    with pytest.raises(DataError, match=r"idle_s = 9.0, found idle_s = 1.0"):
        import_bags([path], tmp_path / "store", settings=ImportSettings(idle_s=9.0))


def test_takes_of_marks_in_any_order(tmp_path):
    path = FakeBag(30, marks={9: ("success", ""), 19: ("failure", "")}).write(tmp_path / "bag")
    with BagReader(path) as bag:
        takes = find_takes(bag, {}, None)
    assert [take.outcome for take in takes] == ["success", "failure"] and takes[1].begin_ns == takes[0].end_ns + 1
