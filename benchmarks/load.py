"""How long does `clip.load` take, and how much memory at its peak? Each run is a fresh process. Linux only.

The file has the layout of OpenAI's, but no code in it, which the original would have to compile.
"""

import os
import subprocess
import time

from .contest import Contest
from .peers import ROOT
from .process import interpreter, peak_of

PROGRAM = """
{before}
import clip, time
start = time.perf_counter()
clip.load({path!r}, device="cpu")
print(time.perf_counter() - start, open("/proc/self/status").read())
"""
BEFORE = {"ours": "", "original": "from benchmarks.peers import prepare_original; prepare_original()"}


def run(contest: Contest) -> None:
    path = contest.checkpoint("ViT-B/32")
    figures = {name: [] for name in contest.start(BEFORE)}
    for turn in range(1 + contest.rounds):
        for name in figures:
            figure = load_once(name, path, contest.threads)
            if turn:  # the first warms the disk's cache
                figures[name].append(figure)
    for i, (case, unit) in enumerate({"call": "s", "whole process": "s", "peak memory": "MiB"}.items()):
        contest.record(f"ViT-B/32, {case}", unit, {name: [row[i] for row in rows] for name, rows in figures.items()})


def load_once(name: str, path: str, threads: int) -> tuple[float, float, float]:
    """Seconds of the call, seconds of the whole process, and MiB at the peak."""
    program = PROGRAM.format(before=BEFORE[name], path=path)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    done = subprocess.run(
        [interpreter(), "-W", "ignore", "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    whole = time.perf_counter() - start
    call, status = done.stdout.split(maxsplit=1)
    return float(call), whole, peak_of(status)
