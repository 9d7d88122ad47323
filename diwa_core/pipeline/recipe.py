"""The recipe of DiWA, config/pipeline.yaml, as stages: play -> world model -> demonstrations -> policies -> classifiers -> fine-tuning ->
evaluation -> report.

Below the root: data/, world_model/, more_models/<name>/, seed<k>/{policies,classifiers,finetuned}/<skill>, report/; runs/ holds what a
stopped training continues from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diwa_core.config import from_dict, load_yaml, to_dict
from diwa_core.errors import ConfigError
from diwa_core.pipeline.stage import At, Stage

DEMOS, ROLLOUTS, WORLD_MODEL, REPORT = At("data/demos"), At("data/rollouts"), At("world_model"), At("report")
SIZES = ("small", "paper", "lowdim")


@dataclass(frozen=True)
class PlayFlags:
    """Options of `python -m diwa_core.sim.play`."""

    frames: int
    seed: int
    episode_frames: int | None = None
    button_weight: float | None = None


@dataclass(frozen=True)
class DemoFlags:
    """Options of `python -m diwa_core.sim.demos`. All skills are demonstrated: the scenes of one are starts for another."""

    per_skill: int
    seed: int
    noise: float
    skills: tuple[str, ...] | None = None


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
        stores = [self.play(name, flags) for name, flags in (self.recipe.play | self.recipe.validation).items()]
        shared = [*stores, self.demos(), self.world_model(), *map(self.another_model, self.recipe.more_models)]
        policies = [self.policy(seed, skill) for seed in self.seeds for skill in self.skills]
        learning = [self.rollouts(), *map(self.classifiers, self.seeds)]
        finetuned = [self.finetune(seed, skill) for seed in self.seeds for skill in self.skills]
        return [*shared, *policies, *learning, *finetuned, self.evaluate(), self.report(), self.card()]

    # ---- data ---------------------------------------------------------------------------------------------------------------------

    @property
    def play_stores(self) -> list[At]:
        """Play to learn from."""
        return [At("data", name) for name in self.recipe.play]

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

    def world_model(self) -> Stage:
        """The world model that serves all skills."""
        return self._train_model("world_model", WORLD_MODEL, self.recipe.world_model, ())

    def another_model(self, name: str) -> Stage:
        """A further world model with the same image codes, to dream in or to judge."""
        flags = merge(self.recipe.world_model, self.recipe.more_models[name])
        return self._train_model(f"more_models/{name}", At("more_models", name), flags, (WORLD_MODEL,))

    def _train_model(self, name: str, out: At, flags: dict[str, Any], codes: tuple[At, ...]) -> Stage:
        run_dir = At("runs") / name
        command = ("diwa", "world-model", "train", "--size", self.size, "--play", *self.play_stores)
        command += ("--codes", *codes) if codes else ()
        command += ("--run-dir", run_dir, "--out", out)
        cores = 1 if codes else 2  # the image codes of the two views train side by side
        inputs = (*self.play_stores, *codes)
        return self._make(name, command, flags, inputs, (out,), keeps=(run_dir,), resumes=True, cores=cores, device=True)

    def policy(self, seed: int, skill: str) -> Stage:
        """A base policy."""
        folder = At(f"seed{seed}", "policies")
        command = ("diwa", "policy", "--world-model", WORLD_MODEL, "--demos", DEMOS, "--skills", skill)
        command += ("--seed", str(seed), "--out", folder)
        return self._make(f"policies/seed{seed}/{skill}", command, self.recipe.policy, (WORLD_MODEL, DEMOS), (folder / skill,))

    def rollouts(self) -> Stage:
        """Recorded episodes of the first seed's base policies, for measuring world model and classifiers."""
        folder = At(f"seed{self.seeds[0]}", "policies")
        command = ("diwa", "evaluate", "--world-model", WORLD_MODEL, "--policies", folder, "--skills", *self.skills, "--record", ROLLOUTS)
        inputs = (WORLD_MODEL, *(folder / skill for skill in self.skills))
        return self._make("rollouts", command, self.recipe.rollouts, inputs, (ROLLOUTS,), keeps=(ROLLOUTS,), cores=self.workers)

    def classifiers(self, seed: int) -> Stage:
        """Success classifiers; those of several skills learn from each other's windows. Rollouts measure them, nothing more."""
        folder = At(f"seed{seed}", "classifiers")
        command = ("diwa", "classifier", "train", "--world-model", WORLD_MODEL, *self._more_models(), "--skills", *self.skills)
        command += ("--play", *self.play_stores, "--demos", DEMOS, "--validation", *self.validation_stores, "--rollouts", ROLLOUTS)
        command += ("--seed", str(seed), "--out", folder)
        inputs = (WORLD_MODEL, *self.more_models, *self.play_stores, DEMOS, *self.validation_stores, ROLLOUTS)
        outputs = tuple(folder / skill for skill in self.skills)
        return self._make(f"classifiers/seed{seed}", command, self.recipe.classifier, inputs, outputs, device=True)

    def finetune(self, seed: int, skill: str) -> Stage:
        """A fine-tuned policy."""
        base, classifier, out = (At(f"seed{seed}", part, skill) for part in ("policies", "classifiers", "finetuned"))
        run_dir = At("runs", f"seed{seed}", "finetune", skill)
        command = ("diwa", "finetune", "--world-model", WORLD_MODEL, *self._more_models(), "--policy", base, "--classifier", classifier)
        command += ("--demos", DEMOS, "--seed", str(seed), "--run-dir", run_dir, "--out", out)
        inputs = (WORLD_MODEL, *self.more_models, base, classifier, DEMOS)
        name = f"finetune/seed{seed}/{skill}"
        return self._make(name, command, self.recipe.finetune, inputs, (out,), keeps=(run_dir,), resumes=True, device=True)

    @property
    def more_models(self) -> list[At]:
        """The further world models."""
        return [At("more_models", name) for name in self.recipe.more_models]

    def _more_models(self) -> tuple[str | At, ...]:
        return ("--more-models", *self.more_models) if self.more_models else ()

    # ---- measuring ----------------------------------------------------------------------------------------------------------------

    def evaluate(self) -> Stage:
        """Base beside fine-tuned policies in the simulator; episodes that are known already are not run again."""
        sides = [(At(f"seed{seed}", "policies"), At(f"seed{seed}", "finetuned")) for seed in self.seeds]
        pairs = [word for side in sides for word in ("--pair", *side)]
        command = ("diwa", "evaluate", "--world-model", WORLD_MODEL, *pairs, "--skills", *self.skills, "--write-card", "--out", REPORT)
        inputs = (WORLD_MODEL, *(folder / skill for side in sides for folder in side for skill in self.skills))
        outputs = (REPORT / "comparison.json", REPORT / "report.html")
        return self._make("evaluate", command, self.recipe.evaluate, inputs, outputs, resumes=True, cores=self.workers)

    def report(self) -> Stage:
        """How far the world model can be trusted."""
        out = REPORT / "world_model"
        command = ("diwa", "world-model", "report", "--checkpoint", WORLD_MODEL, "--play", *self.play_stores)
        command += ("--validation", *self.validation_stores, "--rollouts", ROLLOUTS, "--out", out)
        inputs = (WORLD_MODEL, *self.play_stores, *self.validation_stores, ROLLOUTS)
        return self._make("report", command, self.recipe.report, inputs, (out / "report.json", out / "report.txt"), device=True)

    def card(self) -> Stage:
        """The model card of the first seed."""
        folder, out = At(f"seed{self.seeds[0]}"), REPORT / "README.md"
        figures, comparison = REPORT / "world_model" / "report.json", REPORT / "comparison.json"
        command = ("diwa", "card", folder, "--world-model", WORLD_MODEL, "--report", figures, "--comparison", comparison, "--out", out)
        parts = (folder / part / skill for part in ("policies", "finetuned", "classifiers") for skill in self.skills)
        return self._make("card", command, {}, (WORLD_MODEL, *parts, figures, comparison), (out,))

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
