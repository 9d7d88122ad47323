"""What a world model predicts open loop beside what the cameras saw, as strips for the report.

Letters: N frames, F feature, A action, W warm-up frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from diwa_core.contract import model_image
from diwa_core.errors import DataError
from diwa_core.evaluate.report import ImageStrip
from diwa_core.world_model.model import WorldModel
from diwa_core.world_model.rssm import State
from diwa_core.world_model.vision import to_uint8

COLUMNS = 8


@dataclass
class Recording:
    """One episode from the first filtered frame on.

    images: view -> uint8 [N, H, W, 3]; features: float32 [N, F], the filtered belief of every frame;
    actions: float32 [N, A], each executed in the step that led INTO its frame (the first entry is not used).
    """

    images: dict[str, np.ndarray]
    features: np.ndarray
    actions: np.ndarray


@torch.inference_mode()
def imagine_episode(model: WorldModel, recording: Recording, seed: int = 0) -> State:
    """States [N - W + 1, ..]: the belief after the W warm-up frames, then what the model imagines from the executed actions alone.

    Raises DataError on a recording without a frame after the warm-up or of another world model.
    """
    warmup = model.config.warmup_frames
    if len(recording.features) <= warmup or recording.features.shape[1] != model.feature_size:
        raise DataError(
            f"recording: expected more than {warmup} frames with features of {model.feature_size}, found {recording.features.shape}."
        )
    feature = torch.from_numpy(recording.features[warmup - 1]).to(model.device)[None]
    state = State(*feature.split([model.rssm.deterministic, model.rssm.latent.size], -1))
    generator = torch.Generator(model.device).manual_seed(seed)
    states = [state]
    for action in torch.from_numpy(recording.actions[warmup:].astype(np.float32)).to(model.device):
        states.append(model.rssm.imagine(states[-1], action[None], generator))
    return State(torch.cat([s.h for s in states]), torch.cat([s.z for s in states]))


def open_loop_strips(model: WorldModel, recording: Recording, title: str, columns: int = COLUMNS) -> list[ImageStrip]:
    """One strip per view: the last observed frame, then evenly spaced imagined ones. Raises DataError as `imagine_episode` does."""
    states = imagine_episode(model, recording)
    skip, count = model.config.warmup_frames - 1, len(states.h)
    chosen = np.unique(np.linspace(0, count - 1, columns).round().astype(int))
    with torch.inference_mode():
        decoded = {view: to_uint8(image).cpu().numpy() for view, image in model.decode_images(states[chosen]).items()}
    labels = ["last seen" if i == 0 else f"+{i}" for i in chosen]
    caption = f"{count - 1} frames imagined from the executed actions alone, after {skip + 1} observed ones"
    strips = []
    for view, predicted in decoded.items():
        camera = np.stack([model_image(image) for image in recording.images[view][skip + chosen]])
        strips.append(ImageStrip(f"{title}, {view.removeprefix('rgb_')} camera", caption, camera, predicted, labels))
    return strips
