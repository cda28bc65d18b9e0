"""From options to a trained model: put together what a run needs, then let the trainer go.

TrainingOptions
  │  model            from scratch, from OpenAI's weights, or from a checkpoint
  │  pairs            read from caption files, drawn, or both mixed; some kept for validation
  │  evaluations      of what there is to evaluate
Trainer.run()
"""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import torch

from ..clip import find_device, load, preprocess_of
from ..config import RELEASED, TINY, CLIPConfig
from ..model import CLIP
from ..preprocess import Preprocess
from .augment import AUGMENTS
from .data import Batches, Captioned, CaptionedPictures, Mixed, PairDataset, read_captions, split
from .drawn import DrawnWorld
from .evaluation import Evaluation, classification, drawn_abilities, retrieval
from .log import draw_curves
from .loss import LOSSES
from .options import TrainingOptions
from .trainer import Trainer

__all__ = ["DRAWN", "MODELS", "prepare", "train"]

DRAWN = "drawn"  # in place of a caption file: pictures drawn on the spot
SCENES_AN_EPOCH = 50_000
FEWEST_KEPT, MOST_KEPT = 5, 5000  # pictures for validation; of more, some are looked at
MODELS = {**RELEASED, "tiny": TINY}


def train(options: TrainingOptions, resume: bool = False) -> Trainer:
    """Train as told, and leave checkpoints, log and curves in the folder `options.out`.

    Parameters
    ----------
    options : TrainingOptions
        What to learn from, and how.
    resume : bool
        Go on from the folder's last checkpoint. Otherwise the folder must not hold a run.

    Returns
    -------
    Trainer
        With the model as it is at the end.

    Raises
    ------
    ValueError, RuntimeError, OSError
        If something needed is not there, does not fit together, cannot be written, or is no number any more.
    """
    folder = Path(options.out)
    if not resume and (folder / "last.pt").exists():
        raise ValueError(f"{folder} already holds a run; resume it, or choose another folder with --out")
    # A resumed run needs nothing but its folder: what it once started from may be gone.
    trainer = prepare(dataclasses.replace(options, init=str(folder / "last.pt")) if resume else options)
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        trainer.resume()
    else:
        trainer.log.cut(0)  # of a run that ended before there was anything to go on from
        options.save(folder)
    try:
        trainer.run()
    finally:  # also of a run that was stopped: then one wants to see them most
        _draw_curves(folder)
    return trainer


def _draw_curves(folder: Path) -> None:
    """The log as a picture beside it; that it cannot be drawn is no reason to lose the run, or what stopped it."""
    log = folder / "log.jsonl"
    if not log.exists():  # nothing was begun
        return
    try:
        draw_curves(log, folder / "curves.png")
    except (ImportError, OSError) as error:
        warnings.warn(str(error), stacklevel=3)


def prepare(options: TrainingOptions) -> Trainer:
    """Put together the model, the pairs and the evaluations of a run, without training or writing anything."""
    model, preprocess = _model(options)
    parts, kept = _parts(options, model.visual.input_resolution)
    pairs = parts[0] if len(parts) == 1 else Mixed(parts, options.shares or [len(part) for part in parts])
    batches = Batches(
        pairs,
        options.batch_size,
        preprocess,
        options.seed,
        options.workers,
        model.context_length,
        tokenizer=getattr(model, "tokenizer", None),
    )
    if len(batches) == 0:
        raise ValueError(f"there are {len(pairs)} pictures to learn from, fewer than one batch of {options.batch_size}")

    evaluations: list[Evaluation] = []
    if 0 < len(kept) < FEWEST_KEPT:
        raise ValueError(
            f"validation {options.validation} keeps only {len(kept)} pictures, too few to judge by; give a larger "
            "share, or 0 to do without"
        )
    if kept:
        kept = kept[:: math.ceil(len(kept) / MOST_KEPT)]
        evaluations.append(retrieval(kept, preprocess, LOSSES[options.loss], options.batch_size))
    if options.zero_shot:
        items = read_captions(options.zero_shot, templates=options.templates)
        evaluations.append(classification(items, preprocess, options.templates))
    if DRAWN in options.captions:
        evaluations.append(drawn_abilities(preprocess))

    def evaluate(model: CLIP) -> dict[str, float]:
        return {name: value for evaluation in evaluations for name, value in evaluation(model).items()}

    return Trainer(model, batches, options, evaluate if evaluations else None)


def _model(options: TrainingOptions) -> tuple[CLIP, Preprocess]:
    """The model to train, float32 on its device, and the preprocessing that goes with it."""
    if options.init == "openai" and options.model not in RELEASED:
        raise ValueError(f"openai released {', '.join(RELEASED)}; got {options.model!r}")
    if options.init != "scratch":
        name = options.model if options.init == "openai" else options.init
        return load(name, options.device, dtype=torch.float32)
    sizes = _sizes(options.model)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.default_generator.manual_seed(options.seed)
        model = CLIP(**vars(sizes))
    return model.to(find_device(options.device)), preprocess_of(model)


def _sizes(model: str) -> CLIPConfig:
    """The sizes of that name, or written in that file."""
    if model in MODELS:
        return MODELS[model]
    if not model.endswith(".json"):
        raise ValueError(f"model must be one of {', '.join(MODELS)}, or a .json file with sizes; got {model!r}")
    try:
        return CLIPConfig(**json.loads(Path(model).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{model}: expected a JSON object with the fields of CLIPConfig ({error})") from error


def _parts(options: TrainingOptions, resolution: int) -> tuple[list[PairDataset], list[Captioned]]:
    """The sources to learn from, one for each entry of `captions`, and the pictures kept for validation."""
    parts: list[PairDataset] = []
    kept: list[Captioned] = []
    augment = None if options.augment == "none" else AUGMENTS[options.augment](resolution)
    listed = Path(options.holdout).read_text(encoding="utf-8").splitlines() if options.holdout else []
    held = {line.strip() for line in listed} - {""}
    unseen = set(held)
    for source in options.captions:
        if source == DRAWN:
            parts.append(DrawnWorld(SCENES_AN_EPOCH, resolution, options.twins))
            continue
        items = read_captions(source, options.images, options.templates)
        unseen -= {item.identity for item in items}
        items = [item for item in items if item.identity not in held]
        learn, validate = split(items, options.validation, options.seed)
        if not learn:
            raise ValueError(f"{source}: nothing is left to learn from after validation and holdout")
        parts.append(CaptionedPictures(learn, augment))
        kept += validate
    if unseen:  # held out by another name, they would be learned from
        raise ValueError(
            f"{options.holdout}: {len(unseen)} of {len(held)} ids belong to no picture, such as {min(unseen)!r}; "
            "expected one id a line, as in the captions' column id"
        )
    return parts, kept
