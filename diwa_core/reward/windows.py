"""Windows of recorded episodes with success labels: what success classifiers learn from and what they are measured on.

A window is an episode as a dream has it: a reset, the warm-up, then up to HORIZON frames, read out as seen and as imagined.
Letters: B windows, W frames of warm-up, T frames after it, R read-out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diwa_core.data.marks import marked_frames
from diwa_core.data.sequences import SequenceIndex
from diwa_core.data.store import UNMARKED, PlayStore
from diwa_core.errors import ConfigError, DataError
from diwa_core.evaluate.rollout import AFTER_SUCCESS
from diwa_core.sim.skills import SKILLS, skill_progress
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.probe import filter_windows, readout
from diwa_core.world_model.train import PlayData

HORIZON = 72
NEAR_MISS, CLOSE_MISS = 0.5, 0.7  # shares of the way to success from which a failure counts as near, and as close
CHUNK = 256  # windows filtered at a time
CHECKED = 64  # frames of which given embeddings are checked
_CANDIDATES = 50_000  # window starts looked at in one store; more are thinned out evenly

LabelSource = Callable[[PlayData, str, np.ndarray, np.ndarray], np.ndarray]


def oracle_progress(data: PlayData, skill: str, start: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Share of the way to success [B, T] at `frames` [B, T] of episodes that begin at frames `start` [B]; above 1 is success.

    This LabelSource asks the simulator's scene, `marked_progress` an operator's marks; NaN where a source does not know.
    """
    scene = data.labels["scene_obs"]
    return skill_progress(skill, scene[start][:, None], scene[frames])


def marked_progress(data: PlayData, skill: str, start: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """As `oracle_progress`, by the labels `skill` and `marked` of `load_labelled`: 2 where an operator saw that the attempt had succeeded,
    0 where it had not, or had before `start`. An attempt at another skill is none at this one: 0. Without a mark NaN.
    """
    attempted, before = data.labels["skill"][frames], data.labels["marked"][start][:, None]
    own = np.where(before == 0, 2 * data.labels["marked"][frames], 0 * before)
    return np.where(attempted == SKILLS.index(skill), own, np.where(attempted < 0, np.nan, 0.0))


LABELS = {"scene": oracle_progress, "marks": marked_progress}


def label_source(store: PlayStore, labels: str = "auto") -> LabelSource:
    """What tells success in a store: `labels`, one of LABELS, or `auto`: the simulated scene where there is one, else an operator's marks.

    Raises DataError when the store has none.
    """
    scene = {"scene_obs", "skill"} <= set(store.fields)
    marks = "skill" in store.fields and bool(set(store.marks) - {UNMARKED})
    if labels == "auto":
        labels = "marks" if marks and not scene else "scene"
    if not {"scene": scene, "marks": marks}[labels]:
        raise DataError(
            f"{store.path}: expected the labels scene_obs and skill, or attempts that an operator marked, to tell success by; found "
            f"{[name for name in ('scene_obs', 'skill') if name in store.fields]} and {'marks' if marks else 'no marks'} "
            f"(--labels {labels}). Record with --skill NAME and mark each attempt; of older demonstrations gather the attempts again."
        )
    return LABELS[labels]


@dataclass
class Selection:
    """Chosen windows: frames [B, W + T] of the play (the last one repeated where the episode is over), which of them exist [B, T] after
    the warm-up, and the number of the skill [B] each was chosen for."""

    frames: np.ndarray
    valid: np.ndarray
    skill: np.ndarray


@dataclass
class Windows:
    """Read-outs: start [B, R] at the end of the warm-up, filtered and imagined [B, T, R] after it, of which valid [B, T] exist.

    progress: skill -> float [B, T] as a LabelSource gives it, NaN where nobody knows; skill [B]: number of the skill a window was chosen
    for; frame [B]: where it begins in the play.
    """

    start: Tensor
    filtered: Tensor
    imagined: Tensor
    valid: Tensor
    progress: dict[str, Tensor]
    skill: Tensor
    frame: Tensor

    def __len__(self) -> int:
        return len(self.start)

    def known(self, skill: str) -> Tensor:
        """Frames that exist and of which is known whether `skill` has succeeded, bool [B, T]."""
        return self.valid & ~self.progress[skill].isnan()

    def success(self, skill: str, margin: float = 0.0) -> Tensor:
        """Whether `skill` has succeeded, and by a share of more than `margin`, at each frame, bool [B, T]."""
        return (self.progress[skill] > 1 + margin) & self.valid

    def episodes_of(self, skill: str) -> Windows:
        """Those chosen for `skill`, each ending AFTER_SUCCESS frames after its first success, as a policy's episodes do.

        Frames of which nothing is known are no part of them.
        """
        rows = (self.skill == SKILLS.index(skill)) & self.known(skill).any(1)
        since = self.success(skill)[rows].int().cummax(1).values.cumsum(1)
        valid = self.known(skill)[rows] & (since <= AFTER_SUCCESS + 1)
        progress = {name: values[rows] for name, values in self.progress.items()}
        names = ("start", "filtered", "imagined")
        return Windows(*(getattr(self, name)[rows] for name in names), valid, progress, self.skill[rows], self.frame[rows])

    @staticmethod
    def join(parts: list[Windows]) -> Windows:
        """Windows of several stores in a row; they must be of one length."""
        names = ("start", "filtered", "imagined", "valid")
        tensors = [torch.cat([getattr(part, name) for part in parts]) for name in names]
        progress = {skill: torch.cat([part.progress[skill] for part in parts]) for skill in parts[0].progress}
        ends = np.cumsum([0, *(int(part.frame.max()) + 10_000 for part in parts)])  # so that events of two stores never meet
        frame = torch.cat([part.frame + end for part, end in zip(parts, ends.tolist(), strict=False)])
        return Windows(*tensors, progress, torch.cat([part.skill for part in parts]), frame)


def select_windows(
    data: PlayData, skills: list[str], count: int, warmup: int, rng: np.random.Generator, label: LabelSource = oracle_progress
) -> Selection:
    """Up to `count` windows for each skill: half with a success, a quarter near misses and failed attempts (half of them close, if there
    are so many), a quarter anything else. Windows of which `label` knows nothing are never chosen.

    Raises DataError when no episode is longer than the warm-up.
    """
    episodes = [(start, end) for start, end in data.episodes if end - start > warmup]
    if not episodes:
        raise DataError(f"expected an episode of more than {warmup} frames, found none. Give longer recordings.")
    stride = max(1, sum(end - start for start, end in episodes) // _CANDIDATES)
    parts = [_lay_windows(np.arange(start, end - warmup, stride), end, warmup + HORIZON) for start, end in episodes]
    frames, valid = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    rows, chosen = [], []
    for skill in skills:
        best, near = _judge(data, skill, frames, valid, warmup, label)
        success, close = best > 1, (best > CLOSE_MISS) & (best <= 1)
        known = best > -np.inf
        kinds = [(success, count // 2), (~near & ~success & known, count - count // 2 - count // 4), (close, count // 8)]
        picked = [rng.permutation(np.flatnonzero(kind))[:wanted] for kind, wanted in kinds]
        others = np.setdiff1d(np.flatnonzero(near & ~success & known), picked[-1])
        picked = np.concatenate([*picked, rng.permutation(others)[: count // 4 - len(picked[-1])]])
        rows.append(picked)
        chosen.append(np.full(len(picked), SKILLS.index(skill)))
    row = np.concatenate(rows)
    return Selection(frames[row], valid[row, warmup:], np.concatenate(chosen))


def select_episodes(data: PlayData, length: int, warmup: int) -> Selection:
    """Every whole episode of up to `length` frames from its reset on, chosen for the skill it attempts: rollouts of a policy."""
    frames, valid = (np.concatenate(x) for x in zip(*(_lay_windows(np.array([s]), e, length) for s, e in data.episodes), strict=True))
    return Selection(frames, valid[:, warmup:], data.labels["skill"][frames[:, 0]].astype(np.int64))


def _lay_windows(starts: np.ndarray, end: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames and which of them exist, both [B, length], of windows at `starts` in an episode that ends before frame `end`."""
    frames = starts[:, None] + np.arange(length)
    return np.minimum(frames, end - 1), frames < end


def _judge(
    data: PlayData, skill: str, frames: np.ndarray, valid: np.ndarray, warmup: int, label: LabelSource, chunk: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """How far each window [B] comes on the way to success (-inf: nobody knows), and which come near one or attempt the skill; in pieces,
    because labels of all are gigabytes."""
    best, near = [], []
    for part in range(0, len(frames), chunk):
        start, later = frames[part : part + chunk, warmup - 1], frames[part : part + chunk, warmup:]
        progress = label(data, skill, start, later)
        best.append(np.where(valid[part : part + chunk, warmup:] & ~np.isnan(progress), progress, -np.inf).max(1))
        near.append((best[-1] > NEAR_MISS) | (data.labels["skill"][later] == SKILLS.index(skill)).any(1))
    return np.concatenate(best), np.concatenate(near)


def collect_windows(
    models: list[WorldModel],
    stores: list[PlayStore],
    skills: list[str],
    count: int,
    seed: int,
    parts: int = 1,
    encoded: list[Tensor] | None = None,
    labels: str = "auto",
) -> list[Windows]:
    """`parts` sets of windows of the stores that share no frame; `count` of each set for each skill, from each store by its length.

    models: the first one filters; each imagines an equal share of the windows. One store at a time is in memory. encoded: embeddings
    [frames, E] of each store, as `read_encoded` gives them. labels: for `label_source`. Raises DataError on stores without labels and on
    embeddings of another model, ConfigError on models that do not share their codes and on a count below 4.
    """
    if count < 4:
        raise ConfigError(f"windows of a skill: expected at least 4, to have some of each kind, found {count}.")
    check_shared_codes(models)
    model, found = models[0], [[] for _ in range(parts)]
    for number, store in enumerate(stores):
        label = label_source(store, labels)
        data = load_labelled(model, store, label)
        share = -(-count * len(store) // sum(map(len, stores)))
        selections = []
        for part, episodes in enumerate(split_episodes(data.episodes, parts)):
            data.episodes = episodes
            rng = np.random.default_rng([seed, number, part])
            selections.append(select_windows(data, skills, share, model.config.warmup_frames, rng, label))
        embed_selected(model, data, store, selections, encoded[number] if encoded else None)
        for windows, selection in zip(found, selections, strict=True):
            windows.append(read_windows(models, data, selection, skills, label))
    return [Windows.join(windows) for windows in found]


def collect_rollouts(models: list[WorldModel], stores: list[PlayStore], skills: list[str], labels: str = "auto") -> Windows:
    """Whole recorded episodes of a policy, as windows; raises as `collect_windows`."""
    length = max((end - start for store in stores for start, end in store.episodes), default=0)
    found = []
    for store in stores:
        label = label_source(store, labels)
        data = load_labelled(models[0], store, label)
        selection = select_episodes(data, length, models[0].config.warmup_frames)
        embed_selected(models[0], data, store, [selection])
        found.append(read_windows(models, data, selection, skills, label))
    return Windows.join(found)


def split_episodes(episodes: list[tuple[int, int]], parts: int) -> list[list[tuple[int, int]]]:
    """Episodes as `parts` lists of equally many frames; the ones at the borders are cut."""
    total, seen = sum(end - start for start, end in episodes), 0
    lists: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for start, end in episodes:
        while start < end:
            part = seen * parts // total
            cut = min(end, start - seen - (-total * (part + 1) // parts))
            lists[part].append((start, cut))
            seen, start = seen + cut - start, cut
    return lists


def load_labelled(model: WorldModel, store: PlayStore, label: LabelSource | None = None) -> PlayData:
    """A store with the labels that `label` asks for, and without images if the model's code is frozen: `embed_selected` reads those that
    are needed. Of an operator's marks only the attempts that were marked are its episodes: of play without a mark nothing is known.

    label: None for `label_source`'s. Raises DataError when the store has no labels.
    """
    label = label or label_source(store)
    config = model.config
    if config.frozen_embedding:
        config = replace(config, views=(), code_sizes=())  # the images of 240,000 frames are 6 GB
    data = PlayData([store], config)
    if label is marked_progress:
        data.labels["skill"], data.labels["marked"], data.episodes = marked_frames(store)
    return data


def read_encoded(path: Path, stores: list[PlayStore]) -> list[Tensor]:
    """Embeddings [frames, E] of each store, out of the file that the training of a world model keeps of its play.

    Raises DataError when the file is none or holds another number of frames.
    """
    lengths = [len(store) for store in stores]
    try:
        found = load_file(path)["embeddings"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{path}: expected the embeddings.safetensors of a world model's run folder: {error}") from error
    if len(found) != sum(lengths):
        raise DataError(f"{path}: holds {len(found)} frames, expected {sum(lengths)}: give the stores the world model was trained on.")
    return list(found.split(lengths))


@torch.no_grad()
def embed_selected(
    model: WorldModel, data: PlayData, store: PlayStore, selections: list[Selection], encoded: Tensor | None = None, chunk: int = 1024
) -> None:
    """Set `data.embeddings` of the selected frames, the others stay zero; nothing to do for models whose code is not frozen.

    encoded: embeddings [frames, E] that are known already. The first selected frames are encoded again: DataError if they differ.
    """
    if not model.config.frozen_embedding:
        return
    needed = np.zeros(len(data.low), bool)
    for selection in selections:
        needed[selection.frames] = True
    if encoded is not None:
        needed[np.flatnonzero(needed)[CHECKED:]] = False
    data.embeddings = torch.zeros(len(data.low), model.embedding_size, device=model.device)
    for start in range(0, len(needed), chunk):
        rows = np.flatnonzero(needed[start : start + chunk])
        if len(rows):
            images = {view: store.read(view, start, start + chunk)[rows] for view in model.config.views}
            tensors = {view: torch.from_numpy(image).to(model.device) for view, image in images.items()}
            where = torch.from_numpy(start + rows)
            data.embeddings[where.to(model.device)] = model.embed(data.low[where].to(model.device), tensors)
    if encoded is not None:
        fresh, kept = data.embeddings[torch.from_numpy(needed)], encoded[torch.from_numpy(needed)].to(model.device)
        if not torch.allclose(fresh, kept, atol=0.02):
            raise DataError(f"{store.path}: the given embeddings are of another world model; leave them out to encode the play anew.")
        data.embeddings = encoded.to(model.device)


@torch.no_grad()
def read_windows(
    models: list[WorldModel], data: PlayData, selection: Selection, skills: list[str], label: LabelSource = oracle_progress
) -> Windows:
    """Filter and imagine the selected windows and label them for each of `skills`."""
    warmup, device = models[0].config.warmup_frames, models[0].device
    batch, length = selection.frames.shape
    order = np.random.default_rng(0).permutation(batch)  # so that every model imagines windows of every kind
    filtered, imagined = [], []
    for number, rows in enumerate(np.array_split(order, max(-(-batch // CHUNK), len(models)))):
        frames = selection.frames[rows]
        first = np.tile(np.arange(length) == 0, (len(rows), 1))
        index = SequenceIndex(frames, first, np.ones(frames.shape, bool))
        filtered.append(_read_filtered(models[0], data, index))
        index.observed = np.tile(np.arange(length) < warmup, (len(rows), 1))
        imagined.append(readout(models[0], filter_windows(models[number % len(models)], data, index))[:, warmup:])
    back = torch.from_numpy(np.argsort(order)).to(device)
    seen, dreamt = torch.cat(filtered)[back], torch.cat(imagined)[back]
    start, later = selection.frames[:, warmup - 1], selection.frames[:, warmup:]
    progress = {skill: torch.from_numpy(label(data, skill, start, later).astype(np.float32)).to(device) for skill in skills}
    valid, skill, frame = (torch.from_numpy(x).to(device) for x in (selection.valid, selection.skill, selection.frames[:, 0]))
    return Windows(seen[:, warmup - 1], seen[:, warmup:], dreamt, valid, progress, skill, frame)


def _read_filtered(model: WorldModel, data: PlayData, index: SequenceIndex) -> Tensor:
    """Read-outs [B, W + T, R] of filtered windows; of residual latents the embeddings, which a filter nears only by and by.

    So a label is exact to the frame, which it would not be for a posterior that lags behind.
    """
    if model.config.latent == "residual" and data.embeddings is not None:
        return data.embeddings[torch.from_numpy(index.frames).to(data.embeddings.device)]
    return readout(model, filter_windows(model, data, index))


def check_shared_codes(models: list[WorldModel]) -> None:
    """Raise ConfigError unless all models embed an observation in the same way and read a state out alike."""
    names = ("low_mean", "low_std", "command", "codes")
    if len(models) > 1 and models[0].config.latent != "residual":
        raise ConfigError("only world models with residual latents can imagine together; leave --more-models out.")
    first, *others = ({k: v for k, v in model.state_dict().items() if k.split(".")[0] in names} for model in models)
    for other in others:
        if first.keys() != other.keys() or not all(torch.equal(first[name], other[name]) for name in first):
            raise ConfigError(
                "world models that imagine together must share their codes: train them with `diwa world-model train --codes`."
            )
