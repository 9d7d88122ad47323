"""The files of a checkpoint as bytes: a flat folder or a plain .tar, written in one step, read with safe checks."""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import stat
import tarfile
from pathlib import Path

from diwa_core.errors import CheckpointError

MAX_FILES = 64
MAX_TEXT_BYTES = 16 << 20  # manifest, contract and any note; tensors may be larger
PICKLE_ENDINGS = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib", ".npy", ".npz")
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_CURRENT_FOLDER = -100  # AT_FDCWD


def write_files(path: Path, files: dict[str, bytes]) -> None:
    """Write `files` as a folder, or as a tar if `path` ends in .tar; whatever was there is replaced in one step."""
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.new")
    _remove(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tar":
            _write_durably(temporary, _tar_bytes(files))
        else:
            temporary.mkdir()
            for name, data in files.items():
                _write_durably(temporary / name, data)
        _replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error}. Free space or choose another folder; an older checkpoint here is intact."
        ) from error
    finally:
        _remove(temporary)


def read_files(path: Path) -> dict[str, bytes]:
    """Every file of the checkpoint at `path` by name. Raises CheckpointError on anything that does not belong in one."""
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.is_file():
            return _read_tar(path)
    except (OSError, tarfile.TarError, ValueError, EOFError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {error}. Copy it again from its source.") from error
    raise CheckpointError(f"{path}: expected a checkpoint folder or .tar, found nothing there. Check the path, or make it with `diwa`.")


def _read_folder(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    entries = sorted(path.iterdir())
    if len(entries) > MAX_FILES:
        raise CheckpointError(f"{path}: expected at most {MAX_FILES} files, found {len(entries)}. Is this the folder of one checkpoint?")
    for entry in entries:
        if not stat.S_ISREG(entry.stat().st_mode):
            raise CheckpointError(
                f"{path}: expected plain files only, found '{entry.name}' (folder or device). Move it out of the checkpoint."
            )
        _check_size(path, entry.name, entry.stat().st_size)
        files[entry.name] = entry.read_bytes()
        _refuse_pickle(path, entry.name, files[entry.name])
    return files


def _read_tar(path: Path) -> dict[str, bytes]:
    """Members are read into memory, never extracted; compressed, sparse and linked members are refused, so size on disk bounds memory."""
    files: dict[str, bytes] = {}
    size = path.stat().st_size
    with path.open("rb") as raw:
        _refuse_pickle(path, path.name, raw.read(16))
    with tarfile.open(path, mode="r:") as archive:
        for count, member in enumerate(archive, start=1):
            name = member.name
            if count > MAX_FILES:
                raise CheckpointError(f"{path}: expected at most {MAX_FILES} files in the tar, found more. Is this a checkpoint?")
            if name.startswith("/") or "/" in name or "\\" in name or name in ("", ".", ".."):
                raise CheckpointError(f"{path}: expected plain file names in the tar, found {name!r}. Pack it with `copy_checkpoint`.")
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                raise CheckpointError(
                    f"{path}: expected plain files in the tar, found {name!r} as a link, folder or device. Pack it with `copy_checkpoint`."
                )
            if name in files or not 0 <= member.size <= size:
                raise CheckpointError(f"{path}: tar member {name!r} is there twice or of impossible size. Copy it again from its source.")
            _check_size(path, name, member.size)
            files[name] = archive.extractfile(member).read()
            if len(files[name]) != member.size:
                raise CheckpointError(
                    f"{path}: {name!r} is truncated: expected {member.size} bytes, found {len(files[name])}. Copy it again."
                )
            _refuse_pickle(path, name, files[name])
    return files


def _check_size(path: Path, name: str, size: int) -> None:
    if size > MAX_TEXT_BYTES and not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{path}: expected {name!r} to be at most {MAX_TEXT_BYTES} bytes, found {size}. Move it out of the checkpoint."
        )


def _refuse_pickle(path: Path, name: str, data: bytes) -> None:
    """Refuse pickles and zip archives (torch.save) by name and by first bytes."""
    pickled = data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    zipped = data[:4] == b"PK\x03\x04"
    if name.endswith(".safetensors") and data[8:9] == b"{":
        pickled = False  # a safetensors header of 640 bytes begins 80 02 as well; byte 8 tells them apart
    if pickled or zipped or name.lower().endswith(PICKLE_ENDINGS):
        raise CheckpointError(
            f"{path}: found the pickle or archive {name!r}, which could run code when opened; expected *.safetensors only. "
            "Convert the weights to safetensors where you trust their source, and remove the file."
        )


def _tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`. A folder that is there is exchanged with one system call; `new` then holds the old one."""
    if not path.is_dir() or new.is_file():
        os.replace(new, path)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_CURRENT_FOLDER, os.fsencode(new), _CURRENT_FOLDER, os.fsencode(path), _EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"this file system cannot exchange folders ({os.strerror(code)}); save to a new name or to a .tar", str(path))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
