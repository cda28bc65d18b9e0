"""`clip doctor`: what is here, and what is wrong with it."""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.request import getproxies

import torch

from .. import __version__
from ..checkpoints.released import MODELS, cache_folder, sha256_of
from ..clip import load, tokenize
from .command import add_command
from .verify import TOKENS

NAME = "clip-from-scratch"  # of our distribution; the one called `clip` is somebody else's
REQUIRED = {"torch": "2.6", "numpy": "", "ftfy": "", "regex": "", "pillow": "11", "tqdm": ""}
PYTHON = (3, 10)
VARIABLES = ("CLIP_CACHE", "CLIP_BASE_URL", "NO_PROXY", "no_proxy")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
ENOUGH = 2 << 30  # bytes of free disk: the largest released file has 1.3 GB
EPILOG = """\
Everything that is wrong is marked with !! and said what to do about; the exit code is 1 then. The network is not used,
so a proxy is shown but not tried.

examples:
  clip doctor
  clip doctor --quick                      do not read the released files through
  clip doctor --json | jq 'select(.problem)'"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    what: str
    found: str
    problem: str | None = None  # what is wrong and what to do, if something is


def add_doctor_command(commands: argparse._SubParsersAction) -> None:
    """Add `doctor` to the commands of `clip`."""
    parser = add_command(
        commands,
        "doctor",
        help="look at the installation and say what is wrong",
        description="Look at the package, what it stands on, its devices and its cache, and say what is wrong.",
        epilog=EPILOG,
    )
    parser.set_defaults(run=_doctor)
    parser.add_argument("--quick", action="store_true", help="do not compute the sha256 of the released files")


def _doctor(options: argparse.Namespace) -> int:
    problems, topic = 0, None
    for finding in examine(quick=options.quick):
        problems += finding.problem is not None
        if options.json:
            print(json.dumps(asdict(finding)))
            continue
        if finding.topic != topic:
            topic = finding.topic
            print(topic)
        print(f"  {finding.what:18}  {finding.found}")
        if finding.problem:
            print(f"  !! {finding.problem}")
    if not options.json:
        print(f"\n{problems or 'nothing'} {'are' if problems > 1 else 'is'} wrong")
    return 1 if problems else 0


def examine(quick: bool = False) -> Iterator[Finding]:
    """Look at everything.

    Parameters
    ----------
    quick : bool
        Do not read the released files through: say only whether they are there and have an end.

    Yields
    ------
    Finding
        Topic by topic.
    """
    yield from _package()
    yield from _versions()
    yield from _devices()
    yield from _weights(quick)
    yield from _network()
    yield from _extras()


# -- the package ------------------------------------------------------------------------------------------------------


def _package() -> Iterator[Finding]:
    """Which `clip` this is, and which others there are."""
    ours = Path(__file__).resolve().parent.parent
    yield Finding("package", "clip", f"{__version__} from {ours}")
    yield _command()
    for other in _other_packages(ours):
        problem = "a program that finds it first gets it instead of this one: rename it, or start from another folder"
        yield Finding("package", "another clip", str(other), problem)
    for name in sorted(set(importlib.metadata.packages_distributions().get("clip", ())) - {NAME}):
        problem = (
            "it has a package `clip` too, and what was installed last has written over the other: "
            f"pip uninstall {name}, then pip install --force-reinstall --no-deps {NAME}"
        )
        yield Finding("package", "another clip", f"{name} {_version(name)}, installed", problem)
    for text, expected in TOKENS.items():
        got = tokenize(text)[0, : len(expected)].tolist()
        if got != expected:
            yield Finding("package", "tokens", f"{text!r} gives {got}", "the vocabulary is damaged: install clip again")


def _command() -> Finding:
    """What the shell runs for `clip`; Windows has a program of that name."""
    command = shutil.which("clip")
    if command is None:
        return Finding("package", "command", "`clip` is not on the PATH; `python -m clip` does the same")
    ours = {sysconfig.get_path("scripts"), sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))}
    other = Path(command).resolve().parent not in {Path(folder).resolve() for folder in ours}
    problem = "the shell's `clip` does not belong to this Python: use `python -m clip`, or activate the environment"
    return Finding("package", "command", command, problem if other else None)


def _other_packages(ours: Path) -> Iterator[Path]:
    """Packages and modules called `clip`, not ours, where Python looks for them."""
    seen = {ours}
    for folder in map(Path, ["", *sys.path]):
        for candidate in (folder / "clip" / "__init__.py", folder / "clip.py"):
            place = candidate.parent.resolve() if candidate.name == "__init__.py" else candidate.resolve()
            if os.path.isfile(candidate) and place not in seen and ours not in place.parents:
                seen.add(place)
                yield place


def _versions() -> Iterator[Finding]:
    """Python, and what the core stands on."""
    old = sys.version_info < PYTHON
    needed = "needs Python {}.{} or later".format(*PYTHON) if old else None
    yield Finding("versions", "python", f"{platform.python_version()}, {platform.platform()}", needed)
    for name, least in REQUIRED.items():
        version = _version(name)
        if version is None:
            yield Finding("versions", name, "not installed as a package", f"pip install {name}")
        else:
            older = f"{least} or later is needed: pip install -U {name}"
            yield Finding("versions", name, version, older if _numbers(version) < _numbers(least) else None)


def _version(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """`_numbers("2.13.0+cpu")` is (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


# -- devices ----------------------------------------------------------------------------------------------------------


def _devices() -> Iterator[Finding]:
    """Where a model can run, each tried with the model that comes along."""
    names = {"cpu": f"{_cores()} cores to use of {os.cpu_count()}, {torch.get_num_threads()} threads in PyTorch"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        names[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        names["mps"] = "Apple GPU"
    for device, name in names.items():
        error = _try_out(device)
        yield Finding("devices", device, name, error)
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        problem = "this PyTorch cannot use the NVIDIA driver that is here: see nvidia-smi, and pytorch.org for a build"
        yield Finding("devices", "cuda", f"not available; PyTorch is {built}", problem)


def _cores() -> int:
    """The processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@torch.no_grad()
def _try_out(device: str) -> str | None:
    """What goes wrong when the embedded model runs there, if something does."""
    try:
        model, _ = load("tiny", device)
        image = torch.zeros(1, 3, *[model.visual.input_resolution] * 2, device=device)
        logits, _ = model(image, tokenize("a cat").to(device))
        if not math.isfinite(logits.item()):
            return f"the model `tiny` computes {logits.item()} here"
    except Exception as error:  # whatever it is, it is what was looked for
        return f"the model `tiny` does not run here: {type(error).__name__}: {error}"
    return None


# -- weights ----------------------------------------------------------------------------------------------------------


def _weights(quick: bool) -> Iterator[Finding]:
    """The cache, and the released files in it."""
    folder = cache_folder()
    # os.path.exists is False, where Path.exists may raise, for what lies in a folder that may not be looked into.
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    problem = None
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "nothing can be stored there: mend its permissions, or name another folder by CLIP_CACHE"
    missing = "" if os.path.exists(folder) else ", not there yet"
    yield Finding("weights", "cache", f"{folder}{missing}", problem)
    free = shutil.disk_usage(there).free
    little = "too little for the largest released file: name another folder by CLIP_CACHE" if free < ENOUGH else None
    yield Finding("weights", "free disk", _size(free), little)
    absent = []
    for name, url in MODELS.items():
        *_, digest, file = url.split("/")
        findings = list(_released(name, digest, folder / file, quick))
        absent += [] if findings else [name]
        yield from findings
    if absent:
        yield Finding("weights", "not here", f"{', '.join(absent)}; clip.load fetches what it is asked for")


def _released(name: str, digest: str, file: Path, quick: bool) -> Iterator[Finding]:
    """One of the nine files, if it is there or was on its way."""
    part = file.with_name(f"{file.name}.part")
    if os.path.exists(part):
        yield Finding("weights", name, f"{_size(part.stat().st_size)} of a download; clip.load goes on with it")
    if not os.path.exists(file):
        return
    try:
        with file.open("rb") as opened:
            sound = zipfile.is_zipfile(opened) if quick else sha256_of(file).hexdigest() == digest
        found = "not hashed" if quick else "sha256 as released" if sound else "another sha256 than released"
        problem = f"{file} was cut short or is another file: delete it, and clip.load fetches it again"
        yield Finding("weights", name, f"{_size(file.stat().st_size)}, {found}", None if sound else problem)
    except OSError as error:
        yield Finding("weights", name, str(file), f"cannot be read: {error}")


def _size(count: int) -> str:
    """`_size(353976522)` is "338 MiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


# -- the way to the network -------------------------------------------------------------------------------------------


def _network() -> Iterator[Finding]:
    """What downloads would go through, passwords left out."""
    for scheme, proxy in sorted(getproxies().items()):
        if scheme in ("http", "https", "all"):
            yield Finding("network", f"{scheme} proxy", _without_password(proxy))
    for variable in VARIABLES:
        if value := os.environ.get(variable):
            yield Finding("network", variable, _without_password(value))
    for variable in CERTIFICATES:
        if value := os.environ.get(variable):
            gone = None if os.path.exists(value) else "there is no such file or folder: downloads will fail; unset it"
            yield Finding("network", variable, value, gone)


def _without_password(address: str) -> str:
    """`_without_password("http://me:secret@proxy:3128")` is "http://***@proxy:3128"."""
    return re.sub(r"(?<=//)[^/@]*@", "***@", address)


# -- extras -----------------------------------------------------------------------------------------------------------


def _extras() -> Iterator[Finding]:
    """Which optional packages are here, and how to get the others."""
    try:
        distribution = importlib.metadata.distribution(NAME)
    except importlib.metadata.PackageNotFoundError:
        yield Finding("extras", "unknown", "the package is used without being installed; pip install -e . tells them")
        return
    members: dict[str, list[str]] = {extra: [] for extra in distribution.metadata.get_all("Provides-Extra") or []}
    for requirement in distribution.requires or []:
        found = re.fullmatch(r"""([\w.-]+).*;.*extra == ["']([\w-]+)["'].*""", requirement)
        if found:
            members[found[2]].append(found[1])
    for extra, names in members.items():
        absent = [name for name in names if _version(name) is None]
        how = f"without {', '.join(absent)}: pip install {NAME}[{extra}]" if absent else "all there"
        yield Finding("extras", f"[{extra}]", how)
