"""OpenAI's CLIP rebuilt from scratch in plain PyTorch: the same names, the same numbers, readable source.

>>> import clip
>>> model, preprocess = clip.load("ViT-B/32")  # doctest: +SKIP
>>> tokens = clip.tokenize(["a diagram", "a dog", "a cat"])
"""

from .checkpoints import CheckpointError
from .checkpoints.released import DownloadError
from .clip import available_models, count_tokens, load, save, tokenize
from .dual_encoder import DualEncoder
from .optimize import optimize
from .preprocess import ImageError
from .tasks.scores import classify, multilabel, similarity
from .tasks.zero_shot import ZeroShotClassifier

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DownloadError",
    "DualEncoder",
    "ImageError",
    "ZeroShotClassifier",
    "available_models",
    "classify",
    "count_tokens",
    "load",
    "multilabel",
    "optimize",
    "save",
    "similarity",
    "tokenize",
]
