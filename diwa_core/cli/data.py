"""`diwa data <verb>`: bags and other data sets into play stores, and out again."""

from __future__ import annotations

import argparse
from pathlib import Path

from diwa_core.cli.progress import stage_progress
from diwa_core.errors import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-verb each."""
    verbs = parser.add_subparsers(dest="data_verb", metavar="verb", required=True)
    _add_import(verbs.add_parser("import", help="rosbags into a play store; stopped, the same command goes on"))
    _add_calvin(verbs.add_parser("import-calvin", help="CALVIN's own data set into a play store; stopped, the same command goes on"))
    _add_info(verbs.add_parser("info", help="an HTML report of a play store"))
    _add_export(verbs.add_parser("export", help="a play store into a LeRobot data set (v3.0)"))
    _add_recover(verbs.add_parser("recover", help="make bags whole whose recording was killed"))


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 when a part of the input was refused."""
    return args.run_data(args)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run_data=_run_import)
    parser.add_argument("bags", nargs="+", metavar="BAG", help="folder of a bag, or one of its files")
    parser.add_argument("--out", required=True, metavar="STORE")
    parser.add_argument("--contract", metavar="YAML", help="for bags that carry none (default: the play table's)")
    parser.add_argument("--topic", action="append", default=[], metavar="NAME=BAG_TOPIC", help="where a renamed topic of the contract is")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-skew-s", type=float, help="how much older than a camera frame another sample may be")
    parser.add_argument("--frozen-motion-m", type=float, help="0 for real cameras: they never repeat a picture")
    parser.add_argument("--idle-s", type=float, help="longer rests are cut out; 0 keeps all")
    parser.add_argument("--max-loss", type=float, help="share of lost frames above which a take is left out")
    parser.add_argument("--keep-bad", action="store_true", default=None, help="keep takes that lost too much")


def _run_import(args: argparse.Namespace) -> int:
    from diwa_core.config import load_yaml
    from diwa_core.contract import Contract
    from diwa_core.data.bag_import import ImportSettings, import_bags

    names = ("max_skew_s", "frozen_motion_m", "idle_s", "max_loss", "keep_bad")
    settings = ImportSettings(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    contract = load_yaml(Contract, args.contract) if args.contract else None
    with stage_progress() as progress:
        report = import_bags(args.bags, args.out, contract, settings, _read_renames(args.topic), args.workers, progress)
    for audit in report.audits:
        marks = ", ".join(sorted({take["outcome"] for take in audit.takes} - {""})) or "no marks"
        print(
            f"{audit.bag}: {audit.episodes} episodes, {audit.kept} of {audit.frames} frames kept, "
            f"{100 * audit.idle_share:.1f} % idle, {audit.lost} lost, {marks}"
        )
        for text in (*audit.notes, *_list_losses(audit)):
            print(f"  {text}")
    for path, reason in report.refused.items():
        print(f"{path}: refused: {reason}")
    before = f" ({report.done} bags were there before)" if report.done else ""
    print(f"{args.out}: {len(report.store.episodes)} episodes, {len(report.store)} frames{before}")
    return 1 if report.refused else 0


def _add_recover(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run_data=_run_recover)
    parser.add_argument("bags", nargs="+", metavar="BAG", help="folder of an MCAP bag; it is mended in place")


def _run_recover(args: argparse.Namespace) -> int:
    from diwa_core.data.bag_recover import recover_bag

    refused = 0
    for bag in args.bags:
        try:
            print(recover_bag(bag).sentence)
        except DataError as error:
            print(f"refused: {error}")
            refused += 1
    return int(refused > 0)


def _list_losses(audit: object) -> list[str]:
    refused = [f"{topic}: {entry['count']} messages refused: {entry['reason']}" for topic, entry in audit.refused.items()]
    return refused + [f"a take of {take['frames']} frames is bad: {take['bad']}" for take in audit.takes if take["bad"]]


def _read_renames(pairs: list[str]) -> dict[str, str]:
    renamed = {}
    for pair in pairs:
        name, equals, topic = pair.partition("=")
        if not equals or not name or not topic:
            raise ConfigError(f"--topic: expected NAME=BAG_TOPIC, as camera/static/image_raw=/cam0/image, found '{pair}'.")
        renamed[name.strip("/")] = topic if topic.startswith("/") else f"/{topic}"
    return renamed


def _add_calvin(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run_data=_run_calvin)
    parser.add_argument("folder", help="training/ or validation/ of the data set, with episode_*.npz and ep_start_end_ids.npy")
    parser.add_argument("--out", required=True, metavar="STORE")


def _run_calvin(args: argparse.Namespace) -> int:
    from diwa_core.data.calvin_import import import_calvin

    with stage_progress() as progress:
        report = import_calvin(args.folder, args.out, progress)
    for text in report.notes:
        print(f"  {text}")
    print(f"{args.out}: {len(report.store.episodes)} episodes, {len(report.store)} frames, {report.labelled} of them labelled with a skill")
    return 0


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run_data=_run_info)
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("--out", metavar="HTML", help="default: data_info.html in the working folder")


def _run_info(args: argparse.Namespace) -> int:
    from diwa_core.data.info import describe_store, write_report
    from diwa_core.data.store import PlayStore

    store, out = PlayStore.open(args.store), Path(args.out or "data_info.html")
    print(describe_store(store))
    write_report(store, out)
    print(f"report: {out}")
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run_data=_run_export)
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("--out", required=True, metavar="FOLDER")


def _run_export(args: argparse.Namespace) -> int:
    from diwa_core.data.lerobot_export import export_lerobot
    from diwa_core.data.store import PlayStore

    with stage_progress() as progress:
        print(f"LeRobot data set: {export_lerobot(PlayStore.open(args.store), args.out, progress)}")
    return 0
