"""How long does it take to read a folder of JPEGs of 1920 x 1080 pixels, to the last bit as the original does?

Our stream of batches reads on two threads by itself. The original is a function of one picture, and its entrant the
loop that calls it; that loop on two threads, and ours on one, are measured as well. So is ours with `draft`, which is
not exact, and is held to an average error of half a step out of 255.
"""

import numpy as np

from clip.preprocess import CLIP_STD

from .contest import Contest, difference
from .inputs import RESOLUTION, photographs


def run(contest: Contest) -> None:
    folder = contest.work / "photographs"
    photographs(folder, contest.size(32, 3))
    entrants = {"ours": 2, "original": 1, "original on 2 threads": 2, "ours on 1 thread": 1}
    contest.race(
        "1080p JPEGs, 2 threads",
        "preprocess",
        {name: {"folder": str(folder), "threads": threads} for name, threads in entrants.items()},
        difference,
        0,
    )
    entrants = {"ours": {"draft": None}, "ours with draft": {"draft": 2 * RESOLUTION}}
    contest.race(
        "the same, not exact",
        "preprocess",
        {name: {"folder": str(folder), "threads": 2, **how} for name, how in entrants.items()},
        mean_error,
        0.5,
    )


def mean_error(exact: np.ndarray, drafted: np.ndarray) -> float:
    """Of preprocessed pictures (N, 3, R, R), in steps of 255."""
    return float(255 * (np.abs(exact - drafted).mean(axis=(0, 2, 3)) * CLIP_STD).mean())
