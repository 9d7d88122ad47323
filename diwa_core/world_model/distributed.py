"""Data-parallel training under torchrun: processes (ranks) of equal weights take their rows of every batch and average their gradients.

All processes know the whole batch's frames and random numbers, which follow from (seed, step). So together they train what one process
would with the same batch, up to the order in which floats are summed; under autocast that order counts in bfloat16. In expectation only:
- stochastic and categorical latents trained open loop: how many numbers are drawn depends on the rows;
- residual latents trained on streams: frames after a reset do not count, and there may be more of them in one process than in another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from diwa_core.errors import ConfigError, DiwaError

PATIENCE = timedelta(hours=1)  # with a silent process, in which the first one may well train image codes; a dead one is noticed at once


class ProcessLost(DiwaError):
    """Another process of the training ended or fell silent."""


@dataclass(frozen=True)
class RowGenerator:
    """Random numbers for `rows` of a batch of `batch` rows: all are drawn, the others' are thrown away."""

    generator: torch.Generator
    batch: int
    rows: slice


RandomSource = torch.Generator | RowGenerator | None


def normal_like(x: Tensor, source: RandomSource) -> Tensor:
    """Standard normal noise of the shape of `x`."""
    return _draw(x, source, Tensor.normal_)


def exponential_like(x: Tensor, source: RandomSource) -> Tensor:
    """Exponential noise of the shape of `x`."""
    return _draw(x, source, Tensor.exponential_)


def _draw(x: Tensor, source: RandomSource, fill: Callable[..., Tensor]) -> Tensor:
    if not isinstance(source, RowGenerator):
        return fill(torch.empty_like(x), generator=source)
    whole = x.new_empty(source.batch, *x.shape[1:])
    return fill(whole, generator=source.generator)[source.rows]


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, seen from number `rank` of `count`. One alone has nobody to wait for."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's rows of a batch; raises ConfigError when they cannot be shared equally."""
        if batch % self.count:
            raise ConfigError(f"training.batch = {batch} cannot be shared equally by {self.count} processes; set it to a multiple of them.")
        share = batch // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def random_source(self, generator: torch.Generator, batch: int) -> RandomSource:
        """The generator, or this process's rows of what it draws for a batch."""
        return generator if self.count == 1 else RowGenerator(generator, batch, self.rows(batch))

    def average(self, parameters: list[Tensor], metrics: dict[str, float]) -> dict[str, float]:
        """Average the parameters' gradients in place, and the metrics; one message. Raises ProcessLost."""
        if self.count == 1:
            return metrics
        used = [float(p.grad is not None) for p in parameters]  # the initial state is not, where no row is reset
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        numbers = torch.tensor([*metrics.values(), *used], device=gradients[0].device)
        flat = torch.cat([tensor.flatten() for tensor in (*gradients, numbers)])
        with _notice_loss():
            distributed.all_reduce(flat)
        *means, numbers = (flat / self.count).split([tensor.numel() for tensor in (*gradients, numbers)])
        values, used = numbers.split([len(metrics), len(parameters)])
        for parameter, mean, share in zip(parameters, means, used.tolist(), strict=True):
            parameter.grad = mean.view_as(parameter) if share else None  # None, as for one process: the optimiser passes it over
        return dict(zip(metrics, values.tolist(), strict=True))

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' rows [B / count, ..] as one batch [B, ..]. Raises ProcessLost."""
        if self.count == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        with _notice_loss():
            distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does this first; the others begin when it is done, and find its files. Raises ProcessLost."""
        if not self.main:
            self._meet()
        yield
        if self.main:
            self._meet()

    def _meet(self) -> None:
        if self.count > 1:
            with _notice_loss():
                distributed.barrier()


@contextmanager
def _notice_loss() -> Iterator[None]:
    """Say what a failed exchange means."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"expected to hear from every process of this training, one of them ended or fell silent ({str(error).partition(chr(10))[0]}). "
            "Its own message says why; the same command goes on from the last good state."
        ) from error


@contextmanager
def join_ranks(device: str) -> Iterator[tuple[Ranks, str]]:
    """Yields the processes that torchrun started (this one alone without it) and this one's device: its own GPU, if `device` is 'cuda'.

    Raises ConfigError when there are more processes on this host than GPUs.
    """
    if not distributed.is_torchelastic_launched():
        yield Ranks(), device
        return
    on_gpu = device.startswith("cuda")
    if device == "cuda":
        local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= found:
            raise ConfigError(f"expected a GPU for each process of this host, found {found}; lower --nproc-per-node.")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    with _notice_loss():
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    yield Ranks(distributed.get_rank(), distributed.get_world_size()), device
    distributed.destroy_process_group()  # after an error the others may be gone, and waiting for them would hide it
