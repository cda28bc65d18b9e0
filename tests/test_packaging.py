"""The package finds its vocabulary, and runs, however it came onto the machine."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import clip

ROOT = Path(__file__).resolve().parent.parent
PROBE = (
    "import clip, clip.simple_tokenizer as t, pathlib;"
    "print(pathlib.Path(clip.__file__).parent); print(t.default_bpe()); print(clip.tokenize('a diagram')[0, 2].item())"
)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the source, so that building leaves nothing behind."""
    copy = tmp_path / "checkout"
    for name in ("clip", "bpe_vocab"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def run(*command, path=None):
    """Run away from the checkout, with `path` in front of what is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=os.sep, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def build_wheel(checkout, folder):
    flags = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", str(checkout), *flags, "--wheel-dir", str(folder))
    [wheel] = folder.glob("*.whl")
    return wheel


def test_from_a_bare_checkout(checkout):
    package, vocabulary, token = run(sys.executable, "-c", PROBE, path=checkout)
    assert package == str(checkout / "clip")
    assert Path(vocabulary).parent == checkout / "bpe_vocab"
    assert token == "22697"


def test_installed_as_a_wheel(checkout, tmp_path):
    wheel = build_wheel(checkout, tmp_path)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert not [name for name in names if name.startswith(("tests/", "bpe_vocab/", "examples/"))]
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "clip").rglob("*.py")} <= set(names)
    assert run(sys.executable, "-c", "import clip; print(clip.load('tiny')[1].transforms[0].size)", path=site) == ["64"]
    package, vocabulary, token = run(sys.executable, "-c", PROBE, path=site)
    assert package == str(site / "clip")
    assert Path(vocabulary).parent == site / "clip" / "bpe_vocab"
    assert token == "22697"


def test_the_wheel_names_what_it_is_needs_and_runs(checkout, tmp_path):
    wheel = build_wheel(checkout, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        [folder] = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{folder}/METADATA").decode()
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    assert f"\nName: clip-from-scratch\nVersion: {clip.__version__}\n" in metadata
    core = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M))
    assert core == {"torch", "numpy", "ftfy", "regex", "pillow", "tqdm"}
    assert "clip = clip.app.cli:main" in entry_points


def test_installed_editable(checkout, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    [site] = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # torch and the like, as installed here
    flags = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    run(*pip, "install", *flags, "--editable", str(checkout))
    package, vocabulary, token = run(str(python), "-c", PROBE)
    assert package == str(checkout / "clip")
    assert Path(vocabulary).parent == checkout / "bpe_vocab"
    assert token == "22697"
    assert run(str(environment / "bin" / "clip"), "--version") == [f"clip-from-scratch {clip.__version__}"]


def test_importing_needs_the_core_dependencies_only():
    extras = [
        "transformers",
        "huggingface_hub",
        "skimage",
        "safetensors",
        "torchvision",
        "pkg_resources",
        "matplotlib",
        "hypothesis",
    ]
    code = f"import sys, clip, clip.app.cli; print(sorted(set({extras}) & set(sys.modules)))"
    assert run(sys.executable, "-c", code, path=ROOT) == ["[]"]


def test_importing_draws_no_random_numbers_and_touches_no_gpu():
    code = (
        "import torch, random; before = torch.random.get_rng_state(), random.getstate(); import clip;"
        "print(torch.equal(before[0], torch.random.get_rng_state()), before[1] == random.getstate(),"
        "torch.cuda.is_initialized())"
    )
    assert run(sys.executable, "-c", code, path=ROOT) == ["True True False"]
