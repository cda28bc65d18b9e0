"""How long does it take to read a folder of JPEGs of 1920 x 1080 pixels, to the last bit as the original does?

Our stream of batches reads on two threads by itself. The original is a function of one picture, and its entrant the
loop that calls it; that loop on two threads, and ours on one, are measured as well.
"""

from .contest import Contest, difference
from .inputs import photographs


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
