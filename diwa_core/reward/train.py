"""Train a success classifier on windows of recorded episodes.

Letters: B windows, T frames after the warm-up, R read-out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from diwa_core.errors import DataError
from diwa_core.reward.classifier import ClassifierConfig, SuccessClassifier
from diwa_core.reward.windows import Windows
from diwa_core.sim.skills import SKILLS

Pool = tuple[Tensor, Tensor]  # read-outs [B * T, R] and the rows of them to draw from


def train_classifier(
    windows: Windows,
    skill: str,
    config: ClassifierConfig,
    seed: int = 0,
    report: Callable[[float], None] = lambda done: None,
) -> SuccessClassifier:
    """Fit a classifier of `skill` on filtered and imagined frames alike; windows of other skills are further failures to it."""
    with torch.random.fork_rng(devices=[windows.start.device] if windows.start.is_cuda else []):
        torch.manual_seed(seed)
        imagined = torch.zeros_like(windows.valid)
        if config.consistency != "filtered":
            teaching = replace(config, updates=config.teacher_updates)
            needed = config.consistency != "off"
            teacher = _fit(windows, skill, teaching, imagined, lambda done: report(done / 3)) if needed else None
            imagined = trusted_frames(windows, skill, config, teacher)
        return _fit(windows, skill, config, imagined, lambda done: report((1 + 2 * done) / 3))


def check_successes(windows: Windows, skills: list[str], where: str) -> None:
    """Raise DataError unless there are successes and failures of every skill among the windows chosen for it."""
    for skill in skills:
        success = (windows.success[skill] & windows.valid).any(1)[windows.skill == SKILLS.index(skill)]
        if not success.any() or success.all():
            found = f"{int(success.sum())} of {len(success)} windows with a success"
            raise DataError(f"skill '{skill}': {where} needs successes and failures, found {found}. Record more, or leave the skill out.")


def trusted_frames(windows: Windows, skill: str, config: ClassifierConfig, teacher: SuccessClassifier | None) -> Tensor:
    """Imagined frames [B, T] that are taught with the label of what really happened (see ClassifierConfig.consistency)."""
    success, keep = windows.success[skill], windows.valid.clone()
    keep[:, config.imagined_frames :] = False
    if config.settle_frames:
        changed = F.pad((success[:, 1:] != success[:, :-1]).float(), (config.settle_frames, config.settle_frames))
        keep &= F.max_pool1d(changed[:, None], 2 * config.settle_frames, stride=1)[:, 0] == 0
    if teacher is not None:
        dreamt = teacher.judge(windows.imagined, windows.start) > 0
        keep &= (dreamt | ~success) if config.consistency == "positives" else (dreamt == success)
    return keep


def _fit(windows: Windows, skill: str, config: ClassifierConfig, imagined: Tensor, report: Callable[[float], None]) -> SuccessClassifier:
    """Train on all filtered frames and on the `imagined` [B, T] ones."""
    device, time = windows.start.device, windows.valid.shape[1]
    classifier = SuccessClassifier(config).to(device).train()
    kinds = [(windows.filtered.flatten(0, 1), windows.valid), (windows.imagined.flatten(0, 1), imagined)]
    classifier.mean.copy_(kinds[0][0].mean(0))
    classifier.std.copy_(kinds[0][0].std(0).clamp_min(1e-2))
    success, own = windows.success[skill], (windows.skill == SKILLS.index(skill))[:, None]
    positives = _pools([(now, use & success) for now, use in kinds])
    negatives = _pools([(now, use & ~success & mine) for now, use in kinds for mine in (own, ~own)])  # near misses are among its own
    optimizer = torch.optim.AdamW(classifier.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.updates)
    label = torch.arange(2, device=device).repeat_interleave(config.batch // 2).float()
    for update in range(config.updates):
        draws = [_draw(pools, config.batch // 2) for pools in (negatives, positives)]
        now, rows = (torch.cat(parts) for parts in zip(*draws, strict=True))
        loss = classifier.loss(now, windows.start[rows // time], label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        report((update + 1) / config.updates)
    return classifier.eval().requires_grad_(False)


def _pools(kinds: list[tuple[Tensor, Tensor]]) -> list[Pool]:
    """Read-outs with the rows of the marked frames [B, T]; without the empty ones."""
    pools = [(now, marked.flatten().nonzero().squeeze(1)) for now, marked in kinds]
    return [(now, rows) for now, rows in pools if len(rows)]


def _draw(pools: list[Pool], count: int) -> tuple[Tensor, Tensor]:
    """`count` frames, about equally many of each pool: read-outs [count, R] and row numbers [count]."""
    shares = torch.linspace(0, count, len(pools) + 1).round().int().diff().tolist()
    parts = [(now, rows[torch.randint(len(rows), (share,), device=rows.device)]) for (now, rows), share in zip(pools, shares, strict=True)]
    return torch.cat([now[rows] for now, rows in parts]), torch.cat([rows for _, rows in parts])
