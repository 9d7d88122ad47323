"""Successful attempts at skills, cut out of recorded stores into one store of demonstrations: starts, and examples to clone.

`python -m diwa_core.data.attempts STORE... --out data/demos`. An attempt is a run of frames that are labelled with one skill. Where a
store holds the simulated scene the skill's oracle says whether and when it succeeded. Without it the operator's mark does, and in a store
without any mark the label itself. Of episodes without any label, which is play, and of attempts that an operator saw fail the beginnings
come along: starts to learn on.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diwa_core.data.marks import marked_episodes
from diwa_core.data.store import FAILURE, SUCCESS, UNMARKED, PlayStore
from diwa_core.errors import DataError, DiwaError
from diwa_core.sim.skills import SKILLS, skill_progress

SHORTEST_FRAMES = 9  # twice a warm-up, and something to do
LONGEST_FRAMES = 200
BEGINNING_FRAMES = 48  # of unlabelled play: a start lies up to LATER_FRAMES of `diwa finetune` into it, in its first third
NO_SKILL = -1


def find_attempts(store: PlayStore) -> list[tuple[int, int, int]]:
    """(skill number, first frame, exclusive end) of every successful attempt, in order of time; [] without labels."""
    if "skill" not in store.fields:
        return []
    labels = store.load(("skill",))["skill"]
    scenes = store.load(("scene_obs",))["scene_obs"] if "scene_obs" in store.fields else None
    if scenes is None and set(store.marks) - {UNMARKED}:
        pieces = [(number, first, end) for first, end, number, mark in marked_episodes(store) if mark == SUCCESS]
        return [piece for piece in pieces if SHORTEST_FRAMES <= piece[2] - piece[1] <= LONGEST_FRAMES]
    found = []
    for start, end in store.episodes:
        borders = start + np.flatnonzero(np.diff(labels[start:end], prepend=-1, append=-1))
        for first, last in itertools.pairwise(borders):
            number = int(labels[first])
            if number < 0:
                continue
            frames = int(last - first) if scenes is None else frames_to_success(SKILLS[number], scenes[first:end], last - first)
            if frames is not None and SHORTEST_FRAMES <= frames <= LONGEST_FRAMES:
                found.append((number, int(first), int(first) + frames))
    return found


def find_beginnings(store: PlayStore) -> list[tuple[int, int, int]]:
    """(NO_SKILL, first frame, exclusive end) of the beginning of every episode without a label on any frame, and of marked failures."""
    failed = [mark == FAILURE and "scene_obs" not in store.fields for mark in store.marks]
    labels = store.load(("skill",))["skill"] if "skill" in store.fields else np.full(len(store), NO_SKILL, np.int8)
    episodes = [episode for episode, no in zip(store.episodes, failed, strict=True) if no or (labels[slice(*episode)] == NO_SKILL).all()]
    return [(NO_SKILL, start, min(end, start + BEGINNING_FRAMES)) for start, end in episodes if end - start >= SHORTEST_FRAMES]


def frames_to_success(skill: str, scenes: np.ndarray, length: int) -> int | None:
    """Frames up to the first on which an attempt that began with the first of `scenes` [T, 24] has succeeded, that one included, or None.

    length: frames of the attempt; its last action ends on the frame behind it.
    """
    done = np.flatnonzero(skill_progress(skill, scenes[0], scenes[: length + 1]) > 1)
    return int(done[0]) + 1 if len(done) else None


def gather_attempts(paths: list[str], out: str, most: int = 100) -> dict[str, int]:
    """Write the first `most` successful attempts at each skill, and as many beginnings of unlabelled play, those of earlier stores first.

    Returns how many attempts there are by skill. Whole or not at all: an older `out` is replaced. Raises DataError when the stores are of
    different contracts or hold no attempt.
    """
    stores = [PlayStore.open(path) for path in paths]
    for store in stores[1:]:
        difference = stores[0].contract.difference(store.contract)
        if difference:
            raise DataError(f"{store.path}: {difference}. Retrain from stores of one contract.")
    fields = tuple(name for name in stores[0].fields if all(name in store.fields for store in stores))
    temporary = Path(out).with_name(f".{Path(out).name}.gathered")
    shutil.rmtree(temporary, ignore_errors=True)
    sources = [store.content_hash for store in stores]
    gathered = PlayStore.create(temporary, stores[0].contract, {"generator": "attempts", "stores": sources}, fields)
    counts = dict.fromkeys([*range(len(SKILLS)), NO_SKILL], 0)
    for store, number, first, end in _all_pieces(stores):
        if counts[number] < most:
            counts[number] += 1
            episode = {name: store.read(name, first, end) for name in fields}
            mark = UNMARKED if number == NO_SKILL else SUCCESS
            gathered.append_episode({**episode, "skill": np.full(end - first, number, np.int8)}, mark)
    found = {skill: counts[number] for number, skill in enumerate(SKILLS) if counts[number]}
    if not found:
        shutil.rmtree(temporary)
        episodes, unlabelled = sum(len(store.episodes) for store in stores), sum(len(find_beginnings(store)) for store in stores)
        raise DataError(
            f"{', '.join(paths)}: expected successful attempts at skills, found none in {episodes} episodes, {unlabelled} of them play "
            "without a skill label. Play is enough for a world model and for starts to learn on; to judge on, attempts at the skill are "
            "needed: record with the skill's name (diwa record --skill NAME), mark each attempt as success or failure and import those "
            "bags too, or add a store that has demonstrations."
        )
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)
    return found


def _all_pieces(stores: list[PlayStore]) -> Iterator[tuple[PlayStore, int, int, int]]:
    for store in stores:
        for number, first, end in (*find_attempts(store), *find_beginnings(store)):
            yield store, number, first, end


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stores", nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--most", type=int, default=100, help="attempts kept of each skill")
    arguments = parser.parse_args()
    try:
        print(gather_attempts(arguments.stores, arguments.out, arguments.most))
    except DiwaError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
