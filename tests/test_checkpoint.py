"""Checkpoints come back as they were saved, and everything else is refused with a CheckpointError that says why."""

import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diwa_core.checkpoint import Checkpoint, copy_checkpoint, load_checkpoint, save_checkpoint, update_card
from diwa_core.contract import Contract
from diwa_core.errors import CheckpointError

CONTRACT = Contract()
TENSORS = {
    "weight": torch.linspace(-1, 1, 12).view(3, 4),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False]),
    "transposed": torch.arange(6.0).view(2, 3).T,
}


def save(path: Path, **changes) -> str:
    arguments = {
        "kind": "policy",
        "tensors": TENSORS,
        "config": {"size": (1, 2)},
        "contract": CONTRACT,
        "lineage": {"seed": 3},
        "card": {"note": "x"},
    }
    return save_checkpoint(path, **(arguments | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit_manifest(folder: Path, **changes) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint.tar"])
def test_what_is_saved_is_loaded(tmp_path: Path, name: str) -> None:
    identity = save(tmp_path / name)
    found = load_checkpoint(tmp_path / name, "policy", CONTRACT)
    assert isinstance(found, Checkpoint) and found.identity == identity and len(identity) == 64
    assert (found.config, found.lineage, found.card, found.contract) == ({"size": [1, 2]}, {"seed": 3}, {"note": "x"}, CONTRACT)
    assert found.tensors.keys() == TENSORS.keys()
    for key, value in TENSORS.items():
        assert found.tensors[key].dtype == value.dtype and torch.equal(found.tensors[key], value)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]  # no temporary left


def test_identity_depends_on_what_acts_and_on_nothing_else(tmp_path: Path) -> None:
    identity = save(tmp_path / "a")
    same = [save(tmp_path / "b"), save(tmp_path / "c.tar"), save(tmp_path / "d", lineage={"seed": 4}, card=None)]
    assert set(same) == {identity}
    flipped = TENSORS | {"weight": -TENSORS["weight"]}
    renamed = {key.replace("weight", "weights"): value for key, value in TENSORS.items()}
    reshaped = TENSORS | {"weight": TENSORS["weight"].view(4, 3)}
    other = [save(tmp_path / "e", tensors=tensors) for tensors in (flipped, renamed, reshaped)]
    other += [
        save(tmp_path / "e", kind="critic"),
        save(tmp_path / "e", config={}),
        save(tmp_path / "e", contract=replace(CONTRACT, rate_hz=15.0)),
    ]
    other += [save(tmp_path / "e", half=True)]
    assert len({identity, *other}) == 8


def test_half_precision_comes_back_as_float32(tmp_path: Path) -> None:
    identity = save(tmp_path / "half", half=True)
    found = load_checkpoint(tmp_path / "half")
    assert found.identity == identity
    assert found.tensors["weight"].dtype == torch.float32 and torch.equal(found.tensors["weight"], TENSORS["weight"].half().float())
    assert found.tensors["count"].dtype == torch.int64
    assert safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")["weight"].dtype == torch.float16


def test_pack_unpack_and_card(tmp_path: Path) -> None:
    identity = save(tmp_path / "a")
    update_card(tmp_path / "a", {"success": 0.5})
    assert copy_checkpoint(tmp_path / "a", tmp_path / "a.tar") == copy_checkpoint(tmp_path / "a.tar", tmp_path / "b") == identity
    assert load_checkpoint(tmp_path / "b").card == {"note": "x", "success": 0.5}


def test_several_tensor_files_are_merged(folder: Path) -> None:
    safetensors.torch.save_file({"weight": TENSORS["weight"]}, folder / "part-1.safetensors")
    safetensors.torch.save_file({k: v.contiguous() for k, v in TENSORS.items() if k != "weight"}, folder / "part-2.safetensors")
    with pytest.raises(CheckpointError, match=r"each tensor once"):
        load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    assert torch.equal(load_checkpoint(folder).tensors["weight"], TENSORS["weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, value: float) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'weight'.*finite"):
        save(tmp_path / "a", tensors={"weight": torch.tensor([value])}, half=True)
    assert not list(tmp_path.iterdir())


def test_config_must_be_json(tmp_path: Path) -> None:
    for config in ({"path": Path("x")}, {"loss": float("nan")}):
        with pytest.raises(CheckpointError, match=r"plain JSON"):
            save(tmp_path / "a", config=config)


def test_a_kill_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    code = f"""
import torch
from diwa_core.checkpoint import save_checkpoint
from diwa_core.contract import Contract
for i in range(10**6):
    save_checkpoint({str(path)!r}, "policy", {{"w": torch.full((200_000,), float(i % 7))}}, {{"i": i}}, Contract(), {{}})
    print(i, flush=True)
"""
    for lines in (2, 5):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        for _ in range(lines):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = load_checkpoint(path)
        assert torch.equal(found.tensors["w"], torch.full((200_000,), float(found.config["i"] % 7)))


def test_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = save(tmp_path / "a")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left.*intact"):
        save(tmp_path / "a", config={"new": 1})
    assert load_checkpoint(tmp_path / "a").identity == identity
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a checkpoint folder or .tar, found nothing"):
        load_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["manifest.json", "contract.yaml", "model.safetensors"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"expected (the file " + name + r"|at least one \*.safetensors)"):
        load_checkpoint(folder)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_tensors(folder: Path, share: float) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or damaged"):
        load_checkpoint(folder)


def test_edited_tensor_bytes(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"contents were changed: expected identity"):
        load_checkpoint(folder)


@pytest.mark.parametrize("changes", [{"kind": "critic"}, {"config": {}}, {"lineage": {}}, {"half": True}, {"identity": "0" * 64}])
def test_edited_manifest(folder: Path, changes: dict) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(CheckpointError, match=r"manifest.json was edited"):
        load_checkpoint(folder)


@pytest.mark.parametrize("changes", [{"config": None}, {"lineage": 3}, {"format": "1"}, {"seal": None}])
def test_manifest_of_other_types(folder: Path, changes: dict) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(CheckpointError, match=r"expected .* (found|whole number)"):
        load_checkpoint(folder)


def test_edited_contract(folder: Path) -> None:
    text = (folder / "contract.yaml").read_text()
    (folder / "contract.yaml").write_text(text.replace("rate_hz: 30.0", "rate_hz: 31.0"))
    with pytest.raises(CheckpointError, match=r"contents were changed"):
        load_checkpoint(folder)


def test_other_kind(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of kind 'world_model', found kind 'policy'"):
        load_checkpoint(folder, kind="world_model")


def test_other_contract(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'rate_hz': expected 15.0, found 30.0"):
        load_checkpoint(folder, contract=replace(CONTRACT, rate_hz=15.0))


def test_newer_format(folder: Path) -> None:
    edit_manifest(folder, format=2)
    with pytest.raises(CheckpointError, match=r"format version up to 1, found 2. Update"):
        load_checkpoint(folder)


class Bomb:
    """Unpickling this would create the file it names."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "extra.safetensors", "manifest.json"])
def test_pickle_content_is_refused_under_any_name(folder: Path, tmp_path: Path, name: str, protocol: int) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb(str(tmp_path / "exploded")), protocol))
    with pytest.raises(CheckpointError, match=r"could run code when opened"):
        load_checkpoint(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.PTH", "a.pkl", "a.bin", "a.ckpt"])
def test_pickle_names_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"could run code when opened"):
        load_checkpoint(folder)


def test_torch_save_is_refused_in_folder_and_as_file(folder: Path, tmp_path: Path) -> None:
    torch.save(TENSORS, folder / "weights")
    torch.save(TENSORS, tmp_path / "model.tar")
    for path in (folder, tmp_path / "model.tar"):
        with pytest.raises(CheckpointError, match=r"could run code when opened"):
            load_checkpoint(path)


@pytest.mark.parametrize("header", [640, 896, 1152, 1408])
def test_safetensors_header_that_looks_like_pickle_is_accepted(tmp_path: Path, header: int) -> None:
    for length in range(1, header):
        tensors = {"w" * length: torch.zeros(1), "v" * 60: torch.zeros(2)}
        if int.from_bytes(safetensors.torch.save(tensors)[:8], "little") == header:
            break
    save(tmp_path / "a", tensors=tensors)
    assert (tmp_path / "a" / "model.safetensors").read_bytes()[:1] == b"\x80"
    assert load_checkpoint(tmp_path / "a").tensors.keys() == tensors.keys()


def test_folder_inside_is_refused(folder: Path) -> None:
    (folder / "inner").mkdir()
    with pytest.raises(CheckpointError, match=r"plain files only, found 'inner'"):
        load_checkpoint(folder)


def tar_with(path: Path, source: Path, **changes) -> Path:
    """A tar of the checkpoint at `source` with one more member."""
    with tarfile.open(path, "w") as archive:
        for file in source.iterdir():
            archive.add(file, file.name)
        member = tarfile.TarInfo("extra")
        for key, value in changes.items():
            setattr(member, key, value)
        archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


@pytest.mark.parametrize("name", ["/etc/passwd", "../escape", "a/../../escape", "..", "inner/file", "a\\b"])
def test_tar_with_foreign_path(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"plain file names"):
        load_checkpoint(tar_with(tmp_path / "a.tar", folder, name=name))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_tar_with_link_or_device(folder: Path, tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"as a link, folder or device"):
        load_checkpoint(tar_with(tmp_path / "a.tar", folder, type=kind, linkname="manifest.json"))


def test_tar_with_sparse_member_of_huge_size(folder: Path, tmp_path: Path) -> None:
    headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**12), "GNU.sparse.numblocks": "1"}
    path = tar_with(tmp_path / "a.tar", folder, name="extra.safetensors", size=1, pax_headers=headers)
    with pytest.raises(CheckpointError, match=r"as a link, folder or device|impossible size"):
        load_within_bounds(path, quiet=False)


def test_tar_with_doubled_member_and_compressed_tar(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there twice"):
        load_checkpoint(tar_with(tmp_path / "a.tar", folder, name="manifest.json"))
    with tarfile.open(tmp_path / "b.tar", "w:gz") as archive:
        archive.add(folder / "manifest.json", "manifest.json")
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "b.tar")


def test_yaml_aliases_are_refused(folder: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)) + "name: *a11\n"
    (folder / "contract.yaml").write_text(bomb)
    with pytest.raises(CheckpointError, match=r"aliases are not allowed"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["[" * 5000, '!!int ""', "!!timestamp x", "2001-99-99", "rate_hz: 1" + "0" * 5000, "\0", "- 1", ""])
def test_malformed_contract(folder: Path, text: str) -> None:
    (folder / "contract.yaml").write_text(text)
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1' + "0" * 5000 + "}", "{", "[]", "\ud800", '{"format": true}'])
def test_malformed_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def mutated(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for how, position, piece in edits:
        at = position % (len(data) + 1)
        data = {
            "insert": data[:at] + piece + data[at:],
            "replace": data[:at] + piece + data[at + len(piece) :],
            "cut": data[:at] + data[at + len(piece) * 8 :],
            "truncate": data[:at],
        }[how]
    return data


EDITS = st.lists(
    st.tuples(st.sampled_from(["insert", "replace", "cut", "truncate"]), st.integers(0, 20_000), st.binary(min_size=1, max_size=12)),
    min_size=1,
    max_size=4,
)
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def load_within_bounds(path: Path, quiet: bool = True) -> None:
    """Load what may be damaged: a valid checkpoint or CheckpointError (raised again unless quiet), and never much memory."""
    resident_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        assert len(str(error)) < 20_000
        if not quiet:
            raise
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident_kib < 256 << 10  # what Python's tracer does not see


@FUZZ
@given(name=st.sampled_from(["manifest.json", "contract.yaml", "model.safetensors"]), edits=EDITS)
def test_fuzzed_file_never_raises_anything_else(folder: Path, name: str, edits: list) -> None:
    original = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(mutated(original, edits))
        load_within_bounds(folder)
    finally:
        (folder / name).write_bytes(original)


@FUZZ
@given(edits=EDITS)
def test_fuzzed_tar_never_raises_anything_else(folder: Path, edits: list) -> None:
    target = folder.with_suffix(".tar")
    copy_checkpoint(folder, target)
    target.write_bytes(mutated(target.read_bytes(), edits))
    load_within_bounds(target)


HEADERS = st.dictionaries(
    st.sampled_from(["w", "v", "__metadata__", ""]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "BF16", "BOOL", "U8", "U64", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "C64", "Q9"]),
            "shape": st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62, 2**64, -1]), max_size=4),
            "data_offsets": st.tuples(st.sampled_from([0, 4, 8, 24, 2**62]), st.sampled_from([0, 1, 4, 8, 24, 2**62])),
        }
    ),
    max_size=3,
)


@FUZZ
@given(header=HEADERS, size=st.sampled_from([0, 1, 4, 8, 24]))
def test_fuzzed_tensor_header_never_raises_anything_else(folder: Path, header: dict, size: int) -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    load_within_bounds(folder)


@FUZZ
@given(name=st.sampled_from(["manifest.json", "contract.yaml", "model.safetensors", "a.tar"]), data=st.binary(max_size=2000))
def test_random_bytes_never_raise_anything_else(folder: Path, name: str, data: bytes) -> None:
    target = folder / name if name != "a.tar" else folder.with_suffix(".tar")
    original = target.read_bytes() if target.exists() else b""
    target.write_bytes(data)
    load_within_bounds(folder if name != "a.tar" else target)
    target.write_bytes(original)
