"""Retraining one skill from what was recorded: bags -> store -> demonstrations -> (world model, policy, classifier) -> fine-tuned policy.

The stages are the commands of the pipeline, below one root folder; what is up to date is skipped and what was cut off goes on. In it are
data/recorded, data/demos, world_model/, policies/, classifiers/, finetuned/<skill>/, report.json and runs/, logs/, stamps/ of a pipeline.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diwa_core.checkpoint import load_checkpoint
from diwa_core.config import load_yaml
from diwa_core.data.attempts import find_attempts
from diwa_core.data.store import PlayStore
from diwa_core.errors import ConfigError, DataError
from diwa_core.pipeline.runner import Runner
from diwa_core.pipeline.stage import At, Pipeline, Stage, identify, write_whole
from diwa_core.sim.skills import SKILLS, check_skill

RECORDED, DEMOS, REPORT = At("data/recorded"), At("data/demos"), "report.json"
PARTS = ("world_model", "policy", "classifier")
RECIPE = Path(__file__).parents[2] / "config" / "retrain.yaml"
MINUTES_TO_REPORT = 0.5  # of a budget, kept for what follows the last update


@dataclass(frozen=True)
class RetrainRecipe:
    """Options of the commands, `_` for `-`, as in the recipe of `diwa pipeline`."""

    demos: dict = field(default_factory=dict)
    world_model: dict = field(default_factory=dict)
    policy: dict = field(default_factory=dict)
    classifier: dict = field(default_factory=dict)
    finetune: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What to retrain. Paths are absolute or relative to the working folder.

    checkpoints: folder with world_model/, policies/<skill>/ and classifiers/<skill>/ to begin from; base: instead of policies/<skill>.
    bags are imported; stores are play stores; held_out ones only measure. refit: of PARTS. iterations: 0 for the recipe's.
    """

    skill: str
    checkpoints: str
    bags: tuple[str, ...] = ()
    stores: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    base: str = ""
    refit: tuple[str, ...] = ()
    iterations: int = 0
    seed: int = 1
    recipe: str = ""  # file of a RetrainRecipe; empty: config/retrain.yaml

    def __post_init__(self) -> None:
        check_skill(self.skill)
        unknown = [part for part in self.refit if part not in PARTS]
        if unknown:
            raise ConfigError(f"refit: expected some of {', '.join(PARTS)}, found '{unknown[0]}'.")
        if not self.bags and not self.stores:
            raise ConfigError("retrain: expected bags or stores to learn from, found neither. Record some: diwa record.")
        for path in (*self.bags, *self.stores, *self.held_out, *([self.base] if self.base else ())):
            if not Path(path).exists():
                raise ConfigError(f"retrain: expected '{path}' to exist, found nothing there.")
        if "classifier" in self.parts and not self.held_out:
            raise ConfigError(
                "refit: expected held-out play to calibrate the classifier on, found none. Give held_out, or refit the policy alone."
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """What is refitted: policy and classifier read the features of one world model, so a new one takes both along."""
        return PARTS if "world_model" in self.refit else tuple(part for part in PARTS if part in self.refit)

    @property
    def name(self) -> str:
        """A name that follows from the contents."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.skill}-{digest[:8]}"


@dataclass(frozen=True)
class Retraining:
    """The stages of a request below `root`."""

    request: Request
    root: Path

    @property
    def recipe(self) -> RetrainRecipe:
        """Options of the stages. Raises ConfigError."""
        return load_yaml(RetrainRecipe, self.request.recipe or RECIPE)

    # -- what is there -----------------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> Path:
        """The policy that is given."""
        request = self.request
        return Path(request.base or Path(request.checkpoints) / "policies" / request.skill).absolute()

    @property
    def outcome(self) -> Path:
        """The fine-tuned policy."""
        return self.root / "finetuned" / self.request.skill

    def world_model(self) -> At | Path:
        """The refitted world model, or the one that is given."""
        return At("world_model") if "world_model" in self.request.parts else Path(self.request.checkpoints).absolute() / "world_model"

    def policy(self) -> At | Path:
        """What is fine-tuned."""
        return At("policies", self.request.skill) if "policy" in self.request.parts else self.base

    def classifier(self) -> At | Path:
        """The judge."""
        if "classifier" in self.request.parts:
            return At("classifiers", self.request.skill)
        return Path(self.request.checkpoints).absolute() / "classifiers" / self.request.skill

    def stores(self) -> list[At | Path]:
        """Everything to learn from, new recordings first."""
        return [*([RECORDED] if self.request.bags else ()), *(Path(path).absolute() for path in self.request.stores)]

    # -- stages ------------------------------------------------------------------------------------------------------------------------

    def gathering(self) -> list[Stage]:
        """The stages that bring the data together."""
        stages = []
        if self.request.bags:
            bags = [Path(path).absolute() for path in self.request.bags]
            stages.append(self._make("import", ("diwa", "data", "import", *bags, "--out", RECORDED), {}, RECORDED, resumes=True))
        command = ("python", "-m", "diwa_core.data.attempts", *self.stores(), "--out", DEMOS)
        return [*stages, self._make("demos", command, self.recipe.demos, DEMOS)]

    def stages(self, learn: int, minutes: float | None = None) -> list[Stage]:
        """All stages. learn: how many demonstrations of the skill are learned from; the others begin in the starts to judge on.

        minutes: after which fine-tuning takes the best it has.
        """
        request, model, stages = self.request, self.world_model(), self.gathering()
        stores, held_out = self.stores(), [Path(path).absolute() for path in request.held_out]
        if "world_model" in request.parts:
            given, run_dir = Path(request.checkpoints).absolute() / "world_model", At("runs/world_model")
            command = ("diwa", "world-model", "train", "--init", given, "--play", *stores, "--seed", str(request.seed))
            command += ("--run-dir", run_dir, "--out", model)
            stages.append(self._make("world_model", command, self.recipe.world_model, model, keeps=(run_dir,), resumes=True))
        if "policy" in request.parts:
            command = ("diwa", "policy", "--world-model", model, "--demos", DEMOS, "--skills", request.skill, "--per-skill", str(learn))
            command += ("--seed", str(request.seed), "--out", At("policies"))
            stages.append(self._make("policy", command, self.recipe.policy, self.policy()))
        if "classifier" in request.parts:
            command = ("diwa", "classifier", "train", "--world-model", model, "--skills", request.skill, "--play", *stores)
            command += ("--demos", DEMOS, "--validation", *held_out, "--seed", str(request.seed), "--out", At("classifiers"))
            stages.append(self._make("classifier", command, self.recipe.classifier, self.classifier()))
        run_dir, out = At("runs/finetune"), At("finetuned", request.skill)
        command = ("diwa", "finetune", "--world-model", model, "--policy", self.policy(), "--classifier", self.classifier())
        command += ("--demos", DEMOS, "--learn", str(learn), "--seed", str(request.seed), "--run-dir", run_dir, "--out", out)
        flags = self.recipe.finetune | ({"iterations": request.iterations} if request.iterations else {})
        stage = self._make("finetune", command, flags, out, keeps=(run_dir,), resumes=True)
        speed = () if minutes is None else ("--max-minutes", f"{max(minutes - MINUTES_TO_REPORT, 0.1):.1f}")
        return [*stages, replace(stage, speed=speed)]

    def _make(self, name: str, command: tuple, flags: dict[str, Any], out: At, **rest: Any) -> Stage:
        """A stage. Paths outside the root count by what lies there, which a file of the stage states."""
        words = list(command)
        for key, value in sorted(flags.items()):
            words += ["--" + key.replace("_", "-"), *map(str, value if isinstance(value, (list, tuple)) else [value])]
        outside = {str(word): fingerprint(word) for word in words if isinstance(word, Path)}
        files = {At("runs", "inputs", f"{name}.yaml"): outside} if outside else {}
        inputs = tuple(word for word in words if isinstance(word, At) and word in self._inside() and word != out)
        return Stage(name, tuple(str(w) if isinstance(w, Path) else w for w in words), inputs, (out,), files=files, **rest)

    def _inside(self) -> set[At]:
        """Paths that stages write."""
        made = [RECORDED, DEMOS, self.world_model(), self.policy(), self.classifier()]
        return {path for path in made if not isinstance(path, Path)}


def fingerprint(path: Path) -> str:
    """A checkpoint's identity; of a store or bag names, sizes and times of its files, because hashing gigabytes takes minutes."""
    if (path / "manifest.json").is_file():
        return str(identify(path))
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    rows = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@dataclass
class Status:
    """How far a retraining is, as the node reports it; None where nothing is known yet."""

    stage: str = ""
    progress: float = 0.0
    stages_done: int = 0
    stages: int = 0
    imagined: float | None = None
    held_out: float | None = None
    seconds_left: float | None = None
    detail: str = ""


def retrain(
    request: Request,
    root: str | Path,
    say: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
    max_minutes: float | None = None,
    show: Callable[[Status], None] = lambda status: None,
) -> dict[str, Any] | None:
    """Bring everything below `root` up to date; returns the report, or None when should_stop() or the time ended it before.

    When the time is up the fine-tuning takes the best candidate it has; None comes only if it had not begun yet. What was done is kept, and
    the same call goes on. Raises StageFailed, ConfigError or DataError.
    """
    retraining, began = Retraining(request, Path(root).absolute()), time.monotonic()
    write_whole(retraining.root / "request.json", json.dumps(asdict(request), indent=1))

    def minutes_left() -> float | None:
        return None if max_minutes is None else max_minutes - (time.monotonic() - began) / 60

    def is_over() -> bool:
        return should_stop() or (max_minutes is not None and minutes_left() < 0)

    def run(stages: list[Stage], stop: Callable[[], bool] = is_over) -> bool:
        runner = Runner(Pipeline(retraining.root, stages), 1, say, stop)
        runner.show_status = lambda text: show(read_status(retraining, runner, len(stages), text))
        return runner.run(stages)

    if not run(retraining.gathering()):
        return None
    numbers = [number for number, _, _ in find_attempts(PlayStore.open(retraining.root / DEMOS))]
    count = numbers.count(SKILLS.index(request.skill))
    cloned = 0 if "policy" in request.parts else load_checkpoint(retraining.base, "policy").lineage.get("episodes", 0)
    if count <= max(cloned, 2):
        raise DataError(
            f"retrain: expected more than {max(cloned, 2)} successful attempts at '{request.skill}', so that some are left to judge on, "
            f"found {count}. Record more and mark them, or add a store that has some."
        )
    learn = max(cloned, count - count // 3)
    if not (run(retraining.stages(learn)[:-1]) and run(retraining.stages(learn, minutes_left()), should_stop)):
        return None
    report = make_report(retraining, numbers)
    write_whole(retraining.root / REPORT, json.dumps(report, indent=1))
    return report


def read_status(retraining: Retraining, runner: Runner, stages: int, text: str) -> Status:
    """From the runner, and from the metrics of the fine-tuning."""
    waiting = len(runner.pending) + len(runner.running)
    left, unknown = runner.seconds_left()
    status = Status(
        stages_done=stages - waiting, stages=len(retraining.stages(0)), detail=text, seconds_left=None if unknown or not left else left
    )
    if runner.running:
        progress = runner.running[0].progress()
        status.stage, status.progress = runner.running[0].stage.name, progress[1] if progress else 0.0
    for row in read_rows(retraining.root / "runs" / "finetune" / "metrics.jsonl"):
        status.imagined, status.held_out = row.get("success", status.imagined), row.get("judged", status.held_out)
    return status


def read_rows(path: Path) -> list[dict]:
    """Whole rows of a file of JSON lines that is being written."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def make_report(retraining: Retraining, numbers: list[int]) -> dict[str, Any]:
    """What was made from what."""
    request, tuned = retraining.request, load_checkpoint(retraining.outcome, "policy")
    frames = {str(path): len(PlayStore.open(retraining.root / path)) for path in retraining.stores()}
    return {
        "skill": request.skill,
        "checkpoint": str(retraining.outcome),
        "identity": tuned.identity,
        "base": tuned.lineage["base"],
        "world_model": str(retraining.root / retraining.world_model()),
        "world_model_identity": tuned.lineage["world_model"],
        "refitted": list(request.parts),
        "bags": list(request.bags),
        "frames": frames,
        "attempts": {SKILLS[number]: numbers.count(number) for number in sorted(set(numbers))},
        "imagined": {name: tuned.card.get(name) for name in ("imagined_before", "imagined_after", "judged_before", "judged_after")},
        "seconds": {path.stem: json.loads(path.read_text())["seconds"] for path in (retraining.root / "stamps").glob("*.json")},
    }
