"""Success classifiers as checkpoints: the skill in the config, the world model in the lineage, the threshold among the tensors."""

from __future__ import annotations

from pathlib import Path

from diwa_core.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from diwa_core.config import from_dict, to_dict
from diwa_core.contract import Contract
from diwa_core.errors import CheckpointError
from diwa_core.reward.classifier import ClassifierConfig, SuccessClassifier

KIND = "classifier"


def save_classifier(
    path: str | Path,
    classifier: SuccessClassifier,
    contract: Contract,
    skill: str,
    world_model_id: str,
    lineage: dict,
    card: dict | None = None,
) -> str:
    """Write a classifier in half precision; returns its identity."""
    config = {"skill": skill, "classifier": to_dict(classifier.config)}
    lineage = {**lineage, "world_model": world_model_id}
    return save_checkpoint(path, KIND, classifier.state_dict(), config, contract, lineage, card, half=True)


def load_classifier(path: str | Path, world_model_id: str | None = None, skill: str | None = None) -> tuple[SuccessClassifier, Checkpoint]:
    """Read a classifier, in evaluation mode. Raises CheckpointError, also when it belongs to another world model or skill."""
    checkpoint = load_checkpoint(path, KIND)
    judged = checkpoint.config.get("skill")
    if skill is not None and judged != skill:
        raise CheckpointError(f"{path}: expected a classifier of '{skill}', found one of {judged!r}. Give the path of the other one.")
    found = checkpoint.lineage.get("world_model")
    if world_model_id is not None and found != world_model_id:
        raise CheckpointError(
            f"{path}: expected a classifier of world model '{world_model_id[:16]}', found one of {str(found)[:16]!r}. Train it again."
        )
    classifier = SuccessClassifier(from_dict(ClassifierConfig, checkpoint.config.get("classifier", {}), f"{path}: classifier"))
    tensors = dict(checkpoint.tensors)
    if "threshold" in tensors:
        tensors.setdefault("filtered_threshold", tensors["threshold"])  # classifiers once had one threshold for all
    try:
        classifier.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: tensors do not fit the configuration in its manifest: {error}") from error
    return classifier.eval().requires_grad_(False), checkpoint
