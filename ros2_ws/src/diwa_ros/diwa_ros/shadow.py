"""A policy that computes on live latents beside the running one; its disagreement is published, nothing of it is sent."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from diwa_interfaces.msg import LatentState, ShadowReport
from rclpy.publisher import Publisher
from rclpy.task import Future
from torch import Tensor

from diwa_ros.messages import from_floats, to_float32, to_ns
from diwa_ros.policy_store import LoadedPolicy
from diwa_ros.swap import fit_noise, measure_difference
from diwa_ros.worker import Worker


@dataclass(frozen=True)
class Asked:
    """A chunk of the running policy, to be compared. actions: float32 [H, A]; noise: what it was drawn with."""

    stamp_ns: int
    actions: np.ndarray
    noise: Tensor
    running_id: str


class Shadow:
    """Compares `loaded` with every chunk of its skill. A chunk that comes while it still computes is skipped and counted."""

    def __init__(self, loaded: LoadedPolicy, worker: Worker, publisher: Publisher) -> None:
        self.loaded, self.worker, self.publisher = loaded, worker, publisher
        self.chunks, self.skipped, self.sum = 0, 0, 0.0
        self.is_busy = False
        self.asked: Asked | None = None
        self.ended = False

    def ask(self, latent: LatentState, actions: np.ndarray, noise: Tensor, running_id: str) -> None:
        """The running policy answered `latent` with `actions`. A shadow on another world model waits for that one's latent."""
        self.asked = Asked(to_ns(latent.header.stamp), actions, noise, running_id)
        self.answer(latent)

    def answer(self, latent: LatentState) -> None:
        """Compute on `latent` if it is of the shadow's world model and of the frame asked about."""
        asked = self.asked
        if asked is None or asked.stamp_ns != to_ns(latent.header.stamp) or latent.world_model_id != self.loaded.world_model_id:
            return
        self.asked = None
        if self.is_busy:
            self.skipped += 1
            return
        self.is_busy = True
        feature = torch.from_numpy(from_floats(latent.feature).copy())[None]
        drawn = self.worker.submit(draw, self.loaded, feature, asked.noise)
        drawn.add_done_callback(lambda future: self.publish(latent, asked, future))

    def publish(self, latent: LatentState, asked: Asked, drawn: Future) -> None:
        """Report one comparison; one that failed counts as skipped."""
        self.is_busy = False
        if drawn.exception() is not None:
            self.skipped += 1
            return
        if self.ended:
            return
        actions, inference_ms = drawn.result()
        difference = measure_difference(asked.actions, actions)
        self.chunks, self.sum = self.chunks + 1, self.sum + difference
        report = ShadowReport(skill=self.loaded.skill, checkpoint_id=self.loaded.identity, world_model_id=self.loaded.world_model_id)
        report.header.stamp, report.running_id = latent.header.stamp, asked.running_id
        report.horizon, report.action_dim = actions.shape
        report.actions, report.inference_ms = to_float32(actions), inference_ms
        report.difference, report.mean_difference = difference, self.sum / self.chunks
        report.chunks, report.skipped = self.chunks, self.skipped
        self.publisher.publish(report)

    def summarise(self) -> str:
        """One sentence for the history."""
        mean = f"mean difference {self.sum / self.chunks:.3f} over" if self.chunks else "nothing compared in"
        return f"{mean} {self.chunks} chunks, {self.skipped} skipped"


def draw(loaded: LoadedPolicy, feature: Tensor, noise: Tensor) -> tuple[np.ndarray, float]:
    """One chunk [H, A] of the shadow, with the running policy's noise where it fits, and its milliseconds."""
    begin_s = time.perf_counter()
    actions = loaded.sample(feature, fit_noise(loaded.policy, noise))[0].numpy()
    return actions, (time.perf_counter() - begin_s) * 1e3
