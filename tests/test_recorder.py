"""Bags as rosbag2 reads them: written whole, killed, cut off, damaged, on a full disk; audits, the queue, the last seconds."""

import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from diwa_core.cli.main import main
from diwa_core.contract import Contract
from diwa_core.data.bag_audit import EpisodeAudit, header_stamp_ns, rated_topics
from diwa_core.data.bag_format import BagTopic, Episode, Recording
from diwa_core.data.bag_recorder import BagRecorder, Packet, RecentMessages, RecorderSettings, RecordingThread
from diwa_core.data.bag_recover import recover_bag
from diwa_core.data.bag_writer import BagWriter
from diwa_core.errors import DataError

STEP_NS = 33_333_333
BEGIN_NS = 1_700_000_000_000_000_000
CONTRACT = Contract()
TOPICS = rated_topics(CONTRACT)
STATIC = TOPICS[0]
SEPARATOR = "=" * 80
DEFINITION = f"""std_msgs/Header header
uint8[] data
{SEPARATOR}
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
{SEPARATOR}
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""
QOS = {
    "history": "keep_last",
    "depth": 5,
    "reliability": "reliable",
    "durability": "volatile",
    "deadline": {"sec": 9223372036, "nsec": 854775807},
    "lifespan": {"sec": 9223372036, "nsec": 854775807},
    "liveliness": "automatic",
    "liveliness_lease_duration": {"sec": 9223372036, "nsec": 854775807},
    "avoid_ros_namespace_conventions": False,
}


def topic(name: str) -> BagTopic:
    return BagTopic(name, "test_msgs/msg/Frame", DEFINITION, "RIHS01_" + "0" * 64, (QOS,))


def message(frame: int, size: int = 1000, stamp_ns: int | None = None) -> bytes:
    """A serialized header and `size` bytes that no compressor makes much smaller."""
    stamp_ns = BEGIN_NS + frame * STEP_NS if stamp_ns is None else stamp_ns
    seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
    return struct.pack("<4siIIxxxxI", b"\0\1\0\0", seconds, nanoseconds, 1, size) + bytes((frame * 7 + i * i) % 251 for i in range(size))


def packet(name: str, frame: int, size: int = 1000) -> Packet:
    now_ns = BEGIN_NS + frame * STEP_NS
    return Packet(name, now_ns, now_ns, message(frame, size))


def open_recorder(folder: Path, **options: object) -> BagRecorder:
    recorder = BagRecorder(RecorderSettings(folder, min_free_bytes=0, real_time=False, **options), CONTRACT)
    for name in TOPICS:
        recorder.add_topic(topic(name))
    return recorder


def record_frames(recorder: BagRecorder, frames: range, without: tuple[tuple[str, int], ...] = ()) -> None:
    for frame in frames:
        for name in TOPICS:
            if (name, frame) not in without:
                recorder.take(packet(name, frame))


def write_bag(folder: Path, frames: int = 30, size: int = 1000, compression: str = "none", flush_each: int = 5) -> list[int]:
    """A bag of two topics that is on the disk but not closed; returns the file's length after every flush."""
    writer = BagWriter(folder, CONTRACT, compression)
    for name in TOPICS[:2]:
        writer.add_topic(topic(name))
    lengths = []
    for frame in range(frames):
        for name in TOPICS[:2]:
            writer.write(*packet(name, frame, size))
        if frame % flush_each == flush_each - 1:
            writer.flush()
            lengths.append(writer.bytes_written)
    return lengths


def read_rosbags(folder: Path) -> dict[str, list[int]]:
    """Topic -> header stamps, as the rosbags library reads them, in its order."""
    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(get_types_from_msg("std_msgs/Header header\nuint8[] data", "test_msgs/msg/Frame"))
    stamps: dict[str, list[int]] = {}
    with Reader(folder) as reader:
        for connection, _, data in reader.messages():
            header = store.deserialize_cdr(data, connection.msgtype).header
            stamps.setdefault(connection.topic, []).append(header.stamp.sec * 1_000_000_000 + header.stamp.nanosec)
        assert reader.message_count == sum(map(len, stamps.values()))
    return stamps


def read_ours(folder: Path) -> Recording:
    """Our own entries, from metadata.yaml."""
    return Recording.from_custom_data(yaml.safe_load((folder / "metadata.yaml").read_text())["rosbag2_bagfile_information"]["custom_data"])


def read_mcap(folder: Path) -> int:
    """Messages that the official reader finds, with every checksum verified."""
    (path,) = folder.glob("*.mcap")
    with path.open("rb") as stream:
        reader = make_reader(stream, validate_crcs=True)
        found = sum(1 for _ in reader.iter_messages())
        assert reader.get_summary().statistics.message_count == found
    return found


# -- writing ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_bag_is_read_by_others_and_says_what_it_is(tmp_path: Path, compression: str) -> None:
    recorder = open_recorder(tmp_path, compression=compression)
    recorder.note_checkpoint("policy", "a" * 64)
    folder = recorder.start("play", "open_drawer")
    record_frames(recorder, range(30))
    episode = recorder.mark("success", note="well done").result(30)
    recorder.note_checkpoint("policy", "b" * 64)
    record_frames(recorder, range(30, 40))
    closed = recorder.stop("discard").result(30)

    assert (episode.outcome, episode.skill, episode.bad, episode.note) == ("success", "open_drawer", False, "well done")
    assert [each.outcome for each in closed.episodes] == ["success", "discard"] and closed.last == closed.episodes[1]
    stamps = read_rosbags(folder)
    assert stamps == {name: [BEGIN_NS + frame * STEP_NS for frame in range(40)] for name in TOPICS}
    assert read_mcap(folder) == 40 * len(TOPICS)
    with (folder / "play_0.mcap").open("rb") as stream:
        (attachment,) = make_reader(stream).iter_attachments()
    assert (attachment.name, Contract.from_dict(yaml.safe_load(attachment.data))) == ("contract.yaml", CONTRACT)
    recording = read_ours(folder)
    with Reader(folder) as reader:
        assert reader.connections[0].ext.offered_qos_profiles[0].depth == 5
    assert recording.contract == CONTRACT and recording.episodes == closed.episodes
    assert recording.checkpoints == {"policy": ["a" * 64, "b" * 64]}
    assert recording.notes == {"name": "play", "skill": "open_drawer"}


def test_a_bag_is_never_overwritten_and_stays_in_its_folder(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    recorder.start("play")
    with pytest.raises(DataError, match="no recording in progress"):
        recorder.start("other")
    recorder.stop().result(30)
    with pytest.raises(DataError, match="never overwritten"):
        recorder.start("play")
    with pytest.raises(DataError, match="name of a folder"):
        recorder.start("../play")
    with pytest.raises(DataError, match="found none"):
        recorder.mark("success")


def test_an_unknown_mark_changes_nothing(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    recorder.start("play")
    record_frames(recorder, range(5))
    with pytest.raises(DataError, match="found 'succes'"):
        recorder.mark("succes")
    assert [episode.outcome for episode in recorder.stop().result(30).episodes] == [""]


# -- the queue and the audit -----------------------------------------------------------------------------------------------------------


def test_a_slow_disk_never_holds_the_caller_and_drops_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = threading.Event()
    write = BagWriter.write
    monkeypatch.setattr(BagWriter, "write", lambda self, *arguments: (disk.wait(60), write(self, *arguments))[1])
    recorder = open_recorder(tmp_path, queue_bytes=20_000)
    recorder.start("play")
    record_frames(recorder, range(30))  # returns although the disk has not written anything
    assert recorder.recording.dropped > 100
    disk.set()
    (episode,) = recorder.stop("success").result(60).episodes
    assert sum(episode.dropped.values()) + sum(episode.received.values()) == 30 * len(TOPICS)
    assert episode.bad and not episode.usable and "frames missing" in episode.reason


def take_frames(audit: EpisodeAudit, frames: range, skip: dict[str, set[int]]) -> Episode:
    for frame in frames:
        for name in TOPICS:
            if frame not in skip.get(name, set()):
                audit.take(name, BEGIN_NS + frame * STEP_NS, message(frame, 1))
    return audit.finish(0, BEGIN_NS + frames[-1] * STEP_NS, {})


@pytest.mark.parametrize(("lost", "bad"), [(0, False), (3, False), (5, True), (50, True)])
def test_an_episode_that_lost_more_than_its_share_is_bad(lost: int, bad: bool) -> None:
    episode = take_frames(EpisodeAudit(CONTRACT, max_loss=0.02), range(100), {STATIC: set(range(20, 20 + lost))})
    assert episode.bad == bad and episode.expected[STATIC] == 100
    assert (STATIC in episode.reason) == bad
    assert episode.received[STATIC] == 100 - lost


def test_a_topic_that_never_came_is_bad_however_short_the_episode() -> None:
    episode = take_frames(EpisodeAudit(CONTRACT, max_loss=0.5), range(2), {"/joint_states": {0, 1}})
    assert episode.reason == "/joint_states: nothing received"


def test_copies_are_no_frames_and_time_must_not_go_backwards() -> None:
    audit = EpisodeAudit(CONTRACT)
    for frame in (*range(50), *[49] * 50):
        for name in TOPICS:
            audit.take(name, BEGIN_NS, message(frame, 1))
    assert not audit.finish(0, BEGIN_NS, {}).bad
    audit.take(STATIC, BEGIN_NS, message(10, 1))
    assert "time went backwards" in audit.finish(0, BEGIN_NS, {}).reason


def test_silence_of_everything_counts_in_real_time() -> None:
    for real_time in (True, False):
        audit = EpisodeAudit(CONTRACT, real_time=real_time)
        take_frames(audit, range(100), {})
        assert audit.finish(0, BEGIN_NS + 200 * STEP_NS, {}).bad == real_time


def test_an_episode_without_messages_is_bad() -> None:
    assert EpisodeAudit(CONTRACT).finish(0, BEGIN_NS, {}).bad


@given(st.binary(max_size=20))
def test_a_stamp_is_read_from_anything(data: bytes) -> None:
    assert isinstance(header_stamp_ns(data), int)


def test_the_recent_messages_have_a_length_and_a_size() -> None:
    recent = RecentMessages(seconds=1.0, max_bytes=10_000_000)
    for frame in range(100):
        recent.add(packet(STATIC, frame, 10))
    assert len(recent.packets) == 31 and recent.seconds == pytest.approx(1.0)
    assert len(recent.since(0.5)) == 16
    small = RecentMessages(seconds=100.0, max_bytes=5_000)
    for frame in range(100):
        small.add(packet(STATIC, frame, 1000))
    assert len(small.packets) == 4 and small.bytes <= 5_000


def test_the_last_seconds_are_saved_beside_a_recording(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path, recent_s=1.0)
    recorder.add_topic(topic("/policy/history"))
    recorder.take(packet("/policy/history", 0), latched=True)
    record_frames(recorder, range(60))
    recorder.start("play")
    record_frames(recorder, range(60, 70))
    folder = recorder.save_recent(reason="fault").result(30)
    recorder.stop().result(30)
    stamps = read_rosbags(folder)
    assert stamps[STATIC] == [BEGIN_NS + frame * STEP_NS for frame in range(39, 70)]
    assert stamps["/policy/history"] == [BEGIN_NS]  # older, and still true
    recording = read_ours(folder)
    assert recording.notes["reason"] == "fault" and not recording.episodes[0].bad
    with pytest.raises(DataError, match="no topic was received"):
        open_recorder(tmp_path).save_recent()


# -- killed, cut off, damaged ----------------------------------------------------------------------------------------------------------

KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_recorder import open_recorder, record_frames
recorder = open_recorder(Path({folder!r}))
recorder.start("play", "open_drawer")
record_frames(recorder, range(30))
recorder.mark("success").result()
record_frames(recorder, range(30, 60))
while recorder.recording.audit.received.get("/executed_action") != 30 or recorder.recording._items:
    time.sleep(0.01)
written, synced = recorder.recording.writer.counts.total, recorder.recording.writer.bytes_written
while recorder.recording.writer.bytes_written == synced:
    time.sleep(0.01)
print("on the disk", flush=True)
record_frames(recorder, range(60, 65))
time.sleep(60)
"""


def test_a_kill_loses_at_most_what_was_not_flushed(tmp_path: Path) -> None:
    program = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on the disk\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = tmp_path / "play"
    assert not (folder / "metadata.yaml").exists()
    recovered = recover_bag(folder)
    assert recovered.changed and 60 * len(TOPICS) <= recovered.messages <= 65 * len(TOPICS)
    assert read_mcap(folder) == recovered.messages
    assert read_rosbags(folder)[STATIC][:60] == [BEGIN_NS + frame * STEP_NS for frame in range(60)]
    episodes = read_ours(folder).episodes
    assert [episode.outcome for episode in episodes] == ["success", ""]
    assert not episodes[0].bad and "recovered" in episodes[1].note
    again = recover_bag(folder)
    assert not again.changed and again.messages == recovered.messages


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate])
@example(share=0.998)  # in the last index
@given(share=st.floats(0, 1))
def test_a_bag_cut_off_anywhere_is_recovered_up_to_the_last_flush(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("cut") / "bag"
    lengths = write_bag(folder)
    (path,) = folder.glob("*.mcap")
    cut = round(share * lengths[-1])
    os.truncate(path, cut)
    whole = sum(length <= cut for length in lengths) * 5 * 2
    if not whole and cut < lengths[0]:
        with pytest.raises(DataError, match=r"expected an MCAP file|nothing to recover"):
            recover_bag(folder)
        return
    recovered = recover_bag(folder)
    assert recovered.messages in (whole, whole + 10)  # the chunk is whole before its index is
    assert read_mcap(folder) == recovered.messages and sum(map(len, read_rosbags(folder).values())) == recovered.messages


@pytest.fixture(scope="module")
def bag_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Compression -> an MCAP file that was never closed."""
    data = {}
    for compression in ("none", "zstd"):
        folder = tmp_path_factory.mktemp(compression) / "bag"
        length = write_bag(folder, compression=compression)[-1]
        data[compression] = (folder / "bag_0.mcap").read_bytes()[:length]
    return data


@settings(max_examples=25, deadline=None, phases=[Phase.generate])  # shrinking would take minutes and say no more
@given(share=st.floats(0, 1), value=st.integers(1, 255), compression=st.sampled_from(["none", "zstd"]))
def test_damage_anywhere_costs_a_chunk_at_most_or_is_refused(
    bag_bytes: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, share: float, value: int, compression: str
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    data = bytearray(bag_bytes[compression])
    data[min(round(share * len(data)), len(data) - 1)] ^= value
    (folder / "bag_0.mcap").write_bytes(data)
    try:
        recovered = recover_bag(folder)
    except DataError:
        return
    assert recovered.messages > 0
    assert sum(map(len, read_rosbags(folder).values())) == recovered.messages == read_mcap(folder)
    assert all(original.read_bytes() == data for original in recovered.damaged)


def test_a_damaged_chunk_in_the_middle_is_left_out_and_the_original_kept(tmp_path: Path) -> None:
    lengths = write_bag(tmp_path / "bag")
    (path,) = (tmp_path / "bag").glob("*.mcap")
    data = bytearray(path.read_bytes()[: lengths[-1]])
    data[(lengths[1] + lengths[2]) // 2] ^= 255
    path.write_bytes(data)
    recovered = recover_bag(tmp_path / "bag")
    assert recovered.messages == 50 and recovered.lost_bytes > 5 * 2 * 1000
    assert [original.name for original in recovered.damaged] == ["bag_0.mcap.damaged"]
    stamps = read_rosbags(tmp_path / "bag")[STATIC]
    assert [(stamp - BEGIN_NS) // STEP_NS for stamp in stamps] == [*range(10), *range(15, 30)]


def test_what_cannot_be_recovered_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, data in (("foreign", b"SQLite format 3\0"), ("empty", b""), ("magic", b"\x89MCAP0\r\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.mcap").write_bytes(data)
        with pytest.raises(DataError, match="expected"):
            recover_bag(tmp_path / name)
    with pytest.raises(DataError, match="no such folder"):
        recover_bag(tmp_path / "none")
    write_bag(tmp_path / "bag")
    assert main(["data", "recover", str(tmp_path / "bag"), str(tmp_path / "none")]) == 1
    output = capsys.readouterr().out
    assert "recovered 60 messages" in output and "refused" in output


# -- a full disk -----------------------------------------------------------------------------------------------------------------------


def fill(folder: Path, limit_frames: int = 3000) -> tuple[Path, object]:
    """Record until there is no space left."""
    recorder = open_recorder(folder)
    bag = recorder.start("play")
    for frame in range(limit_frames):
        record_frames(recorder, range(frame, frame + 1))
        if recorder.recording.closed.done():
            break
        if frame % 20 == 0:
            drained = threading.Event()
            recorder.recording.call(drained.set)
            while not (drained.wait(0.05) or recorder.recording.closed.done()):
                pass
    return bag, recorder.stop("success").result(60)


def check_full(bag: Path, closed: object) -> None:
    assert "expected space for" in closed.error and "what was recorded is kept" in closed.error
    found = read_rosbags(bag)
    assert read_mcap(bag) == sum(map(len, found.values())) > 100
    (episode,) = closed.episodes
    assert {name: len(stamps) for name, stamps in found.items()} == episode.received and episode.dropped
    assert not recover_bag(bag).changed


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_recorder import check_full, fill
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
check_full(*fill(Path({folder!r})))
print("readable")
"""


def test_a_limit_of_the_file_size_ends_the_recording_and_leaves_the_bag_whole(tmp_path: Path) -> None:
    program = FULL.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=150)
    assert done.stdout == "readable\n", done.stderr


def test_a_full_disk_ends_the_recording_and_leaves_the_bag_whole(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs to mount a small disk: {mounted.stderr.strip()}")
    try:
        check_full(*fill(disk / "bags"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_almost_full_is_left_alone(tmp_path: Path) -> None:
    recorder = BagRecorder(RecorderSettings(tmp_path, min_free_bytes=1 << 60), CONTRACT)
    with pytest.raises(DataError, match="min_free_mib"):
        recorder.start("play")
    assert not (tmp_path / "play").exists()


def test_a_writer_that_fails_is_told_to_whoever_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: BagWriter, *_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(BagWriter, "write", fail)
    recorder = open_recorder(tmp_path)
    recorder.start("play")
    record_frames(recorder, range(3))
    closed = recorder.stop().result(30)
    assert "Input/output error" in closed.error
    assert sum(closed.episodes[0].dropped.values()) == 3 * len(TOPICS)


def test_the_queue_takes_nothing_after_the_end(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "bag", CONTRACT)
    writer.add_topic(topic(STATIC))
    recording = RecordingThread(writer, EpisodeAudit(CONTRACT), 1 << 20)
    recording.close().result(30)
    assert not recording.put(packet(STATIC, 0)) and recording.dropped == 1
