"""Linear probe: how much of a task can be read off the image features by a linear classifier alone?

Source: Radford et al. (2103.00020) §3.2, why linear; Appendix A.3, the protocol, followed here.

    pictures
      │  probe_features         before the projection for ViTs; nothing of the model is trained
    features  (N, D)            not normalised
      │  split                  a fifth of each class for validation, unless the data set has its own
      │  logistic regression    by L-BFGS, at most 1,000 iterations, for one strength λ of regularisation after another
      │                         λ = 10⁻⁶, 10⁻⁴, ..., 10⁶, then ever nearer to the best, down to 1/8 decade
      │  once more              with the best λ, on training and validation pictures together
    LinearProbe                 logits (N, K)

λ multiplies |w|² / 2 where the losses of all pictures are summed up, so it is 1/C in scikit-learn's terms. The 96 steps
between 10⁻⁶ and 10⁶ are 8 a decade, and the C = 0.316 of the release's example is one of them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.func import functional_call
from tqdm import tqdm

from ..model import CLIP, VisionTransformer
from ..optimize import OptimizedCLIP
from ..preprocess import Preprocess
from .encode import Picture, Rows, read_pictures

__all__ = ["LinearProbe", "fit_linear_probe", "probe_features", "require_scikit_learn", "split"]

STEPS_PER_DECADE = 8
DECADES = 6  # on either side of λ = 1
ITERATIONS = 1000


@torch.no_grad()
def probe_features(
    model: CLIP,
    preprocess: Preprocess,
    pictures: Iterable[Picture],
    batch_size: int = 64,
    workers: int = 2,
    progress: bool = False,
) -> Iterator[Rows]:
    """The features that the paper's linear probes stand on.

    Parameters
    ----------
    model : CLIP
        Any model with `visual`, `dtype` and `logit_scale`, but no optimised copy: that has no features before the
        projection.
    preprocess, pictures, batch_size, workers, progress
        As for :func:`clip.tasks.encode.read_pictures`.

    Yields
    ------
    Rows
        `values` (n, D), not normalised. Of a ViT the class token after `ln_post`, before the projection: I_f in Fig. 3.
        Of a ResNet what `encode_image` gives (n, E): the paper makes its exception for ViTs alone, and the projection
        of a ResNet is the output layer of its attention pool. Of a :class:`clip.DualEncoder` the same, before the head
        that it puts behind the tower.

    Raises
    ------
    ValueError
        If it is an optimised copy, or a text tower alone.
    """
    if isinstance(model, OptimizedCLIP) or getattr(model, "visual", None) is None:
        raise ValueError(
            f"a linear probe needs the plain model and its image tower, got {type(model).__name__}: its features are "
            "those before the projection, which an optimised copy does not give"
        )
    for rows in read_pictures(pictures, preprocess, batch_size, workers, progress):
        yield rows.through(partial(_features, model), model.logit_scale.device)


def _features(model: CLIP, images: torch.Tensor) -> torch.Tensor:
    """The tower's features; the ViT's with the identity in the projection's place."""
    visual, images = model.visual, images.type(model.dtype)
    if not isinstance(visual, VisionTransformer) or visual.proj is None:
        return visual(images)
    identity = torch.eye(len(visual.proj), dtype=visual.proj.dtype, device=visual.proj.device)
    return functional_call(visual, {"proj": identity}, images)


def require_scikit_learn() -> None:
    """Raise an ImportError if scikit-learn is not installed: before features are computed rather than after."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise ImportError("a linear probe needs scikit-learn: pip install clip-from-scratch[evaluate]") from error


def split(labels: torch.Tensor, fraction: float = 0.2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep pictures of each class back for validation.

    Parameters
    ----------
    labels : torch.Tensor
        (N,), int64: the class of each picture.
    fraction : float
        Of each class, rounded; but at least one picture stays to learn from.
    seed : int
        Other seeds choose others.

    Returns
    -------
    training, validation : torch.Tensor
        Places in `labels`, int64, rising.

    Raises
    ------
    ValueError
        If no class has enough pictures to keep one back.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        places = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(places), generator=generator)
        kept[places[order[: min(round(fraction * len(places)), len(places) - 1)]]] = True
    if not kept.any():
        raise ValueError(f"expected classes of enough pictures to keep {fraction:.0%} back, got {len(labels)} in all")
    return (~kept).nonzero()[:, 0], kept.nonzero()[:, 0]


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier on image features.

    Attributes
    ----------
    weight : torch.Tensor
        (K, D), float32.
    bias : torch.Tensor
        (K,), float32.
    strength : float
        λ, the best on the validation pictures.
    validation_accuracy : dict of float to float
        For each λ that was tried, rising: the share of the validation pictures that was recognised, in [0, 1].
    """

    weight: torch.Tensor
    bias: torch.Tensor
    strength: float
    validation_accuracy: dict[float, float]

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, D) as logits (N, K); their softmax are probabilities."""
        return features @ self.weight.T + self.bias


def fit_linear_probe(
    features: torch.Tensor,
    labels: torch.Tensor,
    validation_features: torch.Tensor,
    validation_labels: torch.Tensor,
) -> LinearProbe:
    """Fit a linear classifier by the paper's protocol.

    Parameters
    ----------
    features : torch.Tensor
        (N, D), float32, on the CPU: as :func:`probe_features` gives them.
    labels : torch.Tensor
        (N,), int64, each of 0 to K - 1 at least once.
    validation_features, validation_labels : torch.Tensor
        (M, D) and (M,): what λ is chosen by. The final fit is to these, too.

    Returns
    -------
    LinearProbe
        Of the strengths that do equally well, the greatest is chosen.

    Raises
    ------
    ValueError
        If there are not at least two classes, labels are missing, or features are no finite numbers.
    ImportError
        If scikit-learn is not installed.
    """
    require_scikit_learn()
    classes = int(labels.max()) + 1
    if classes < 2 or len(labels.unique()) < classes or labels.min() < 0 or validation_labels.max() >= classes:
        raise ValueError(
            "expected at least two classes, numbered from 0, each with pictures to learn from; got the numbers "
            f"{labels.min()} to {labels.max()} (different ones: {len(labels.unique())}), and up to "
            f"{validation_labels.max()} for validation"
        )
    if not (features.isfinite().all() and validation_features.isfinite().all()):
        raise ValueError("some features are no finite numbers: the model is broken, or overflows in half precision")

    with tqdm(desc="fitting", unit="fit", disable=None) as bar:

        def accuracy(place: int) -> float:
            weight, bias = _fit(features, labels, _strength(place))
            bar.update()
            chosen = (validation_features @ weight.T + bias).argmax(dim=1)
            return (chosen == validation_labels).double().mean().item()

        tried = _search(accuracy)
        best = _peak(tried)
        everything = torch.cat([features, validation_features]), torch.cat([labels, validation_labels])
        weight, bias = _fit(*everything, _strength(best))
        bar.update()
    return LinearProbe(
        weight, bias, _strength(best), {_strength(place): share for place, share in sorted(tried.items())}
    )


def _fit(features: torch.Tensor, labels: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (K, D) and bias (K,) of a logistic regression."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    regression = LogisticRegression(C=1 / strength, max_iter=ITERATIONS)  # its solver is L-BFGS, its penalty L2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol stops there, converged or not
        regression.fit(features.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(regression.coef_).float(), torch.from_numpy(regression.intercept_).float()
    if len(weight) == 1:  # of two classes: the logit of the second, where that of the first is 0
        weight, bias = torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias])
    return weight, bias


def _search(accuracy: Callable[[int], float]) -> dict[int, float]:
    """What was found at the places tried: every second decade, then both sides of the peak in steps halved each time.

    The paper calls it a parametric binary search; it takes at most 15 fits instead of 97.
    """
    end, step = DECADES * STEPS_PER_DECADE, 2 * STEPS_PER_DECADE
    tried = {place: accuracy(place) for place in range(-end, end + 1, step)}
    while step > 1:
        step //= 2
        peak = _peak(tried)
        for place in (peak - step, peak + step):
            if abs(place) <= end:
                tried[place] = accuracy(place)
    return tried


def _peak(tried: dict[int, float]) -> int:
    """The place of the best, of several the one that regularises most."""
    return max(tried, key=lambda place: (tried[place], place))


def _strength(place: int) -> float:
    """λ at a place of the grid, which has 8 a decade: `_strength(-8)` is 0.1."""
    return 10 ** (place / STEPS_PER_DECADE)
