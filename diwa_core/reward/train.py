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
CLOSE = 0.3  # share of the way to success: filtered frames nearer to it than this, on either side, are a kind of their own


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
        success = windows.success(skill).any(1)[windows.skill == SKILLS.index(skill)]
        if not success.any() or success.all():
            found = f"{int(success.sum())} of {len(success)} windows with a success"
            raise DataError(f"skill '{skill}': {where} needs successes and failures, found {found}. Record more, or leave the skill out.")


def trusted_frames(windows: Windows, skill: str, config: ClassifierConfig, teacher: SuccessClassifier | None) -> Tensor:
    """Imagined frames [B, T] that are taught with the label of what really happened (see ClassifierConfig.consistency)."""
    success, keep, told = windows.success(skill), windows.known(skill), ~windows.progress[skill].isnan()
    keep[:, config.imagined_frames :] = False
    if config.settle_frames:
        done = windows.progress[skill] > 1  # not `success`: the end of an episode is no change
        changed = (done[:, 1:] != done[:, :-1]) & told[:, 1:] & told[:, :-1]  # what is not told is left out as it is
        changed = F.pad(changed.float(), (config.settle_frames, config.settle_frames))
        keep &= F.max_pool1d(changed[:, None], 2 * config.settle_frames, stride=1)[:, 0] == 0
    if teacher is not None:
        dreamt = teacher.judge(windows.imagined, windows.start) > 0
        keep &= (dreamt | ~success) if config.consistency == "positives" else (dreamt == success)
    return keep


def _fit(windows: Windows, skill: str, config: ClassifierConfig, imagined: Tensor, report: Callable[[float], None]) -> SuccessClassifier:
    """Train on all filtered frames that have a label and on the `imagined` [B, T] ones."""
    device, time = windows.start.device, windows.valid.shape[1]
    classifier = SuccessClassifier(config).to(device).train()
    filtered = windows.filtered.flatten(0, 1)
    classifier.mean.copy_(filtered.mean(0))
    classifier.std.copy_(filtered.std(0).clamp_min(1e-2))
    negatives, positives = _pools(windows, skill, imagined, config.margin)
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


def _pools(windows: Windows, skill: str, imagined: Tensor, margin: float) -> tuple[list[Pool], list[Pool]]:
    """Failures and successes to draw from, in kinds that get equal shares; without the empty ones."""
    success, own = windows.success(skill), (windows.skill == SKILLS.index(skill))[:, None]
    close = (windows.progress[skill] - 1).abs() < CLOSE  # few frames, and those that tell exactly where the line is
    seen, dreamt = windows.filtered.flatten(0, 1), windows.imagined.flatten(0, 1)
    kinds = [(seen, windows.known(skill) & use) for use in (close, ~close & own, ~close & ~own)]
    kinds += [(dreamt, imagined & use) for use in (own, ~own)]
    pools = []
    for wanted in (~success, windows.success(skill, margin)):
        marked = [(now, (use & wanted).flatten().nonzero().squeeze(1)) for now, use in kinds]
        pools.append([(now, rows) for now, rows in marked if len(rows)])
    return pools[0], pools[1]


def _draw(pools: list[Pool], count: int) -> tuple[Tensor, Tensor]:
    """`count` frames, about equally many of each pool: read-outs [count, R] and row numbers [count]."""
    shares = torch.linspace(0, count, len(pools) + 1).round().int().diff().tolist()
    parts = [(now, rows[torch.randint(len(rows), (share,), device=rows.device)]) for (now, rows), share in zip(pools, shares, strict=True)]
    return torch.cat([now[rows] for now, rows in parts]), torch.cat([rows for _, rows in parts])
