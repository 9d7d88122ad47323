"""Checkpoints: a folder or one .tar of manifest.json, contract.yaml and *.safetensors, sealed by hashes. Pickle is refused.

identity  SHA-256 over kind, config, contract and every tensor as it lies on disk: two checkpoints that act alike are one.
seal      SHA-256 over the rest of the manifest; only the card (free text, evaluation figures) may be changed afterwards.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from diwa_core.checkpoint_files import read_files, write_files
from diwa_core.config import parse_untrusted_yaml
from diwa_core.contract import Contract
from diwa_core.errors import CheckpointError, ConfigError

FORMAT_VERSION = 1
MANIFEST, CONTRACT, MODEL = "manifest.json", "contract.yaml", "model.safetensors"
_FIELDS = {"format": int, "kind": str, "identity": str, "half": bool, "config": dict, "lineage": dict, "card": dict, "seal": str}
_NOT_SEALED = ("card", "seal")
_MEND = "Copy the checkpoint again from its source, or make it anew."


@dataclass
class Checkpoint:
    """A verified checkpoint. `tensors` are on the CPU; those stored in half precision are float32 again."""

    path: Path
    kind: str
    identity: str
    config: dict[str, Any]
    contract: Contract
    lineage: dict[str, Any]
    card: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(
    path: str | Path,
    kind: str,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    contract: Contract,
    lineage: dict[str, Any],
    card: dict[str, Any] | None = None,
    half: bool = False,
) -> str:
    """Write a checkpoint and return its identity (64 hex digits). `path` is a folder, or a tar archive if it ends in .tar.

    An older checkpoint at `path` is replaced in one step: a kill at any moment leaves the old one or the new one.
    half: store floating tensors as float16. Raises CheckpointError on values that are not finite, or not JSON in the mappings.
    """
    stored = {name: _to_disk(name, tensor, half) for name, tensor in tensors.items()}
    try:
        config, lineage, card = (json.loads(_canonical(part)) for part in (config, lineage, card or {}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: config, lineage and card must be plain JSON values: {error}.") from error
    identity = _identity(kind, config, contract, stored)
    manifest = {
        "format": FORMAT_VERSION,
        "kind": kind,
        "identity": identity,
        "half": half,
        "config": config,
        "lineage": lineage,
        "card": card,
    }
    manifest["seal"] = _seal(manifest)
    write_files(
        Path(path),
        {
            MANIFEST: json.dumps(manifest, indent=2).encode(),
            CONTRACT: yaml.safe_dump(contract.to_dict(), sort_keys=False).encode(),
            MODEL: safetensors.torch.save(stored),
        },
    )
    return identity


def load_checkpoint(path: str | Path, kind: str | None = None, contract: Contract | None = None) -> Checkpoint:
    """Read and verify a checkpoint; with `kind` or `contract` also require that it has them.

    Raises CheckpointError naming what was expected, what was found and how to mend it. Memory is bounded by the size on disk.
    """
    path = Path(path)
    files = read_files(path)
    for name in (MANIFEST, CONTRACT):
        if name not in files:
            raise CheckpointError(f"{path}: expected the file {name}, found {sorted(files)}. {_MEND}")
    manifest = _read_manifest(path, files[MANIFEST])
    if kind is not None and manifest["kind"] != kind:
        raise CheckpointError(
            f"{path}: expected a checkpoint of kind '{kind}', found kind {manifest['kind']!r}. Give the path of a '{kind}'."
        )
    found_contract = _read_contract(path, files[CONTRACT])
    difference = contract.difference(found_contract) if contract is not None else None
    if difference:
        raise CheckpointError(f"{path}: {difference}. Use a checkpoint made with this contract, or train one for it.")
    stored = _read_tensors(path, files)
    identity = _identity(manifest["kind"], manifest["config"], found_contract, stored)
    if identity != manifest["identity"]:
        raise CheckpointError(
            f"{path}: contents were changed: expected identity {manifest['identity'][:16]!r}, found '{identity[:16]}'. {_MEND}"
        )
    if manifest["half"]:
        stored = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    return Checkpoint(path, manifest["kind"], identity, manifest["config"], found_contract, manifest["lineage"], manifest["card"], stored)


def update_card(path: str | Path, card: dict[str, Any]) -> None:
    """Merge `card` into the card of the checkpoint at `path` (evaluation figures, notes); identity and seal stay."""
    load_checkpoint(path)
    files = read_files(Path(path))
    manifest = json.loads(files[MANIFEST])
    manifest["card"].update(json.loads(_canonical(card)))
    write_files(Path(path), files | {MANIFEST: json.dumps(manifest, indent=2).encode()})


def copy_checkpoint(source: str | Path, target: str | Path) -> str:
    """Verify `source` and write it to `target`; packs or unpacks when one of them ends in .tar. Returns the identity."""
    identity = load_checkpoint(source).identity
    write_files(Path(target), read_files(Path(source)))
    return identity


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _identity(kind: str, config: dict[str, Any], contract: Contract, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(_canonical([kind, config, contract.to_dict()]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical({key: value for key, value in manifest.items() if key not in _NOT_SEALED}).encode()).hexdigest()


def _to_disk(name: str, tensor: Tensor, half: bool) -> Tensor:
    """A contiguous copy on the CPU in the dtype it is stored in."""
    tensor = tensor.detach().cpu()
    stored = tensor.half() if half and tensor.is_floating_point() else tensor
    if not torch.isfinite(stored).all():
        where = " in half precision" if torch.isfinite(tensor).all() else ""
        raise CheckpointError(f"tensor '{name}': expected finite values, found NaN or infinity{where}. Nothing was written.")
    return stored.contiguous().clone()


def _read_manifest(path: Path, data: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} is not JSON: {error}. {_MEND}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise CheckpointError(f"{path}: expected {MANIFEST} to be a mapping with a whole number 'format'. {_MEND}")
    if manifest["format"] > FORMAT_VERSION:
        raise CheckpointError(f"{path}: expected format version up to {FORMAT_VERSION}, found {manifest['format']}. Update diwa_core.")
    for field, expected in _FIELDS.items():
        if not isinstance(manifest.get(field), expected):
            raise CheckpointError(
                f"{path}: {MANIFEST}: expected '{field}' to be {expected.__name__}, found {type(manifest.get(field)).__name__}. {_MEND}"
            )
    try:
        seal = _seal(manifest)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} holds a value that is not plain JSON: {error}. {_MEND}") from error
    if seal != manifest["seal"]:
        raise CheckpointError(
            f"{path}: {MANIFEST} was edited: expected seal {manifest['seal'][:16]!r}, found '{seal[:16]}'. Only 'card' may change. {_MEND}"
        )
    return manifest


def _read_contract(path: Path, data: bytes) -> Contract:
    try:
        return Contract.from_dict(parse_untrusted_yaml(data))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {CONTRACT} cannot be read: {error}. {_MEND}") from error


def _read_tensors(path: Path, files: dict[str, bytes]) -> dict[str, Tensor]:
    """Merge the tensors of every *.safetensors file."""
    tensors: dict[str, Tensor] = {}
    names = sorted(name for name in files if name.endswith(".safetensors"))
    if not names:
        raise CheckpointError(f"{path}: expected at least one *.safetensors file, found {sorted(files)}. {_MEND}")
    for name in names:
        try:
            part = safetensors.torch.load(files[name])
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {name} is truncated or damaged ({len(files[name])} bytes found): {error}. {_MEND}") from error
        doubled = sorted(part.keys() & tensors.keys())
        if doubled:
            raise CheckpointError(f"{path}: expected each tensor once, found '{doubled[0]}' again in {name}. {_MEND}")
        tensors |= part
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float() if tensor.is_floating_point() else tensor).all():
            raise CheckpointError(f"{path}: tensor {name!r}: expected finite values, found NaN or infinity. {_MEND}")
    return tensors
