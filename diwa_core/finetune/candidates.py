"""How good the choice of the checkpoint without the simulator is: all candidates of fine-tuning runs, tried in the simulator afterwards.

`diwa finetune --keep-candidates` keeps them as policy checkpoints, each with what its judges said. Letters: C candidates, N starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from diwa_core.checkpoint import load_checkpoint
from diwa_core.errors import ConfigError, DataError
from diwa_core.evaluate.comparison import Runner, run_missing


def candidate_path(run_dir: str | Path, iteration: int) -> Path:
    """Where the candidate of an iteration is kept; iteration 0 is the base."""
    return Path(run_dir) / "candidates" / f"{iteration:05d}"


@dataclass
class ChoiceQuality:
    """One run's candidates in the order of their iterations. judged: success by the judges, real: in the simulator, both [C].

    chosen, best: numbers of candidates. rank_correlation: Spearman's, None where one of the two does not vary. regret: real success of
    the best minus that of the chosen; too high, since the best is picked by the luck of the same starts. fair_regret: the best is picked
    on one half of the starts and compared on the other, and the other way round; it may be negative. last_regret: of taking the last.
    """

    run: str
    skill: str
    iterations: list[int]
    judged: list[float]
    real: list[float]
    chosen: int
    best: int
    rank_correlation: float | None
    regret: float
    fair_regret: float
    last_regret: float

    @staticmethod
    def measure(run: str, skill: str, iterations: list[int], judged: list[float], success: np.ndarray) -> ChoiceQuality:
        """success: bool [C, N], all on the same starts with the same noise."""
        real = success.mean(1)
        chosen = max(range(len(judged)), key=lambda i: (judged[i], iterations[i]))  # as `finetune` does: of equals the later one
        halves = success[:, 0::2].mean(1), success[:, 1::2].mean(1)
        fair = [there[here.argmax()] - there[chosen] for here, there in (halves, halves[::-1])]
        best = int(real.argmax())
        regret, last = float(real[best] - real[chosen]), float(real[best] - real[-1])
        correlation = rank_correlation(judged, real)
        return ChoiceQuality(run, skill, iterations, judged, real.tolist(), chosen, best, correlation, regret, float(np.mean(fair)), last)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's; None where it is not defined because one of the two does not vary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        value = float(stats.spearmanr(first, second).statistic)
    return value if np.isfinite(value) else None


def measure_choice(
    run_dirs: Sequence[str | Path],
    journal: str | Path,
    run: Runner,
    starts: int = 50,
    split: str = "validation",
    noise_seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ChoiceQuality]:
    """Run the kept candidates of fine-tuning runs; episodes that `journal` holds are not run again.

    Raises DataError on a run without candidates, ConfigError on fewer than 2 starts, and what `run` raises.
    """
    if starts < 2:
        raise ConfigError(f"expected at least 2 starts, one for each half, found {starts}.")
    policies = {(str(run_dir), path.name): load_checkpoint(path, "policy") for run_dir in run_dirs for path in list_candidates(run_dir)}
    outcomes = run_missing(policies, journal, run, starts, split, noise_seed, progress=progress)
    results = []
    for run_dir in dict.fromkeys(map(str, run_dirs)):
        keys = sorted(key for key in policies if key[0] == run_dir)
        cards = [policies[key].card for key in keys]
        success = np.array([[outcome.success for outcome in outcomes[key]] for key in keys])
        iterations, judged = [card["iteration"] for card in cards], [card["judged"] for card in cards]
        results.append(ChoiceQuality.measure(run_dir, policies[keys[0]].config["skill"], iterations, judged, success))
    return results


def list_candidates(run_dir: str | Path) -> list[Path]:
    """Folders of the kept candidates; raises DataError when there are not at least two."""
    found = sorted(path.parent for path in (Path(run_dir) / "candidates").glob("*/manifest.json"))
    if len(found) < 2:
        raise DataError(f"{run_dir}: expected at least 2 kept candidates, found {len(found)}. Fine-tune with --keep-candidates.")
    return found


def format_choice(results: list[ChoiceQuality]) -> str:
    """A line per run and the means, in per cent points."""
    lines = []
    for result in results:
        chosen, best = result.iterations[result.chosen], result.iterations[result.best]
        correlation = "-" if result.rank_correlation is None else f"{result.rank_correlation:+.2f}"
        lines.append(
            f"{result.skill:20s} {len(result.judged)} candidates, rank correlation {correlation}; chosen: iteration {chosen}, judged "
            f"{100 * result.judged[result.chosen]:.0f} %, real {100 * result.real[result.chosen]:.0f} %; best: iteration {best}, real "
            f"{100 * result.real[result.best]:.0f} %; regret {100 * result.regret:.1f}, fair {100 * result.fair_regret:+.1f}, of the last "
            f"{100 * result.last_regret:.1f}  ({result.run})"
        )
    correlations = [result.rank_correlation for result in results if result.rank_correlation is not None]
    mean = {name: 100 * float(np.mean([getattr(result, name) for result in results])) for name in ("regret", "fair_regret", "last_regret")}
    shown = f"{np.mean(correlations):+.2f} of {len(correlations)}" if correlations else "-"
    lines.append(
        f"{'mean':20s} {len(results)} runs, rank correlation {shown}; regret {mean['regret']:.1f}, fair {mean['fair_regret']:+.1f}, of the "
        f"last {mean['last_regret']:.1f}"
    )
    return "\n".join(lines)
