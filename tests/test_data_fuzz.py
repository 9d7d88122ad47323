"""Damaged and hostile bags, contracts and checkpoints: every reader answers with data or a DiwaError; no other exception, no hang."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bag_support import FakeBag
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin

from diwa_core.checkpoint import load_checkpoint, save_checkpoint
from diwa_core.config import load_yaml, to_dict
from diwa_core.contract import Contract
from diwa_core.data.bag_import import BagAudit, ImportSettings, find_takes, read_frames
from diwa_core.data.bag_reader import BagReader
from diwa_core.errors import DiwaError

FAST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@st.composite
def damages(draw, size):
    """How a file of `size` bytes is damaged: (bytes kept, bytes changed, what is put behind it)."""
    kept = draw(st.one_of(st.just(size), st.integers(0, size)))
    changes = draw(st.lists(st.tuples(st.integers(0, max(0, kept - 1)), st.binary(min_size=1, max_size=9)), max_size=8))
    return kept, changes, draw(st.sampled_from([b"", bytes(64), b"\xff" * 33]))


def damage(data, how):
    kept, changes, tail = how
    changed = bytearray(data[:kept])
    for at, part in changes:
        changed[at : at + len(part)] = part[: max(0, len(changed) - at)]
    return bytes(changed) + tail


def read_everything(path):
    """Go through a bag as an import does; returns the number of frames. Memory of the answer is bounded by the file's own."""
    audit = BagAudit("", "")
    with BagReader(path) as bag:
        find_takes(bag, {}, audit)
        count = sum(1 for _ in read_frames(bag, Contract(), ImportSettings(frozen_motion_m=0.0), audit))
    assert sum(audit.messages.values()) <= 200
    return count


@pytest.fixture(scope="module", params=["plain", "chunked", "sqlite"])
def bag_file(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bag")
    bag = FakeBag(6, simulated=True, contract=Contract(), marks={3: ("success", "open_drawer")})
    if request.param == "sqlite":
        return next(bag.write(folder / "bag", StoragePlugin.SQLITE3).glob("*.db3"))
    compression = (CompressionMode.STORAGE, CompressionFormat.ZSTD) if request.param == "chunked" else ()
    return next(bag.write(folder / "bag", compression=compression).glob("*.mcap"))


@FAST
@given(data=st.data())
def test_damaged_bags(bag_file, tmp_path, data):
    whole = bag_file.read_bytes()
    path = tmp_path / f"damaged{bag_file.suffix}"
    path.write_bytes(damage(whole, data.draw(damages(len(whole)))))
    try:
        assert 0 <= read_everything(path) <= 6
    except DiwaError as error:
        assert str(path) in str(error) or "expected" in str(error)


RECORDS = st.tuples(
    st.integers(0, 20),
    st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    st.one_of(st.binary(max_size=120), st.builds(lambda a, b, c: struct.pack("<QQQ", a, b, c), *[st.integers(0, 2**64 - 1)] * 3)),
)


@FAST
@given(st.lists(RECORDS, max_size=12))
def test_files_made_of_any_records(tmp_path, records):
    """Right magic, then records of any kind that claim any length."""
    parts = [struct.pack("<BQ", kind, len(content) if claimed is None else claimed) + content for kind, claimed, content in records]
    path = tmp_path / "any.mcap"
    path.write_bytes(b"\x89MCAP0\r\n" + b"".join(parts))
    with pytest.raises(DiwaError):
        read_everything(path)


@pytest.fixture(scope="module")
def bag_folder(tmp_path_factory):
    return FakeBag(2, contract=Contract()).write(tmp_path_factory.mktemp("whole") / "bag")


@FAST
@given(data=st.data())
def test_damaged_metadata(bag_folder, tmp_path, data):
    whole = (bag_folder / "metadata.yaml").read_bytes()
    folder = tmp_path / "bag"
    folder.mkdir(exist_ok=True)
    (folder / "bag.mcap").write_bytes((bag_folder / "bag.mcap").read_bytes())
    (folder / "metadata.yaml").write_bytes(damage(whole, data.draw(damages(len(whole)))))
    try:
        read_everything(folder)
    except DiwaError:
        pass


@FAST
@given(data=st.binary(max_size=400), topic=st.sampled_from(["/camera/static/image_raw", "/joint_states", "/executed_action", "/sim/state"]))
def test_messages_of_any_bytes(bag_file, data, topic):
    with BagReader(bag_file) as bag:
        for prefix in (b"", b"\x00\x01\x00\x00"):
            try:
                bag.decode(topic, prefix + data)
            except DiwaError:
                pass


# -- contracts -------------------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@FAST
@given(st.dictionaries(st.sampled_from([*to_dict(Contract()), "unknown"]), JSON, max_size=4))
def test_contracts_of_any_values(tmp_path, changes):
    """What is accepted can be used: a rate that divides, sizes that are sizes."""
    path = tmp_path / "contract.yaml"
    path.write_text(yaml.safe_dump({**to_dict(Contract()), **changes}))
    try:
        contract = load_yaml(Contract, path)
    except DiwaError:
        return
    assert contract.step_s > 0 and np.isfinite(contract.step_s) and len(contract.identity) == 16 and contract.images
    assert all(stream.height > 0 and stream.width > 0 for stream in contract.images)


@FAST
@given(st.one_of(st.binary(max_size=300), st.text(max_size=200).map(str.encode)))
def test_contract_files_of_any_bytes(tmp_path, data):
    path = tmp_path / "contract.yaml"
    path.write_bytes(data)
    try:
        load_yaml(Contract, path)
    except DiwaError:
        pass


# -- checkpoints -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = {"weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3)}
    save_checkpoint(folder / "folder", "policy", tensors, {"width": 3}, Contract(), {"seed": 1})
    save_checkpoint(folder / "packed.tar", "policy", tensors, {"width": 3}, Contract(), {"seed": 1})
    return folder


@FAST
@given(data=st.data())
def test_damaged_checkpoints(checkpoint, tmp_path_factory, data):
    """No byte of it can change what is loaded without being noticed, but for the card."""
    whole = load_checkpoint(checkpoint / "folder")
    target = tmp_path_factory.mktemp("damaged")
    if data.draw(st.booleans()):
        path = target / "packed.tar"
        path.write_bytes(damage((checkpoint / "packed.tar").read_bytes(), data.draw(damages((checkpoint / "packed.tar").stat().st_size))))
    else:
        path = target
        names = sorted(file.name for file in (checkpoint / "folder").iterdir())
        victim = data.draw(st.sampled_from(names))
        for name in names:
            content = (checkpoint / "folder" / name).read_bytes()
            (target / name).write_bytes(damage(content, data.draw(damages(len(content)))) if name == victim else content)
    try:
        found = load_checkpoint(path)
    except DiwaError:
        return
    assert found.identity == whole.identity and found.config == whole.config and found.lineage == whole.lineage
    assert all(torch.equal(found.tensors[name], whole.tensors[name]) for name in whole.tensors)


@FAST
@given(JSON)
def test_manifests_of_any_values(checkpoint, tmp_path_factory, value):
    target = tmp_path_factory.mktemp("manifest")
    for file in Path(checkpoint / "folder").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(DiwaError):
        load_checkpoint(target)
