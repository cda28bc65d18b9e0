"""The implementations to be compared, ours among them: each a process that holds one, and runs it when asked.

A module here is a table of tasks. A task takes what there is to do, and returns a function without arguments, which is
what the time is taken of; its result is compared with the other peers' before. Nothing is imported that a task of
another peer needs.
"""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = ROOT / "benchmarks" / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
ORIGINAL = ENVIRONMENT / "original"


def prepare_torchvision() -> None:
    """Let torchvision's wheel, made for a torch with CUDA, be imported beside one without."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("_meta_registrations"))


def prepare_original() -> None:
    """Let `import clip` find the original.

    What it takes from pkg_resources, which is slow to import and no longer in setuptools, is given to it.
    """
    import packaging.version

    prepare_torchvision()
    sys.path.insert(0, str(ORIGINAL))
    resources = types.ModuleType("pkg_resources")
    resources.packaging = packaging
    sys.modules["pkg_resources"] = resources
