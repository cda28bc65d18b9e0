"""Peers as processes: a parent asks, a child answers, one JSON object a line.

    {"prepare": "encode_image", "arguments": {"batch": 8, ...}}    the task to do from now on; the one before is dropped
    {"run": 5}                                                     {"seconds": [0.31, 0.29, 0.29, 0.30, 0.29]}
    {"answer": "features.npy"}                                     what the task's function returns, as a file
    {"peak": true}                                                 {"mib": 812.5}, since the task was prepared

Each holds its own packages and its own memory, and waits while another works. So two packages of one name can be
compared, the memory of each can be told, and runs can take turns.
"""

import gc
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from .peers import PYTHON, ROOT

Run = Callable[[], torch.Tensor | np.ndarray]
Task = Callable[..., Run]


class PeerError(RuntimeError):
    """A peer that could not be started, or not do what it was asked for."""


class Peer:
    """The parent's end of a process that holds one implementation.

    Parameters
    ----------
    name : str
        A module of `benchmarks.peers`. All but ours need the environment of `benchmarks.setup`.
    threads : int
        For whatever in it has a number of threads.
    folder : path
        For its answers.

    Raises
    ------
    PeerError
        If it cannot be started.
    """

    def __init__(self, name: str, threads: int, folder: Path):
        if not PYTHON.exists() and name != "ours":
            raise PeerError("not installed: python -m benchmarks.setup")
        self.name, self.folder = name, folder
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
        environment = os.environ | counts | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [interpreter(), "-W", "ignore", "-m", f"benchmarks.peers.{name}"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
        )
        self.version: str = self._reply()["version"]

    def prepare(self, task: str, **arguments: str | int | list) -> None:
        """Let it make ready for a task, and forget the one before."""
        self._ask(prepare=task, arguments=arguments)

    def run(self, times: int) -> list[float]:
        """The seconds of each of some runs in a row."""
        return self._ask(run=times)["seconds"]

    def answer(self) -> np.ndarray:
        """What the task comes to."""
        path = self.folder / f"{self.name}.npy"
        self._ask(answer=str(path))
        return np.load(path)

    def peak(self) -> float:
        """The most MiB it had in memory since the task was prepared. Linux only."""
        return self._ask(peak=True)["mib"]

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._messages.close()

    def _ask(self, **request: str | int | dict | bool) -> dict:
        """One request and its reply."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict:
        """What the child says next, or a PeerError with its last words."""
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._messages.seek(0)
        last = self._messages.read().strip().splitlines()[-1:]
        raise PeerError(f"{self.name} ended: {''.join(last) or 'without a word'}")


def interpreter() -> str:
    """The Python of the peers' environment, or this one as long as there is none."""
    return str(PYTHON) if PYTHON.exists() else sys.executable


def serve(package: str, tasks: list[Task]) -> None:
    """The child's end: answer until the parent closes the line.

    Parameters
    ----------
    package : str
        Whose version the measurement is of.
    tasks : list of callable
        What it can do, by name.
    """
    replies = os.fdopen(os.dup(1), "w")  # what packages print goes elsewhere
    os.dup2(2, 1)
    known, run = {task.__name__: task for task in tasks}, None

    def say(**reply: str | float | list) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    say(version=f"{package} {importlib.metadata.version(package)}")
    for line in sys.stdin:
        match json.loads(line):
            case {"prepare": task, "arguments": arguments}:
                run = None
                gc.collect()
                run = known[task](**arguments)
                _reset_peak()
                say()
            case {"run": times}:
                say(seconds=[seconds_of(run) for _ in range(times)])
            case {"answer": path}:
                np.save(path, _as_array(run()))
                say()
            case {"peak": True}:
                say(mib=peak_of(Path("/proc/self/status").read_text()))


def _as_array(answer: torch.Tensor | np.ndarray) -> np.ndarray:
    """A tensor of any dtype as numpy knows it."""
    if isinstance(answer, np.ndarray):
        return answer
    return (answer.double() if answer.is_floating_point() else answer.long()).numpy()


def seconds_of(run: Run) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _reset_peak() -> None:
    """Let the system count the peak of memory from here on, if it is Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_of(status: str) -> float:
    """The peak of memory in MiB, mapped files included, by what Linux says of a process."""
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
