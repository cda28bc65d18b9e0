"""How long does `clip.load` take, and how much memory at its peak? Each run is a fresh process. Linux only.

The file is made as OpenAI's are: the original's model, in half precision, traced and saved with its code.
"""

import os
import subprocess
import time

from .contest import Contest
from .peers import ROOT
from .process import interpreter, peak_of

TRACE = """
from benchmarks.peers import prepare_original; prepare_original()
import clip, torch
model, _ = clip.load({plain!r}, device="cpu")
clip.model.convert_weights(model)
image, text = torch.zeros(1, 3, 224, 224), clip.tokenize(["a dog"])
calls = {{"forward": (image, text), "encode_image": image, "encode_text": text}}
torch.jit.trace_module(model, calls, check_trace=False).save({traced!r})
"""
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
    if "original" in figures:
        traced = str(contest.work / "traced.pt")
        run_program(TRACE.format(plain=path, traced=traced), contest.threads)
        path = traced
    for turn in range(1 + contest.rounds):
        for name in figures:
            figure = load_once(name, path, contest.threads)
            if turn:  # the first warms the disk's cache
                figures[name].append(figure)
    for i, (case, unit) in enumerate({"call": "s", "whole process": "s", "peak memory": "MiB"}.items()):
        contest.record(f"ViT-B/32, {case}", unit, {name: [row[i] for row in rows] for name, rows in figures.items()})


def load_once(name: str, path: str, threads: int) -> tuple[float, float, float]:
    """Seconds of the call, seconds of the whole process, and MiB at the peak."""
    start = time.perf_counter()
    answer = run_program(PROGRAM.format(before=BEFORE[name], path=path), threads)
    whole = time.perf_counter() - start
    call, status = answer.split(maxsplit=1)
    return float(call), whole, peak_of(status)


def run_program(program: str, threads: int) -> str:
    """What a program prints, in a process of its own."""
    return subprocess.run(
        [interpreter(), "-W", "ignore", "-c", program],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
