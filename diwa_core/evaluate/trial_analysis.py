"""What the trials of a plan say once the key is opened: rates, paired differences, the gap to simulation, judges, ranks.

Letters: N trials, P policies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from diwa_core.checkpoint import load_checkpoint
from diwa_core.data.bag_format import SUCCESS
from diwa_core.errors import CheckpointError
from diwa_core.evaluate.journal import LineFile
from diwa_core.evaluate.statistics import Estimate, PairedComparison, compare_paired, pool_mean, success_rate
from diwa_core.evaluate.trial_journal import BACKENDS, BY_OPERATOR, ROBOT, TrialJournal, TrialRow
from diwa_core.evaluate.trials import JOURNAL, OPENED, Candidate, TrialFolder

JUDGES = ("oracle", "mark", "classifier")
FEWEST_FOR_INTERVAL = 5  # policies: below that the normal approximation of Kendall's tau says nothing


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same N trials. rate: share on which they agree (Wilson); kappa: Cohen's, None where both always say the same."""

    first: str
    second: str
    both: int
    neither: int
    only_first: int
    only_second: int

    @property
    def trials(self) -> int:
        """N."""
        return self.both + self.neither + self.only_first + self.only_second

    @property
    def rate(self) -> Estimate:
        """Share of agreement."""
        return success_rate(self.both + self.neither, self.trials)

    @property
    def kappa(self) -> float | None:
        """Agreement beyond chance (Cohen 1960)."""
        n, yes, other = self.trials, self.both + self.only_first, self.both + self.only_second
        chance = (yes * other + (n - yes) * (n - other)) / n**2
        return None if chance == 1 else (self.rate.value - chance) / (1 - chance)


def compare_judges(first: str, second: str, pairs: Sequence[tuple[bool, bool]]) -> Agreement | None:
    """Agreement over (judgement of first, of second); None without a trial that both judged."""
    counts = {kind: sum((bool(a), bool(b)) == kind for a, b in pairs) for kind in itertools.product((True, False), repeat=2)}
    return Agreement(first, second, *(counts[k] for k in ((True, True), (False, False), (True, False), (False, True)))) if pairs else None


@dataclass(frozen=True)
class RankCorrelation:
    """Does the order of P policies in one place predict their order in another?

    tau: Kendall's tau-b over all policies with its interval (Fieller, Hartley and Pearson 1957; None for few policies) and p-value;
    None where one side puts all of them level. same, other, tied: pairs of policies of one skill, by whether both places order them alike;
    pair_p: that `same` and `other` are equally likely (exact sign test).
    """

    tau: Estimate | None
    p_value: float | None
    policies: int
    same: int
    other: int
    tied: int
    pair_p: float | None
    has_interval: bool


def correlate_ranks(predicted: Sequence[float], found: Sequence[float], skills: Sequence[str]) -> RankCorrelation | None:
    """Of P policies: success where it is predicted from and where it counts, and the skill of each. None for fewer than two policies."""
    if len(predicted) < 2:
        return None
    signs = [
        np.sign(predicted[i] - predicted[j]) * np.sign(found[i] - found[j])
        for i, j in itertools.combinations(range(len(skills)), 2)
        if skills[i] == skills[j]
    ]
    same, other = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
    pair_p = float(stats.binomtest(same, same + other).pvalue) if same + other else None
    constant = len(set(predicted)) == 1 or len(set(found)) == 1
    result = None if constant else stats.kendalltau(predicted, found)
    tau, has_interval = None, False
    if result is not None:
        value, n = float(result.statistic), len(predicted)
        has_interval = n >= FEWEST_FOR_INTERVAL
        half = 1.96 * np.sqrt(0.437 / (n - 4)) if has_interval else np.inf
        middle = np.arctanh(np.clip(value, -0.999999, 0.999999))
        tau = Estimate(value, float(np.tanh(middle - half)), float(np.tanh(middle + half)))
    p_value = None if result is None else float(result.pvalue)
    return RankCorrelation(tau, p_value, len(predicted), same, other, len(signs) - same - other, pair_p, has_interval)


class TrialAnalysis:
    """Plan, opened key and finished trials together. Raises DataError as TrialFolder and TrialJournal do."""

    def __init__(self, folder: TrialFolder) -> None:
        self.folder, self.plan, self.key = folder, folder.read_plan(), folder.read_key()
        self.journal = TrialJournal(folder.path / JOURNAL, self.plan)
        self.rows = {backend: self.journal.finished(backend) for backend in BACKENDS}
        self.backends = tuple(backend for backend in BACKENDS if self.rows[backend])
        self.candidates = self.key.candidates
        self.trials = {trial.number: trial for trial in self.plan.trials}
        self.openings: list[int] = []  # how many trials on the robot were finished whenever the key was opened
        self._opened = LineFile(folder.path / OPENED, "an opening of the key", lambda row: self.openings.append(int(row["robot_trials"])))

    def note_opening(self) -> None:
        """Keep that the key is opened now: trials that follow are not blind. Raises DataError."""
        if not self.openings or self.openings[-1] != len(self.rows[ROBOT]):
            self._opened.append({"robot_trials": len(self.rows[ROBOT])})
            self.openings.append(len(self.rows[ROBOT]))

    @property
    def missing(self) -> dict[str, int]:
        """Trials not done yet, by backend that has begun."""
        return {backend: len(self.plan.trials) - len(self.rows[backend]) for backend in self.backends}

    def rows_of(self, backend: str, candidate: Candidate, skill: str = "") -> dict[tuple[str, int], TrialRow]:
        """(skill, start) -> row."""
        chosen = {}
        for number, row in self.rows[backend].items():
            trial = self.trials[number]
            if self.key.candidate(trial) is candidate and skill in ("", trial.skill):
                chosen[trial.skill, trial.index] = row
        return dict(sorted(chosen.items()))

    def rate(self, backend: str, candidate: Candidate, skill: str) -> Estimate | None:
        """Success with the Wilson interval; None where nothing was tried."""
        rows = self.rows_of(backend, candidate, skill).values()
        return success_rate(sum(row.success for row in rows), len(rows)) if rows else None

    def difference(self, backend: str, candidate: Candidate, skill: str) -> PairedComparison | None:
        """Of `candidate` to the first one on the starts that both had."""
        return self._pair(self.rows_of(backend, self.candidates[0], skill), self.rows_of(backend, candidate, skill))

    def gap(self, candidate: Candidate, skill: str, simulated: str) -> PairedComparison | None:
        """Success on the robot minus success in `simulated`, on the same starts with the same noise."""
        return self._pair(self.rows_of(simulated, candidate, skill), self.rows_of(ROBOT, candidate, skill))

    def mean(self, estimates: dict[str, Estimate | None]) -> Estimate | None:
        """Mean of skills; None as long as one is missing."""
        return None if not estimates or None in estimates.values() else pool_mean(estimates)

    @staticmethod
    def _pair(first: dict[tuple[str, int], TrialRow], second: dict[tuple[str, int], TrialRow]) -> PairedComparison | None:
        shared = sorted(first.keys() & second.keys())
        return compare_paired([first[k].success for k in shared], [second[k].success for k in shared]) if shared else None

    def agreements(self, backend: str) -> list[Agreement]:
        """Of every two judges that judged for themselves. A mark that an oracle set in the operator's place is no judge of its own."""
        found = []
        for first, second in itertools.combinations(JUDGES, 2):
            pairs = []
            for row in self.rows[backend].values():
                said = _judgements(row)
                if said[first] is not None and said[second] is not None:
                    pairs.append((said[first], said[second]))
            found.append(compare_judges(first, second, pairs))
        return [agreement for agreement in found if agreement is not None]

    def imagined(self) -> dict[tuple[str, str], float]:
        """(candidate, skill) -> success in imagination as the checkpoints state it: their own, or what one fine-tuned from them says."""
        stated: dict[str, float] = {}
        identities = {}
        for candidate in self.candidates:
            for skill, identity in candidate.identities.items():
                identities[candidate.name, skill] = identity
                try:
                    checkpoint = load_checkpoint(Path(candidate.folder) / skill, "policy")
                except CheckpointError:
                    continue  # moved away since; it then states nothing
                if checkpoint.identity != identity:
                    continue
                card, base = checkpoint.card, checkpoint.lineage.get("base")
                if card.get("imagined_after") is not None:
                    stated[identity] = float(card["imagined_after"])
                if base is not None and card.get("imagined_before") is not None:
                    stated.setdefault(base, float(card["imagined_before"]))
        return {place: stated[identity] for place, identity in identities.items() if identity in stated}

    def rank(self, predictor: str) -> RankCorrelation | None:
        """Of success in `predictor` (a backend, or "imagination") with success on the robot, over all policies known in both places."""
        imagined = self.imagined() if predictor == "imagination" else {}
        rows = []
        for candidate in self.candidates:
            for skill in self.plan.skills:
                found = self.rate(ROBOT, candidate, skill)
                rate = None if predictor == "imagination" else self.rate(predictor, candidate, skill)
                guess = imagined.get((candidate.name, skill)) if rate is None else rate.value
                if found is not None and guess is not None:
                    rows.append((guess, found.value, skill))
        return correlate_ranks(*zip(*rows, strict=True)) if rows else None


def _judgements(row: TrialRow) -> dict[str, bool | None]:
    mark = row.mark == SUCCESS if row.marked_by == BY_OPERATOR and row.mark else None
    return {"oracle": row.oracle, "mark": mark, "classifier": row.classifier_success}
