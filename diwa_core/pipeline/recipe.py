"""The recipe of DiWA, config/pipeline.yaml, as stages: play -> world model -> demonstrations -> policies -> classifiers -> fine-tuning ->
evaluation -> report; then, if asked for, rounds of refitting.

Below the root: data/, world_model/, more_models/<name>/, seed<k>/{policies,classifiers,finetuned}/<skill>, report/; the same of a refit
below refit<n>/; runs/ holds what a stopped training continues from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diwa_core.config import from_dict, load_yaml, to_dict
from diwa_core.errors import ConfigError
from diwa_core.pipeline.stage import At, Stage

DEMOS, ROLLOUTS = At("data/demos"), At("data/rollouts")
SIZES = ("small", "paper", "lowdim")


@dataclass(frozen=True)
class PlayFlags:
    """Options of `python -m diwa_core.sim.play`."""

    frames: int
    seed: int
    episode_frames: int | None = None
    button_weight: float | None = None
    wiggle_share: float | None = None
    strength_power: float | None = None
    misjudged_share: float | None = None
    misjudged_m: float | None = None


@dataclass(frozen=True)
class DemoFlags:
    """Options of `python -m diwa_core.sim.demos`. All skills are demonstrated: the scenes of one are starts for another."""

    per_skill: int
    seed: int
    noise: float
    skills: tuple[str, ...] | None = None


@dataclass(frozen=True)
class RefitFlags:
    """After fine-tuning: `rounds` times record the first seed's fine-tuned policies, refit the world models, and fine-tune again.

    rollouts: options of the recording, which costs environment steps. world_model: what is different from the recipe's in a refit.
    """

    rounds: int = 0
    rollouts: dict = field(default_factory=dict)
    world_model: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ConfigError(f"refit.rounds: expected 0 (none) or more, found {self.rounds}.")


@dataclass(frozen=True)
class Recipe:
    """What the stages are made from. A mapping holds options of the stage's command, `_` for `-`; an option whose value is a mapping
    becomes a YAML file. play, validation: stores by name. more_models: world models that share the codes of the first, by name.
    sizes: what is different for a size of the world model.
    """

    training_seeds: tuple[int, ...]
    play: dict
    validation: dict
    demos: DemoFlags
    world_model: dict = field(default_factory=dict)
    more_models: dict = field(default_factory=dict)
    policy: dict = field(default_factory=dict)
    classifier: dict = field(default_factory=dict)
    finetune: dict = field(default_factory=dict)
    evaluate: dict = field(default_factory=dict)
    rollouts: dict = field(default_factory=dict)
    report: dict = field(default_factory=dict)
    refit: RefitFlags = field(default_factory=RefitFlags)
    sizes: dict = field(default_factory=dict)


def load_recipe(path: str | Path, size: str) -> Recipe:
    """Read a recipe and what it says about `size`; raises ConfigError on unknown keys and names."""
    if size not in SIZES:
        raise ConfigError(f"--size: expected one of {', '.join(SIZES)}, found '{size}'.")
    recipe = load_yaml(Recipe, path)
    unknown = [name for name in recipe.sizes if name not in SIZES]
    if unknown:
        raise ConfigError(f"{path}: sizes: expected some of {', '.join(SIZES)}, found '{unknown[0]}'.")
    recipe = from_dict(Recipe, merge(to_dict(recipe), recipe.sizes.get(size) or {}) | {"sizes": {}}, f"{path}: sizes.{size}")
    for part in ("play", "validation"):
        stores = getattr(recipe, part)
        if not stores:
            raise ConfigError(f"{path}: {part}: expected at least one store, found none.")
        for name, flags in stores.items():
            from_dict(PlayFlags, flags, f"{path}: {part}.{name}")
    doubled = [name for name in recipe.play if name in recipe.validation]
    if doubled:
        raise ConfigError(f"{path}: expected other names in validation than in play, found '{doubled[0]}' in both.")
    return recipe


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping."""
    both = {key: merge(base[key], value) for key, value in changes.items() if isinstance(value, dict) and isinstance(base.get(key), dict)}
    return base | changes | both


@dataclass(frozen=True)
class Round:
    """Where the stages of a round work. number: 0 is offline, 1 the first refit; play: stores to learn from."""

    number: int
    play: tuple[At, ...]

    @property
    def base(self) -> At:
        """Its folder."""
        return At(f"refit{self.number}") if self.number else At()

    @property
    def world_model(self) -> At:
        """The world model that serves all skills."""
        return self.base / "world_model"

    @property
    def report(self) -> At:
        """Folder of what was measured."""
        return self.base / "report"

    def seed(self, seed: int) -> At:
        """Folder of a training seed."""
        return self.base / f"seed{seed}"

    def stage(self, name: str) -> str:
        """The name of a stage."""
        return str(self.base / name)


@dataclass(frozen=True)
class Builder:
    """Turns a recipe into stages. `workers` processes at a time; device: None leaves it to each command."""

    recipe: Recipe
    size: str
    skills: tuple[str, ...]
    seeds: tuple[int, ...]
    workers: int = 2
    device: str | None = None

    def stages(self) -> list[Stage]:
        """All stages in the order of the method."""
        recipe, offline = self.recipe, Round(0, tuple(At("data", name) for name in self.recipe.play))
        stages = [self.play(name, flags) for name, flags in (recipe.play | recipe.validation).items()]
        stages += [self.demos(), self.world_model(offline), *(self.another_model(offline, name) for name in recipe.more_models)]
        stages += [*self.policies(offline), self.rollouts(offline), *self.improve(offline), self.card(offline)]
        last = offline
        for number in range(1, recipe.refit.rounds + 1):
            recorded = At("data", f"refit{number}")
            refit = Round(number, (*last.play, recorded))
            stages += [self.record(last, recorded), self.world_model(refit, last)]
            stages += [self.another_model(refit, name, last) for name in recipe.more_models]
            stages += [*self.policies(refit), *self.improve(refit)]
            last = refit
        return stages

    def policies(self, at: Round) -> list[Stage]:
        """The base policies."""
        return [self.policy(at, seed, skill) for seed in self.seeds for skill in self.skills]

    def improve(self, at: Round) -> list[Stage]:
        """From base policies to what has become of them."""
        finetuned = [self.finetune(at, seed, skill) for seed in self.seeds for skill in self.skills]
        return [*(self.classifiers(at, seed) for seed in self.seeds), *finetuned, self.evaluate(at), self.report(at)]

    # ---- data ---------------------------------------------------------------------------------------------------------------------

    @property
    def validation_stores(self) -> list[At]:
        """Play to measure on."""
        return [At("data", name) for name in self.recipe.validation]

    def play(self, name: str, flags: dict[str, Any]) -> Stage:
        """One play store."""
        out = At("data", name)
        command = ("python", "-m", "diwa_core.sim.play", "--out", out)
        return self._generate(f"play/{name}", command, flags, out)

    def demos(self) -> Stage:
        """Demonstrations of all skills."""
        command = ("python", "-m", "diwa_core.sim.demos", "--out", DEMOS)
        return self._generate("demos", command, to_dict(self.recipe.demos), DEMOS)

    def _generate(self, name: str, command: tuple[str | At, ...], flags: dict[str, Any], out: At) -> Stage:
        return self._make(name, command, flags, (), (out,), keeps=(out,), resumes=True, checks_itself=True, cores=self.workers)

    # ---- training -----------------------------------------------------------------------------------------------------------------

    def world_model(self, at: Round, before: Round | None = None) -> Stage:
        """The world model that serves all skills: new, or that of the round `before` refitted."""
        return self._train_model(at, "world_model", self.recipe.world_model, before)

    def another_model(self, at: Round, name: str, before: Round | None = None) -> Stage:
        """A further world model with the same image codes, to dream in or to judge."""
        return self._train_model(at, f"more_models/{name}", merge(self.recipe.world_model, self.recipe.more_models[name]), before)

    def _train_model(self, at: Round, name: str, flags: dict[str, Any], before: Round | None) -> Stage:
        out, run_dir = at.base / name, At("runs") / at.base / name
        command: tuple[str | At, ...] = ("diwa", "world-model", "train")
        if before:
            start, flags = ("--init", before.base / name), merge(flags, self.recipe.refit.world_model)
        else:
            start = () if out == at.world_model else ("--codes", at.world_model)
            command += ("--size", self.size)
        command += ("--play", *at.play, *start, "--run-dir", run_dir, "--out", out)
        cores = 1 if start else 2  # the image codes of the two views train side by side
        inputs = (*at.play, *start[1:])
        outputs = (out, *self._encoded(at)) if out == at.world_model else (out,)
        return self._make(at.stage(name), command, flags, inputs, outputs, keeps=(run_dir,), resumes=True, cores=cores, device=True)

    def _encoded(self, at: Round) -> tuple[At, ...]:
        """The play as the training of the first world model encoded it; not of end-to-end CNNs, which never stand still."""
        return () if self.size == "paper" else (At("runs") / at.world_model / "embeddings.safetensors",)

    def policy(self, at: Round, seed: int, skill: str) -> Stage:
        """A base policy."""
        folder = at.seed(seed) / "policies"
        command = ("diwa", "policy", "--world-model", at.world_model, "--demos", DEMOS, "--skills", skill)
        command += ("--seed", str(seed), "--out", folder)
        inputs = (at.world_model, DEMOS)
        return self._make(at.stage(f"policies/seed{seed}/{skill}"), command, self.recipe.policy, inputs, (folder / skill,))

    def rollouts(self, at: Round) -> Stage:
        """Recorded episodes of the first seed's base policies, for measuring world model and classifiers."""
        return self._record("rollouts", at, "policies", ROLLOUTS, self.recipe.rollouts)

    def record(self, at: Round, out: At) -> Stage:
        """Recorded episodes of the first seed's fine-tuned policies, for refitting the world model: on starts that measure nothing."""
        return self._record(f"{out.name}/rollouts", at, "finetuned", out, self.recipe.refit.rollouts, ("--split", "train"))

    def _record(self, name: str, at: Round, kind: str, out: At, flags: dict[str, Any], extra: tuple[str, ...] = ()) -> Stage:
        folder = at.seed(self.seeds[0]) / kind
        command = ("diwa", "evaluate", "--world-model", at.world_model, "--policies", folder, "--skills", *self.skills)
        command += ("--record", out, *extra)
        inputs = (at.world_model, *(folder / skill for skill in self.skills))
        return self._make(name, command, flags, inputs, (out,), keeps=(out,), cores=self.workers)

    def classifiers(self, at: Round, seed: int) -> Stage:
        """Success classifiers; those of several skills learn from each other's windows. ROLLOUTS measure them, nothing more."""
        folder = at.seed(seed) / "classifiers"
        command = ("diwa", "classifier", "train", "--world-model", at.world_model, *self._more_models(at), "--skills", *self.skills)
        command += ("--play", *at.play, "--demos", DEMOS, "--validation", *self.validation_stores, "--rollouts", ROLLOUTS)
        command += ("--seed", str(seed), "--out", folder)
        encoded = self._encoded(at)
        command += ("--encoded", *encoded) if encoded else ()
        inputs = (at.world_model, *encoded, *self.more_models(at), *at.play, DEMOS, *self.validation_stores, ROLLOUTS)
        outputs = tuple(folder / skill for skill in self.skills)
        return self._make(at.stage(f"classifiers/seed{seed}"), command, self.recipe.classifier, inputs, outputs, device=True)

    def finetune(self, at: Round, seed: int, skill: str) -> Stage:
        """A fine-tuned policy."""
        base, classifier, out = (at.seed(seed) / part / skill for part in ("policies", "classifiers", "finetuned"))
        run_dir = At("runs") / at.seed(seed) / "finetune" / skill
        command = ("diwa", "finetune", "--world-model", at.world_model, *self._more_models(at), "--policy", base)
        command += ("--classifier", classifier, "--demos", DEMOS, "--play", *at.play)
        command += ("--seed", str(seed), "--run-dir", run_dir, "--out", out)
        inputs = (at.world_model, *self.more_models(at), base, classifier, DEMOS, *at.play)
        name = at.stage(f"finetune/seed{seed}/{skill}")
        return self._make(name, command, self.recipe.finetune, inputs, (out,), keeps=(run_dir,), resumes=True, device=True)

    def more_models(self, at: Round) -> list[At]:
        """The further world models."""
        return [at.base / "more_models" / name for name in self.recipe.more_models]

    def _more_models(self, at: Round) -> tuple[str | At, ...]:
        return ("--more-models", *self.more_models(at)) if self.recipe.more_models else ()

    # ---- measuring ----------------------------------------------------------------------------------------------------------------

    def evaluate(self, at: Round) -> Stage:
        """Base beside fine-tuned policies in the simulator; episodes that are known already are not run again."""
        sides = [(at.seed(seed) / "policies", at.seed(seed) / "finetuned") for seed in self.seeds]
        pairs = [word for side in sides for word in ("--pair", *side)]
        command = ("diwa", "evaluate", "--world-model", at.world_model, *pairs, "--skills", *self.skills, "--write-card")
        command += ("--out", at.report)
        inputs = (at.world_model, *(folder / skill for side in sides for folder in side for skill in self.skills))
        outputs = (at.report / "comparison.json", at.report / "report.html")
        return self._make(at.stage("evaluate"), command, self.recipe.evaluate, inputs, outputs, resumes=True, cores=self.workers)

    def report(self, at: Round) -> Stage:
        """How far the world model can be trusted."""
        out = at.report / "world_model"
        command = ("diwa", "world-model", "report", "--checkpoint", at.world_model, "--play", *at.play)
        command += ("--validation", *self.validation_stores, "--rollouts", ROLLOUTS, "--out", out)
        inputs = (at.world_model, *at.play, *self.validation_stores, ROLLOUTS)
        outputs = (out / "report.json", out / "report.txt")
        return self._make(at.stage("report"), command, self.recipe.report, inputs, outputs, device=True)

    def card(self, at: Round) -> Stage:
        """The model card of the first seed."""
        folder, out = at.seed(self.seeds[0]), at.report / "README.md"
        figures, comparison = at.report / "world_model" / "report.json", at.report / "comparison.json"
        command = ("diwa", "card", folder, "--world-model", at.world_model, "--report", figures, "--comparison", comparison, "--out", out)
        parts = (folder / part / skill for part in ("policies", "finetuned", "classifiers") for skill in self.skills)
        return self._make("card", command, {}, (at.world_model, *parts, figures, comparison), (out,))

    # -------------------------------------------------------------------------------------------------------------------------------

    def _make(self, name: str, command: tuple, flags: dict[str, Any], inputs: tuple = (), outputs: tuple = (), **rest: Any) -> Stage:
        """A stage with the recipe's options behind the command, and the options that only change its speed."""
        words, files = list(command), {}
        for key, value in sorted(flags.items()):
            option = "--" + key.replace("_", "-")
            if option in command:
                raise ConfigError(f"recipe, stage {name}: the pipeline gives {option} itself; leave it out.")
            if isinstance(value, dict):
                path = At("runs", "options", f"{name}.{key}.yaml")
                files[path] = value
                words += [option, path]
            elif value is not None and value is not False:
                values = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
                words += [option, *map(str, values)]
        cores = min(rest.pop("cores", 1), self.workers)
        speed = ["--device", self.device] if rest.pop("device", False) and self.device else []
        if command[0] == "python" or command[:2] == ("diwa", "evaluate"):
            speed += ["--workers", str(cores)]
        return Stage(name, tuple(words), inputs, outputs, tuple(speed), files, cores=cores, **rest)
