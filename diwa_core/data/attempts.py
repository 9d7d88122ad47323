"""Successful attempts at skills, cut out of recorded stores into one store of demonstrations: starts, and examples to clone.

`python -m diwa_core.data.attempts STORE... --out data/demos`. An attempt is a run of frames that are labelled with one skill. Where a
store holds the simulated scene the skill's oracle says whether and when it succeeded. Without it the label itself does: the import of a bag
labels an episode of a real robot only if the operator marked it as a success.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diwa_core.data.store import PlayStore
from diwa_core.errors import DataError, DiwaError
from diwa_core.sim.skills import SKILLS, skill_progress

SHORTEST_FRAMES = 9  # twice a warm-up, and something to do
LONGEST_FRAMES = 200


def find_attempts(store: PlayStore) -> list[tuple[int, int, int]]:
    """(skill number, first frame, exclusive end) of every successful attempt, in order of time; [] without labels."""
    if "skill" not in store.fields:
        return []
    labels = store.load(("skill",))["skill"]
    scenes = store.load(("scene_obs",))["scene_obs"] if "scene_obs" in store.fields else None
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


def frames_to_success(skill: str, scenes: np.ndarray, length: int) -> int | None:
    """Frames up to the first on which an attempt that began with the first of `scenes` [T, 24] has succeeded, that one included, or None.

    length: frames of the attempt; its last action ends on the frame behind it.
    """
    done = np.flatnonzero(skill_progress(skill, scenes[0], scenes[: length + 1]) > 1)
    return int(done[0]) + 1 if len(done) else None


def gather_attempts(paths: list[str], out: str, most: int = 100) -> dict[str, int]:
    """Write the first `most` successful attempts at each skill, those of earlier stores first; returns how many there are by skill.

    Whole or not at all: an older `out` is replaced. Raises DataError when the stores are of different contracts or hold none.
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
    counts = dict.fromkeys(SKILLS, 0)
    for store, number, first, end in _all_attempts(stores):
        skill = SKILLS[number]
        if counts[skill] < most:
            counts[skill] += 1
            episode = {name: store.read(name, first, end) for name in fields}
            gathered.append_episode({**episode, "skill": np.full(end - first, number, np.int8)})
    if not any(counts.values()):
        shutil.rmtree(temporary)
        raise DataError(f"{', '.join(paths)}: expected successful attempts at skills, found none. Record some and mark them as successes.")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)
    return {skill: count for skill, count in counts.items() if count}


def _all_attempts(stores: list[PlayStore]) -> Iterator[tuple[PlayStore, int, int, int]]:
    for store in stores:
        for number, first, end in find_attempts(store):
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
