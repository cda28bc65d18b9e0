"""Everything that a training run can be told, in one frozen row, which is also the command line of `clip train`."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoints.files import replacing
from .loss import LOSSES, MAX_SCALE

__all__ = ["TrainingOptions"]

FILE = "options.json"  # in the folder of a run


def _option(default: object, help: str, choices: tuple[str, ...] | None = None) -> object:
    """A field with what the command line says of it."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainingOptions:
    """The options of a run. They are saved beside its checkpoints, and a resumed run reads them there.

    Raises
    ------
    ValueError
        If options contradict each other or are out of range.
    """

    captions: tuple[str, ...] = _option((), "caption files, folders of classes, shards, or the word drawn")
    out: str = _option("runs/first", "folder for checkpoints, log and curves")
    # data
    images: str | None = _option(None, "folder that picture paths are relative to (default: where the captions are)")
    templates: tuple[str, ...] = _option(("a photo of a {}.",), "sentences for the names of a folder of classes")
    shares: tuple[float, ...] = _option((), "how much of each batch comes from each of CAPTIONS (default: by size)")
    validation: float = _option(0.05, "share of the pictures that is kept for validation")
    holdout: str | None = _option(None, "text file of picture ids to keep out of training and validation, one a line")
    zero_shot: str | None = _option(None, "folder of classes to classify at each evaluation")
    augment: str = _option("crop", "how pictures are varied", ("none", "crop", "strong", "artwork"))
    twins: bool = _option(False, "of each drawn scene, also its swapped twins: hard negatives")
    seed: int = _option(0, "of the weights, the order, and everything drawn")
    workers: int = _option(0, "processes that read pictures")
    # model
    model: str = _option(
        "ViT-B/32", "sizes to train: a released name, tiny, or a JSON file with the fields of CLIPConfig"
    )
    init: str = _option(
        "scratch", "scratch, openai (the released weights of MODEL), a checkpoint's path, or hf-hub:OWNER/NAME"
    )
    freeze: tuple[str, ...] = _option((), "what stays as it is: image, text, or modules such as visual.layer1")
    thaw: int | None = _option(None, "steps after which what was frozen learns too")
    # length
    epochs: float | None = _option(None, "passes over the data (default: 32)")
    steps: int | None = _option(None, "updates, instead of epochs")
    minutes: float | None = _option(None, "rough length, instead of epochs: fixed as steps once the speed is known")
    # update
    batch_size: int = _option(256, "pairs compared with each other")
    chunk: int | None = _option(None, "pairs embedded at once, if the batch does not fit into memory")
    checkpointing: bool = _option(False, "compute activations twice instead of keeping them")
    precision: str = _option("float32", "of the matrix products while training", ("float32", "bfloat16", "float16"))
    loss: str = _option("clip", "what to minimise (soft-target wants --scale 1)", tuple(LOSSES))
    scale: float | None = _option(None, "fix what cosines are multiplied by, instead of learning it")
    max_scale: float = _option(MAX_SCALE, "cap of the learned scale")
    lr: float = _option(5e-4, "learning rate at its top")
    image_lr: float | None = _option(None, "the image tower's own")
    text_lr: float | None = _option(None, "the text tower's own")
    warmup: int = _option(200, "steps up to the top learning rate")
    weight_decay: float = _option(0.2, "on matrices")
    max_norm: float = _option(1.0, "cap of the gradient's length; 0 is none")
    # seen and saved
    evaluate_every: int = _option(500, "steps between evaluations")
    save_every: int = _option(500, "steps between checkpoints")
    tensorboard: bool = _option(False, "also write TensorBoard events")
    device: str | None = _option(None, 'such as "cpu" or "cuda" (default: a GPU if there is one)')

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(value))
        if sum(length is not None for length in (self.epochs, self.steps, self.minutes)) > 1:
            raise ValueError("epochs, steps and minutes each give the length of the run; give one of them")
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, since pairs are compared with each other; got {self.batch_size}"
            )
        positive = "epochs steps minutes thaw chunk scale max_scale lr image_lr text_lr evaluate_every save_every"
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("warmup", "weight_decay", "max_norm", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.thaw is not None and not self.freeze:
            raise ValueError("thaw says when what is frozen learns too; say what with freeze")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation is a share of the pictures, from 0 to below 1; got {self.validation}")
        for option in dataclasses.fields(self):
            choices, value = option.metadata["choices"], getattr(self, option.name)
            for chosen in value if isinstance(value, tuple) else (value,):
                if choices and chosen not in choices:
                    raise ValueError(f"{option.name} must be one of {', '.join(choices)}; got {chosen!r}")
        if self.shares and len(self.shares) != len(self.captions):
            raise ValueError(f"got {len(self.shares)} shares for {len(self.captions)} sources of captions")

    def save(self, folder: str | Path) -> None:
        """Write the options into a run's folder."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        with replacing(Path(folder) / FILE) as file:
            file.write(text.encode() + b"\n")

    @classmethod
    def read(cls, folder: str | Path) -> "TrainingOptions":
        """Read the options of the run in a folder; a ValueError says what is wrong with them."""
        path = Path(folder) / FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: these are no options of a training run ({error})") from error
