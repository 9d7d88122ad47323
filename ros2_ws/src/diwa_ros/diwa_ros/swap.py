"""How a policy takes over from a running one: what it must show on real latents, blending at the border, probation; no ROS in here.

Letters: N latents, F feature, H chunk, A action (7, the last one the gripper).
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch
from torch import Tensor

from diwa_core.policy.diffusion import DiffusionPolicy
from diwa_ros.policy_store import LoadedPolicy, Refusal

MEMORY_FRAMES = 90  # latents kept: three seconds at 30 Hz
COMPARED = 15  # of them, evenly spread, on which two policies are compared
WARM_UP_CHUNKS, TIMED_CHUNKS = 3, 11
MAX_CLIPPED = 0.1  # share of real features far outside a policy's statistics; 0.00 to 0.02 with the right ones
REST = 1.0  # times as long as a chunk took
OVERRUNS = 3  # chunks in a row over the latency budget that end a probation


class LatentMemory:
    """The last real features of one world model, by stamp; those of another one or of before a reset are forgotten."""

    def __init__(self) -> None:
        self.world_model_id = ""
        self.features: deque[tuple[int, np.ndarray]] = deque(maxlen=MEMORY_FRAMES)

    def add(self, world_model_id: str, stamp_ns: int, feature: np.ndarray) -> None:
        """Keep `feature` [F] of a warm filter; a repeated stamp is a copy."""
        if world_model_id != self.world_model_id or (self.features and len(feature) != len(self.features[-1][1])):
            self.features.clear()
        self.world_model_id = world_model_id
        if not self.features or self.features[-1][0] != stamp_ns:
            self.features.append((stamp_ns, feature))

    def clear(self) -> None:
        """Forget all."""
        self.features.clear()

    def choose(self, other: LatentMemory | None = None) -> tuple[Tensor, Tensor]:
        """At most COMPARED features [N, F] of this memory and, of the same frames, of `other` [N, F'] (None: this one again)."""
        theirs = dict((other or self).features)
        pairs = [(feature, theirs[stamp_ns]) for stamp_ns, feature in self.features if stamp_ns in theirs]
        if not pairs:
            return torch.zeros(0, 0), torch.zeros(0, 0)
        chosen = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(COMPARED, len(pairs))).round().astype(int)]
        return tuple(torch.from_numpy(np.stack(side)).float() for side in zip(*chosen, strict=True))


def check_statistics(policy: DiffusionPolicy, features: Tensor) -> None:
    """Gate `statistics`: real features [N, F] must lie where the policy's statistics expect them. Raises Refusal."""
    if len(features) == 0:
        return
    far = ((features - policy.feature_mean) / policy.feature_std).abs() > policy.config.feature_clip
    share = far.float().mean().item()
    if share > MAX_CLIPPED:
        expected = f"at most {MAX_CLIPPED:.0%} of the last latents beyond {policy.config.feature_clip:g} deviations"
        raise Refusal("statistics", expected, f"{share:.0%}", "It was trained on other data: train it on this robot's.")


def check_latency(loaded: LoadedPolicy, budget_ms: float) -> float:
    """Gate `latency`: warm the policy up and return the time of a chunk, milliseconds. Raises Refusal above `budget_ms`.

    The fastest of several: what a busy machine adds, the running policy pays as well.
    """
    feature, generator = torch.zeros(1, loaded.policy.config.feature_size), torch.Generator().manual_seed(0)
    times_ms = []
    for _ in range(WARM_UP_CHUNKS + TIMED_CHUNKS):
        times_ms.append(draw_politely(loaded, feature, loaded.policy.draw_noise(1, generator))[1])
    latency_ms = min(times_ms[WARM_UP_CHUNKS:])
    if latency_ms > budget_ms:
        mend = "Use fewer denoising steps or a smaller network, or raise latency_budget_ms."
        raise Refusal("latency", f"at most {budget_ms:g} ms for a chunk", f"{latency_ms:.1f} ms", mend)
    return latency_ms


def check_actions(running: LoadedPolicy, new: LoadedPolicy, running_features: Tensor, features: Tensor, limit: float) -> float:
    """Gate `actions`: the difference of both policies on the same frames [N, F], [N, F']; NaN without any. Raises Refusal above `limit`."""
    if len(features) == 0:
        return float("nan")
    generator = torch.Generator().manual_seed(0)
    noise = running.policy.draw_noise(len(features), generator)
    mine = draw_chunks(running, running_features, noise)
    theirs = draw_chunks(new, features, fit_noise(new.policy, noise))
    difference = measure_difference(mine, theirs)
    if not difference <= limit:
        mend = "Look at it with --shadow first; --max-difference lets it pass."
        raise Refusal("actions", f"a mean difference of at most {limit:g} to the running policy", f"{difference:.2f}", mend)
    return difference


def draw_chunks(loaded: LoadedPolicy, features: Tensor, noise: Tensor) -> np.ndarray:
    """Chunks [N, H, A] for features [N, F]."""
    return torch.cat([draw_politely(loaded, *one)[0] for one in zip(features.split(1), noise.split(1), strict=True)]).numpy()


def draw_politely(loaded: LoadedPolicy, feature: Tensor, noise: Tensor) -> tuple[Tensor, float]:
    """A chunk [1, H, A] and its milliseconds; then a rest, because the running graph has little more than one core to spare."""
    begin_s = time.perf_counter()
    chunk = loaded.sample(feature, noise)
    taken_s = time.perf_counter() - begin_s
    time.sleep(REST * taken_s)
    return chunk, taken_s * 1e3


def fit_noise(policy: DiffusionPolicy, noise: Tensor) -> Tensor:
    """`noise` [N, K+1, H, A] if `policy` takes noise of that shape, so that only the policies differ; else noise of its own."""
    expected = policy.draw_noise(1, torch.Generator().manual_seed(0)).shape[1:]
    return noise if noise.shape[1:] == expected else policy.draw_noise(len(noise), torch.Generator().manual_seed(0))


def measure_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean |difference| of the motion components of two chunks [.., H, A] as they would be executed (clipped), over their common length."""
    length = min(first.shape[-2], second.shape[-2])
    return float(np.abs(first[..., :length, :6].clip(-1, 1) - second[..., :length, :6].clip(-1, 1)).mean())


def blend_chunk(last_action: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """A chunk [H, A] that begins near `last_action` [A] and ends as `actions` does; the gripper is the new policy's from the start.

    The first step changes by 1/H of what it would have without blending.
    """
    weight = np.linspace(1 / len(actions), 1, len(actions), dtype=np.float32)[:, None]
    blended = actions.clip(-1, 1)
    blended[:, :6] = (1 - weight) * last_action[:6] + weight * blended[:, :6]
    return blended


class Probation:
    """Watches policies that have just taken over. Begins with their first chunk and lasts `length_s`; an event in it ends in a rollback."""

    def __init__(self, identities: frozenset[str], length_s: float, budget_ms: float) -> None:
        self.identities, self.length_s, self.budget_ms = identities, length_s, budget_ms
        self.begin_s: float | None = None
        self.overruns = 0

    def is_over(self, now_s: float) -> bool:
        """Whether they have proved themselves."""
        return self.begin_s is not None and now_s - self.begin_s > self.length_s

    def judge_chunk(self, identity: str, actions: np.ndarray, inference_ms: float, now_s: float) -> str | None:
        """Why the policies must go after this chunk [H, A], or None. Chunks of others say nothing."""
        if identity not in self.identities:
            return None
        if self.begin_s is None:
            self.begin_s = now_s
        if not np.isfinite(actions).all():
            return "its actions are not finite"
        self.overruns = self.overruns + 1 if inference_ms > self.budget_ms else 0
        if self.overruns >= OVERRUNS:
            return f"{OVERRUNS} chunks in a row took longer than {self.budget_ms:.0f} ms, the last one {inference_ms:.0f} ms"
        return None
