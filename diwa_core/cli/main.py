"""`diwa <verb>`: one table of verbs; only the module of the asked verb is imported."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NamedTuple

from diwa_core import __version__
from diwa_core.errors import DiwaError


class Verb(NamedTuple):
    """A verb is a module with `add_arguments(parser)` and `run(args) -> int` (the exit code)."""

    name: str
    help: str
    module: str


VERBS = (
    Verb("doctor", "say what is installed, what is missing and how to mend it", "diwa_core.cli.doctor"),
    Verb("pipeline", "go from play to fine-tuned policies and their report, skipping what is up to date", "diwa_core.cli.pipeline"),
    Verb("data", "bring rosbags and other data sets into play stores, look into them, export them", "diwa_core.cli.data"),
    Verb("world-model", "train a world model on play, or measure one", "diwa_core.cli.world_model"),
    Verb("policy", "clone base policies from demonstrations", "diwa_core.cli.policy"),
    Verb("classifier", "train success classifiers, the reward in imagination, or print how good they are", "diwa_core.cli.classifier"),
    Verb("finetune", "improve a policy in imagination, from recorded data alone", "diwa_core.cli.finetune"),
    Verb("retrain", "from recorded bags or stores to a better policy of one skill; stopped, it goes on", "diwa_core.cli.retrain"),
    Verb("dppo", "improve a policy in the simulator instead: the online baseline, counted in environment steps", "diwa_core.cli.dppo"),
    Verb("evaluate", "measure success rates in the simulator, without ROS", "diwa_core.cli.evaluate"),
    Verb("demo", "run the skills on the ROS 2 graph in simulation and write a report", "diwa_core.cli.demo"),
    Verb("loop", "record, retrain and swap on the running graph in simulation, then report before and after", "diwa_core.cli.loop"),
    Verb("card", "print the model card of a folder of checkpoints", "diwa_core.cli.card"),
    Verb("security", "write SROS 2 policies for a graph", "diwa_core.cli.security"),
    Verb("record", "record the running graph into a rosbag, or tell a running recorder what to do", "diwa_core.cli.record"),
    Verb("robot", "state of the arm on the running graph; stop, resume, recover, home; run a skill once", "diwa_core.cli.robot"),
    Verb("up", "start the ROS 2 graph and stop it again on Ctrl-C", "diwa_core.cli.up"),
    Verb("swap", "exchange a policy on the running graph, let it shadow, undo that, or list what happened", "diwa_core.cli.swap"),
)


def build_parser(asked: str | None) -> argparse.ArgumentParser:
    """Parser with every verb listed, and the arguments of the asked one."""
    parser = argparse.ArgumentParser(prog="diwa", description="World models, diffusion policies and fine-tuning in imagination, on ROS 2.")
    parser.add_argument("--version", action="version", version=f"diwa {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    for verb in VERBS:
        child = verbs.add_parser(verb.name, help=verb.help, description=verb.help[0].upper() + verb.help[1:] + ".")
        if verb.name == asked:
            module = importlib.import_module(verb.module)
            module.add_arguments(child)
            child.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. A DiwaError is one clear message on stderr and exit code 2; 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    asked = next((word for word in arguments if not word.startswith("-")), None)
    try:
        args = build_parser(asked).parse_args(arguments)
        return args.run(args)
    except DiwaError as error:
        print(f"diwa: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
