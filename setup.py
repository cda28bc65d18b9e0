"""Packaging of `clip`; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "clip/__init__.py").read_text(encoding="utf-8"), re.M).group(1)

setup(
    # The name `clip` on PyPI belongs to a project that has nothing to do with OpenAI's CLIP.
    name="clip-from-scratch",
    version=VERSION,
    description="OpenAI's CLIP rebuilt from scratch in plain PyTorch: same names, same numbers, readable source",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["clip", "clip.app", "clip.bpe_vocab", "clip.checkpoints", "clip.tasks", "clip.training"],
    package_dir={"clip": "clip", "clip.bpe_vocab": "bpe_vocab"},  # the vocabulary stands at top level in the source
    package_data={"clip": ["app/templates/*", "weights/*"], "clip.bpe_vocab": ["*.txt.gz", "README.md"]},
    install_requires=["torch>=2.6", "numpy", "ftfy", "regex", "pillow>=11", "tqdm"],
    extras_require={
        "completion": ["shtab>=1.13"],
        "docs": [
            "furo",
            "ipykernel",
            "matplotlib",
            "myst-nb",
            "selenium",
            "sphinx",
            "sphinx-gallery",
            "sphinxcontrib-katex",
        ],
        "evaluate": ["matplotlib", "scikit-learn"],
        "hub": ["huggingface_hub>=0.27"],
        "search": ["faiss-cpu", "matplotlib", "qdrant-client"],
        "towers": ["timm", "transformers"],
        "train": ["matplotlib", "tensorboard"],
        "test": [
            "pytest",
            "emoji",
            "faiss-cpu",
            "huggingface_hub>=0.27",
            "hypothesis",
            "matplotlib",
            "qdrant-client",
            "resvg-py",
            "ruff",
            "safetensors",
            "scikit-image",
            "scikit-learn",
            "setuptools>=77",
            "shtab>=1.13",
            "tensorboard",
            "transformers",
        ],
    },
    entry_points={"console_scripts": ["clip = clip.app.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
