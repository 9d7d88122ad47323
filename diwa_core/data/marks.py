"""What an operator's marks say of the frames of a store.

A mark ends its episode, so it tells of the last frame, and of the rest before it: the operator stops, looks and marks, and nothing happens
in between. When it succeeded before that rest nobody knows, so the frames before it tell nothing.
"""

from __future__ import annotations

import numpy as np

from diwa_core.data.store import FAILURE, SUCCESS, PlayStore
from diwa_core.errors import DataError

IDLE_ACTION = 1e-3  # of full speed: below it the arm was told to stay
DOUBT_S = 1.0  # before the rest that ends with a success: it may have come by then


def is_motion(actions: np.ndarray, gripper: np.ndarray | float) -> np.ndarray:
    """Whether actions [..., 7] tell the arm to move, or the gripper something else than before (`gripper` [...]); bool [...]."""
    return (np.abs(actions[..., :6]).max(-1) > IDLE_ACTION) | (actions[..., 6] != gripper)


def marked_episodes(store: PlayStore) -> list[tuple[int, int, int, int]]:
    """(first frame, exclusive end, skill number, SUCCESS or FAILURE) of every attempt at a skill that an operator judged.

    An attempt is what is labelled with one skill at the end of a marked episode.
    """
    if "skill" not in store.fields:
        return []
    labels, found = store.load(("skill",))["skill"], []
    for (start, end), mark in zip(store.episodes, store.marks, strict=True):
        number = int(labels[end - 1])
        if mark in (SUCCESS, FAILURE) and number >= 0:
            others = np.flatnonzero(labels[start:end] != number)
            found.append((start + int(others[-1]) + 1 if len(others) else start, end, number, mark))
    return found


def marked_frames(store: PlayStore) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """(skill int8 [N], success float32 [N], attempts), as an operator judged them.

    skill: that was attempted, -1 where no mark tells of one. success: 1 from the mark on and in the rest before it, NaN where it may have
    come already, and where no mark tells; otherwise 0. attempts: first frame and exclusive end of each, so ordered that half of the list
    holds half of every skill's successes and failures. Raises DataError when there are none.
    """
    attempts = marked_episodes(store)
    if not attempts:
        marks = sum(mark in (SUCCESS, FAILURE) for mark in store.marks)
        raise DataError(
            f"{store.path}: expected attempts at skills that an operator marked, found {marks} marks, none of them with a skill. Name it "
            "(diwa record --skill NAME) and mark each attempt as success or failure."
        )
    skill, success = np.full(len(store), -1, np.int8), np.full(len(store), np.nan, np.float32)
    arrays = store.load(("actions", "robot_obs"))
    moves = is_motion(arrays["actions"], arrays["robot_obs"][:, 14])
    doubt = round(DOUBT_S * store.contract.rate_hz)
    for start, end, number, mark in attempts:
        skill[start:end], success[start:end] = number, 0.0
        if mark == SUCCESS:
            moving = np.flatnonzero(moves[start : end - 1])  # the last frame's action came after the mark
            rest = start + (int(moving[-1]) + 1 if len(moving) else 0)
            success[max(start, rest - doubt) : rest] = np.nan
            success[rest:end] = 1.0
    kinds = [attempt[2:] for attempt in attempts]
    places = [(kinds[:place].count(kind) + 0.5) / kinds.count(kind) for place, kind in enumerate(kinds)]
    order = sorted(range(len(attempts)), key=places.__getitem__)
    return skill, success, [attempts[place][:2] for place in order]
