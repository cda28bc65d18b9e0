"""Entrants that take turns at the same task, and the figures that come of it."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from clip.config import RELEASED, CLIPConfig

from . import inputs
from .peak import SHAPES, WAYS
from .process import Peer, PeerError

ROUNDS = 5
SECONDS_A_TURN = 0.3  # at least, by repeating what is shorter
PAUSE = 0.02  # before a turn: threads of the one before stop looking out for work
MACHINE = "the machine"  # the entrant that does nothing but multiply, as fast as is possible here


class Contest:
    """The measurements of one question, kept in a file that is written anew after each.

    Parameters
    ----------
    question : str
        The name of its module.
    folder : path
        For `QUESTION.json`.
    work : path
        For checkpoints, pictures and messages, shared by all questions of a run.
    threads : int
        Of every entrant.
    quick : bool
        One round with small inputs, to see that everything works.
    """

    def __init__(self, question: str, folder: Path, work: Path, threads: int, quick: bool):
        self.path, self.work, self.threads, self.quick = folder / f"{question}.json", work, threads, quick
        self.rounds = 1 if quick else ROUNDS
        self.peers: dict[str, Peer] = {}
        self.results = {
            "question": question,
            "quick": quick,
            "machine": machine() | {"threads": threads},
            "versions": {},
            "left out": {},
            "peak": {},
            "cases": {},
        }

    def __enter__(self) -> "Contest":
        return self

    def __exit__(self, *error: object) -> None:
        for peer in self.peers.values():
            peer.close()

    def size(self, full: int, quick: int) -> int:
        """How much of something is to be measured with."""
        return quick if self.quick else full

    def config(self, name: str) -> CLIPConfig:
        """The sizes of a released model; of one far smaller, if it has to be quick."""
        if not self.quick:
            return RELEASED[name]
        vision = {"vision_layers": 2, "vision_width": 64} if RELEASED[name].is_vit else {"vision_layers": (1,) * 4}
        return replace(RELEASED[name], **vision, transformer_width=64, transformer_heads=1, transformer_layers=2)

    def checkpoint(self, name: str) -> str:
        """The path of a file with made-up weights in these sizes, written when first asked for."""
        path = self.work / f"{name.replace('/', '-')}.pt"
        if not path.exists():
            inputs.checkpoint(vars(self.config(name)), path)
        return str(path)

    def race(
        self,
        case: str,
        task: str,
        entrants: dict[str, dict[str, str | int | list]],
        distance: Callable[[np.ndarray, np.ndarray], float],
        tolerance: float,
        operations: tuple[str, int] | None = None,
        part: dict[str, float] | None = None,
        memory: bool = False,
    ) -> None:
        """Measure a task: all agree first, then they take turns.

        Parameters
        ----------
        case : str
            What the figures are of.
        task : str
            A function of the peers' modules.
        entrants : dict
            Arguments of the task by entrant: the name of a peer, and maybe more words to tell it from others. The
            first is the one that others must agree with.
        distance, tolerance
            Of two answers, and how large it may be.
        operations : tuple of str and int, optional
            The dtype and the number of the floating point operations that are needed, for :data:`MACHINE`.
        part : dict, optional
            The share of the task that an entrant does, where the whole would take too long; its time is scaled up.
        memory : bool
            Also measure the peak, on Linux.

        Raises
        ------
        ValueError
            If answers differ.
        """
        ready = self._prepare(task, entrants)
        answers = {name: peer.answer() for name, peer in ready.items()}
        first, *others = answers
        for name in others:
            found = distance(answers[first], answers[name])
            if not found <= tolerance:
                raise ValueError(f"{case}: {first} and {name} differ by {found:.3g}, more than {tolerance:g}")

        turns = {name: max(1, min(50, round(SECONDS_A_TURN / peer.run(1)[0]))) for name, peer in ready.items()}
        seconds = {name: [] for name in ready}
        for _ in range(self.rounds):
            for name, peer in ready.items():
                time.sleep(PAUSE)
                seconds[name].append(statistics.median(peer.run(turns[name])) / (part or {}).get(name, 1))
        if operations:
            dtype, count = operations
            seconds[MACHINE] = [count / max(self._peak(dtype).values())]
        self.record(case, "s", seconds)
        if memory and sys.platform == "linux":
            self.record(f"{case}, peak memory", "MiB", {name: [peer.peak()] for name, peer in ready.items()})

    def record(self, case: str, unit: str, figures: dict[str, list[float]]) -> None:
        """Keep a case's figures, in seconds ("s") or "MiB"."""
        self.results["cases"][case] = {"unit": unit, "figures": figures}
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")
        for name, values in figures.items():
            print(f"  {case:52} {name:26} {statistics.median(values):10.4g} {unit}", flush=True)

    def _prepare(self, task: str, entrants: dict[str, dict]) -> dict[str, Peer]:
        """The processes of those that can take part, ready for the task."""
        ready = self.start(entrants)
        for name, peer in list(ready.items()):
            try:
                peer.prepare(task, **entrants[name])
            except PeerError as error:
                self._leave_out(name, error)
                del ready[name], self.peers[name]
        return ready

    def start(self, entrants: Iterable[str]) -> dict[str, Peer]:
        """The processes of those that are installed; they stay until the question is answered."""
        for name in entrants:
            if name not in self.peers and name not in self.results["left out"]:
                package = name.split()[0]
                try:
                    self.peers[name] = Peer(package, self.threads, self.work)
                    self.results["versions"][package] = self.peers[name].version
                except PeerError as error:
                    self._leave_out(name, error)
        return {name: self.peers[name] for name in entrants if name in self.peers}

    def _leave_out(self, name: str, error: PeerError) -> None:
        """Note down who cannot take part, and why."""
        self.results["left out"][name] = str(error)
        print(f"  {name} is left out: {error}", flush=True)

    def _peak(self, dtype: str) -> dict[str, float]:
        """The machine's operations a second, by way; measured once a question."""
        if dtype not in self.results["peak"]:
            peer = Peer("ours", self.threads, self.work)
            peer.prepare("peak", dtype=dtype, shapes=[(64, 64, 64)] if self.quick else SHAPES)
            self.results["peak"][dtype] = dict(zip(WAYS, peer.answer().tolist(), strict=True))
            peer.close()
        return self.results["peak"][dtype]


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference between two arrays."""
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")


def angle(ours: np.ndarray, theirs: np.ndarray) -> float:
    """1 - cosine of the two rows that are least alike; of as many rows as both have."""
    count = min(len(ours), len(theirs))
    a, b = (rows[:count] / np.linalg.norm(rows[:count], axis=-1, keepdims=True) for rows in (ours, theirs))
    return float(1 - (a * b).sum(axis=-1).min())


def machine() -> dict[str, str | int]:
    """What it is measured on."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        family = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        processor = "{model name}, family {cpu family}, model {model}".format(**family)
    except (OSError, KeyError):
        pass
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
