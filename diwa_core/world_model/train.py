"""Train a world model on play: image codes first (if the model has them), then the recurrent part.

Resumable at any moment: every batch follows from (seed, step), and the state on disk is safetensors and JSON, replaced atomically.
Several processes (`distributed.py`) share the recurrent part; the first one trains the codes and writes the run folder, which all must see.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diwa_core.config import to_dict
from diwa_core.contract import PROPRIO_SIZE, low_vector
from diwa_core.data.sequences import SequenceIndex, StreamSampler, WindowSampler, previous_actions
from diwa_core.data.store import PlayStore
from diwa_core.errors import ConfigError, DataError, DiwaError
from diwa_core.run_folder import guard_run
from diwa_core.world_model.distributed import ProcessLost, Ranks
from diwa_core.world_model.model import WorldModel, WorldModelConfig
from diwa_core.world_model.rssm import State
from diwa_core.world_model.vision import ImageCode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `horizon` is a curriculum: (share of the training at which it begins, open-loop frames)."""

    steps: int = 5000
    batch: int = 64
    prefix: tuple[int, ...] = (4, 16)  # observed frames at the start of a window: shortest, longest
    event_share: float = 0.4  # of the windows: chosen because one of the scene's lasting states changes in them
    horizon_starts: tuple[float, ...] = (0.0, 0.15, 0.4)
    horizons: tuple[int, ...] = (8, 24, 40)
    open_loop: bool = True  # false: all frames observed, state carried over (the paper's)
    stream_length: int = 50
    reset_probability: float = 0.01
    learning_rate: float = 1e-3
    final_learning_rate: float = 3e-5
    weight_decay: float = 1e-4
    clip_norm: float = 10.0
    code_updates: int = 3000  # of each view's image code
    code_batch: int = 128
    code_learning_rate: float = 1e-3
    autocast: bool = True  # bfloat16 matrix products
    save_every_s: float = 60.0
    log_every: int = 50
    seed: int = 1


@dataclass(frozen=True)
class Overrides:
    """What a configuration file may change."""

    model: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)


PAPER_TRAINING = TrainConfig(
    steps=2_000_000, batch=50, open_loop=False, learning_rate=3e-4, final_learning_rate=3e-4, weight_decay=0.05, clip_norm=100.0
)


class PlayData:
    """Play arrays as tensors, ready for batches: low [N, P(+S)], actions [N, A], images uint8 or (frozen code) embeddings [N, E].

    `labels` holds the fields that measure a model but never train it: scene_obs [N, 24] and skill [N], where the stores have them.
    max_frames: of each store only the first whole episodes up to so many frames.
    """

    def __init__(self, stores: list[PlayStore], config: WorldModelConfig, max_frames: int | None = None) -> None:
        labels = [name for name in ("scene_obs", "skill") if all(name in store.fields for store in stores)]
        fields = ["robot_obs", "target_pose", "actions", *labels]
        episodes = [[(s, e) for s, e in store.episodes if max_frames is None or e <= max_frames] for store in stores]
        ends = [part[-1][1] if part else 0 for part in episodes]
        if not any(ends):
            raise DataError("the play stores hold no episode" + (f" within {max_frames} frames." if max_frames else "; record some first."))
        loaded = [{name: store.read(name, 0, end) for name in fields} for store, end in zip(stores, ends, strict=True)]
        offsets = np.cumsum([0, *ends])
        self.episodes = [(s + o, e + o) for part, o in zip(episodes, offsets, strict=False) for s, e in part]
        self.labels = {name: np.concatenate([arrays[name] for arrays in loaded]) for name in labels}
        self.actions = np.concatenate([arrays["actions"] for arrays in loaded]).astype(np.float32)
        low = [low_vector(arrays["robot_obs"], arrays["target_pose"], arrays.get("scene_obs"), config.scene_size) for arrays in loaded]
        self.low = torch.from_numpy(np.concatenate(low))
        self.images = {view: _read_images(stores, ends, view) for view in config.views}
        self.embeddings: Tensor | None = None
        self.events: np.ndarray | None = None
        if not torch.isfinite(self.low).all():
            raise DataError("the play holds proprioception that is not finite; `diwa data info` names the episode, leave it out.")

    def embed(self, model: WorldModel, chunk: int = 1024) -> None:
        """Encode all play once with the frozen image codes."""
        device = model.device
        parts = []
        for start in range(0, len(self.low), chunk):
            images = {view: image[start : start + chunk].to(device) for view, image in self.images.items()}
            parts.append(model.embed(self.low[start : start + chunk].to(device), images))
        self.embeddings = torch.cat(parts)

    def measure_events(self, two_peaked: Tensor, reach: int = 4) -> None:
        """Set `events` [N]: how much the scene's lasting states (two-peaked code components [C]) change around each frame."""
        codes = self.embeddings[:, self.low.shape[1] :].cpu()
        events = torch.zeros(len(codes))
        for start, end in self.episodes:
            part = codes[start:end]
            events[start + reach : end - reach] = ((part[2 * reach :] - part[: -2 * reach]).square() * two_peaked.cpu()).sum(-1)
        self.events = events.numpy() if events.any() else None

    def batch(self, index: SequenceIndex, device: torch.device) -> dict:
        """What WorldModel.loss takes."""
        frames = torch.from_numpy(index.frames)
        batch: dict = {
            "actions": torch.from_numpy(previous_actions(self.actions, index)).to(device),
            "first": torch.from_numpy(index.first).to(device),
            "observed": torch.from_numpy(index.observed).to(device),
        }
        if self.embeddings is not None:
            batch["embeddings"] = self.embeddings[frames.to(self.embeddings.device)].to(device)
        else:
            batch["low"] = self.low[frames].to(device)
            batch["images"] = {view: image[frames].to(device) for view, image in self.images.items()}
        return batch


def _read_images(stores: list[PlayStore], ends: list[int], view: str, chunk: int = 8192) -> Tensor:
    """The first `ends` frames of the stores as one tensor [N, 64, 64, 3], never twice in memory."""
    images, filled = None, 0
    for store, end in zip(stores, ends, strict=True):
        for start in range(0, end, chunk):
            part = torch.from_numpy(store.read(view, start, min(start + chunk, end)))
            images = part.new_empty(sum(ends), *part.shape[1:]) if images is None else images
            images[filled : filled + len(part)] = part
            filled += len(part)
    return images


def train_image_codes(model: WorldModel, data: PlayData, config: TrainConfig, report: Callable[[str, float], None]) -> dict[str, float]:
    """Train each view's ImageCode on single frames and freeze it, one view per core; returns the last loss per view."""
    if not model.codes:
        return {}
    proprio = model.standardise_low(data.low.to(model.device))[:, :PROPRIO_SIZE]
    with ThreadPoolExecutor(len(model.codes)) as pool:  # torch releases the interpreter lock
        losses = pool.map(lambda view: train_image_code(model.codes[view], data.images[view], proprio, view, config, report), model.codes)
        return dict(zip(model.codes, losses, strict=True))


def train_image_code(
    code: ImageCode, images: Tensor, proprio: Tensor, view: str, config: TrainConfig, report: Callable[[str, float], None]
) -> float:
    """Train and freeze the code of one view on uint8 images [N, 64, 64, 3] and proprio [N, P]; returns a running mean of the loss."""
    device = code.pixel_mean.device
    rng = np.random.default_rng([config.seed, *view.encode()])
    rows = torch.from_numpy(np.sort(rng.choice(len(images) - 1, min(len(images) - 1, 8192), replace=False)))
    sample = images[rows].to(device)
    code.measure_pixels(sample, images[rows + 1].to(device))
    code.requires_grad_(True)
    optimizer = torch.optim.AdamW(code.parameters(), config.code_learning_rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.code_learning_rate, total_steps=config.code_updates, pct_start=0.1)
    generator = torch.Generator(device).manual_seed(config.seed)
    running = 0.0
    for step in range(config.code_updates):
        pick = torch.from_numpy(rng.integers(len(images), size=config.code_batch))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            loss = code.loss(images[pick].to(device), proprio[pick.to(device)], generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        report(f"image code {view}", (step + 1) / config.code_updates)
        if step % 100 == 0:
            logger.info("image code %s: step %d of %d, loss %.4f", view, step, config.code_updates, running)
    code.requires_grad_(False)
    code.measure_code(sample, proprio[rows.to(device)])
    return running


class MetricsLog:
    """metrics.jsonl and TensorBoard in a run folder, one row per `write`."""

    def __init__(self, run_dir: Path, seconds: float) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, only training needs it

        self.file = (run_dir / "metrics.jsonl").open("a")
        self.board = SummaryWriter(str(run_dir / "tensorboard"))
        self.seconds, self.frames, self.last = seconds, 0, time.monotonic()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        self.board.close()

    def count(self, frames: int) -> None:
        """Frames trained on since the last row."""
        self.frames += frames

    def write(self, step: int, metrics: dict[str, float]) -> float:
        """Write one row; returns the training time so far in seconds, over all resumed parts."""
        now = time.monotonic()
        elapsed, self.last = now - self.last, now
        self.seconds += elapsed
        row = {"step": step, "seconds": self.seconds, "frames_per_s": self.frames / elapsed, **metrics}
        self.frames = 0
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for key, value in row.items():
            self.board.add_scalar(key, value, step)
        logger.info("step %d: loss %.5f, %.0f frames/s, %.0f s", step, row["loss"], row["frames_per_s"], row["seconds"])
        return self.seconds


class Trainer:
    """The training of one world model in `run_dir`; `run()` starts or resumes it."""

    def __init__(
        self,
        model: WorldModel,
        data: PlayData,
        config: TrainConfig,
        run_dir: str | Path,
        codes_from: WorldModel | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
    ) -> None:
        """codes_from: a trained model whose statistics and frozen image codes are used, instead of training new ones.

        ranks: the processes that share the training; with frozen codes only the first needs the pictures in `data`.
        """
        self.model, self.data, self.config, self.run_dir, self.codes_from = model, data, config, Path(run_dir), codes_from
        self.ranks, self.rows = ranks, ranks.rows(config.batch)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.step, self.seconds = 0, 0.0
        self.carry: State | None = None
        self.recurrent = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.recurrent, config.learning_rate, eps=1e-5, weight_decay=config.weight_decay)
        self._streams = StreamSampler(data.episodes, config.batch, config.stream_length, config.reset_probability, config.seed)
        self._windows: WindowSampler | None = None
        if ranks.main:
            guard_run(self.run_dir, {"model": to_dict(self.model.config), "training": to_dict(self.config)})

    # ---- state on disk ------------------------------------------------------------------------------------------------------------

    @property
    def _state_path(self) -> Path:
        return self.run_dir / "training.safetensors"

    def save(self) -> None:
        """Write model, optimiser and counters (main process); a kill leaves either the old or the new file."""
        if not self.ranks.main:
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        if self.carry is not None:
            tensors |= {"carry.h": self.carry.h, "carry.z": self.carry.z}
        temporary = self._state_path.with_suffix(".tmp")
        meta = {"step": str(self.step), "seconds": str(self.seconds)}
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary, metadata=meta)
        os.replace(temporary, self._state_path)

    def resume(self) -> bool:
        """Load the state of a killed run; false if there is none."""
        if not self._state_path.exists():
            return False
        with safe_open(self._state_path, "pt") as file:
            meta = file.metadata()
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        tensors = load_file(self._state_path, device=str(self.model.device))
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if "carry.h" in tensors:
            self.carry = State(tensors["carry.h"], tensors["carry.z"])
        return True

    # ---- the loop -----------------------------------------------------------------------------------------------------------------

    def horizon(self) -> int:
        """Open-loop frames at the present step."""
        progress = self.step / self.config.steps
        return [h for s, h in zip(self.config.horizon_starts, self.config.horizons, strict=True) if progress >= s][-1]

    def sample(self) -> SequenceIndex:
        """The frames of the present step's batch, all processes' together."""
        config = self.config
        if config.open_loop:
            length, prefix = self.window_length(), (config.prefix[0], config.prefix[1])
            if self._windows is None or self._windows.length != length:
                events = (self.data.events, config.event_share)
                self._windows = WindowSampler(self.data.episodes, config.batch, length, prefix, config.seed, *events)
            return self._windows.sample(self.step)
        return self._streams.sample(self.step)

    def window_length(self) -> int:
        """Frames of one sequence at the present step."""
        return self.config.prefix[1] + self.horizon() if self.config.open_loop else self.config.stream_length

    def learning_rate(self) -> float:
        """Short linear warm-up, then cosine."""
        config, progress = self.config, self.step / self.config.steps
        cosine = 0.5 * (1 + np.cos(np.pi * min(progress, 1.0)))
        return min(1.0, (self.step + 1) / 100) * (config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine)

    def update(self) -> dict[str, float]:
        """One optimiser step; raises DiwaError (and dumps the batch) when the loss is not finite."""
        config, model = self.config, self.model
        batch = self.data.batch(self.sample()[self.rows], model.device)
        state = self.carry if self.carry is not None and not config.open_loop else model.rssm.initial(config.batch)
        generator = torch.Generator(model.device).manual_seed(config.seed * 1_000_003 + self.step)
        random = self.ranks.random_source(generator, config.batch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.autocast):
            loss, parts, carry = model.loss(batch, state[self.rows], random)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics = self.ranks.average(self.recurrent, {"loss": loss.item(), **parts})
        norm = torch.nn.utils.clip_grad_norm_(self.recurrent, config.clip_norm).item()
        if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
            self._dump(batch, metrics["loss"])
        carry = None if config.open_loop else State(self.ranks.gather(carry.h), self.ranks.gather(carry.z))
        self.optimizer.step()
        self.carry = carry
        self.step += 1
        return {"gradient_norm": norm, **metrics}

    def _dump(self, batch: dict, loss: float) -> None:
        """Keep the offending batch and stop before the weights are damaged."""
        flat = {k: v for k, v in batch.items() if isinstance(v, Tensor)} | {f"images.{k}": v for k, v in batch.get("images", {}).items()}
        path = self.run_dir / f"nan_batch_{self.step}_{self.ranks.rank}.safetensors"
        save_file({k: v.detach().contiguous().cpu() for k, v in flat.items()}, path)
        raise DiwaError(f"loss {loss} at step {self.step}: the batch is in {path}, the last good state is kept. Lower learning_rate.")

    def run(self, report: Callable[[str, float], None] = lambda stage, done: None) -> dict[str, float]:
        """Train to the end (or from where a killed run stopped); returns the last metrics."""
        self._prepare(report)
        metrics: dict[str, float] = {}
        last_save = time.monotonic()
        with MetricsLog(self.run_dir, self.seconds) if self.ranks.main else nullcontext() as log:
            while self.step < self.config.steps:
                try:
                    metrics = self.update()
                except ProcessLost:
                    if self.ranks.main:
                        self.save()
                        logger.error("another process of this training is lost; the state of step %d is kept", self.step)
                    raise
                report("world model", self.step / self.config.steps)
                if log is None:
                    continue
                log.count(self.config.batch * self.window_length())
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    self.seconds = log.write(self.step, metrics)
                if time.monotonic() - last_save > self.config.save_every_s:
                    self.save()
                    last_save = time.monotonic()
        self.save()
        return metrics

    def _prepare(self, report: Callable[[str, float], None]) -> None:
        """Resume, or measure the play and train the image codes; then encode the play once if the codes are frozen."""
        with self.ranks.main_first():
            self._prepare_one(report)

    def _prepare_one(self, report: Callable[[str, float], None]) -> None:
        resumed = self.resume()
        if not resumed and not self.ranks.main:
            raise ConfigError(f"expected {self._state_path}, written by the first process; {self.run_dir} must be a folder that all share.")
        if resumed:
            logger.info("resumed %s at step %d", self.run_dir, self.step)
        elif self.codes_from is not None:
            self.model.take_observation(self.codes_from)
        else:
            self.model.measure_low(self.data.low)
            train_image_codes(self.model, self.data, self.config, report)
        if self.model.config.frozen_embedding:
            self._embed(resumed)
            self.data.measure_events(self.model.two_peaked)
        if not resumed:
            self._measure_changes()
            self.save()

    def _embed(self, resumed: bool) -> None:
        """Encode all play once per run; a resumed run reads it back."""
        path = self.run_dir / "embeddings.safetensors"
        if resumed and path.exists():
            self.data.embeddings = load_file(path, device=str(self.model.device))["embeddings"]
            self.data.images = {}
            return
        self.data.embed(self.model)
        self.data.images = {}  # gigabytes that are not looked at again
        save_file({"embeddings": self.data.embeddings.cpu()}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def _measure_changes(self) -> None:
        """Give residual latents the scale of one-step changes."""
        if self.model.config.latent != "residual":
            return
        changes = torch.cat([self.data.embeddings[s + 1 : e] - self.data.embeddings[s : e - 1] for s, e in self.data.episodes])
        self.model.rssm.latent.change_scale.copy_(changes.std(0).clamp_min(1e-3))
