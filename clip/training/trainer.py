"""The loop that learns: draw a batch, compare everything with everything, move the weights, look up now and then.

Source: Radford et al. (2103.00020) §2.5. The update step is :meth:`Trainer.update`; everything else here is about not
losing what it learned.

    folder/
        options.json        what the run was told
        log.jsonl           one line a step, one an evaluation
        last.pt             weights, optimiser, schedule and random states, to go on from
        best.safetensors    the weights with the lowest validation loss
        curves.png          the log, drawn
        bad_pictures.txt    what could not be read, if anything

A run that is killed and resumed takes the very steps that it would have taken. The order of the data and everything
that is drawn at random depend on the seed and the step alone; the rest is in `last.pt`, which is replaced by one
rename; and the log is cut back to what `last.pt` knows of.
"""

import logging
import math
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from ..clip import save
from ..model import CLIP, ModifiedResNet
from .data import Batch, Batches
from .diagnosis import TrainingError, first_non_finite
from .gradients import backward, checkpoint_blocks
from .log import RunLog
from .loss import LOSSES, clip_scale_
from .optimizer import adamw, freeze, training_mode, warmup_cosine
from .options import TrainingOptions

__all__ = ["Trainer"]

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS_TO_WARM_UP, STEPS_TO_KNOW_THE_SPEED = 5, 20  # between which it is measured how long a step takes
BAD_PICTURES = "bad_pictures.txt"
PATIENCE = 300  # seconds without a checkpoint, at most

logger = logging.getLogger(__name__)


class Trainer:
    """A model, the pairs it learns from, and how far it has come.

    Parameters
    ----------
    model : CLIP
        With float32 weights, on the device where it is to be trained; trained in place.
    batches : Batches
        What it learns from.
    options : TrainingOptions
        How.
    evaluate : callable, optional
        Takes the model in evaluation mode and returns figures by name. "validation_loss" decides which weights are
        best; without it, the last are.

    Raises
    ------
    ValueError
        If the weights are in half precision.
    """

    def __init__(
        self,
        model: CLIP,
        batches: Batches,
        options: TrainingOptions,
        evaluate: Callable[[CLIP], dict[str, float]] | None = None,
    ):
        _refuse_half_precision(model)
        self.model, self.batches, self.options, self.evaluate = model, batches, options, evaluate
        self.folder = Path(options.out)
        self.device = model.logit_scale.device
        self.autocast = AUTOCAST[options.precision]

        if options.thaw is None:  # what thaws has to be known to the optimiser
            freeze(model, options.freeze)
        if options.scale is not None:
            model.logit_scale.data.fill_(math.log(options.scale))
            model.logit_scale.requires_grad_(False)
        if options.checkpointing:
            checkpoint_blocks(model)
        if isinstance(model.visual, ModifiedResNet):
            model.visual.to(memory_format=torch.channels_last)  # convolutions are faster so

        self.loss = LOSSES[options.loss]
        self.optimizer = adamw(model, options.lr, options.weight_decay, options.image_lr, options.text_lr)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)

        self.step = 0  # updates done
        self.total = _length(options, len(batches))  # None until a length in minutes is known in steps
        self.best = math.inf  # lowest validation loss so far
        self.bad: set[str] = set()  # pictures that could not be read, and why
        self.log = RunLog(self.folder / "log.jsonl", options.tensorboard)
        self._freeze()
        if self.total and options.warmup > self.total / 2:
            logger.warning("the warm-up of %d steps takes most of this run of %d", options.warmup, self.total)

    def _freeze(self) -> None:
        """Let learn what learns at this step: everything but what is frozen, and that once it thaws."""
        freeze(self.model, self.options.freeze, self.options.thaw is None or self.step < self.options.thaw)
        training_mode(self.model)

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from one batch; return what the log keeps of it."""
        if self.step == self.options.thaw:
            self._freeze()
        images, tokens = batch.images.to(self.device), batch.tokens.to(self.device)
        identities = batch.identities.to(self.device)

        # 1. the schedule
        share = warmup_cosine(self.step, self.options.warmup, self.total or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["top_lr"]

        # 2. the loss, and its gradient with respect to every weight
        self.optimizer.zero_grad()
        loss = backward(
            self.model, images, tokens, identities, self.loss, self.options.chunk, self.autocast, self.scaler.scale
        )

        # 3. a gradient that is too long is shortened; one that is no number would spoil every weight at once
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        overflow = self.scaler.is_enabled() and loss.isfinite() and self.scaler.get_scale() > 1  # mended by step 4
        if not (loss.isfinite() and norm.isfinite()) and not overflow:
            raise TrainingError(
                f"step {self.step + 1}: loss {loss.item():.4g}, gradient norm {norm.item():.4g}. "
                + first_non_finite(self.model, batch, self.options.chunk, self.autocast)
            )
        if self.options.max_norm and norm.isfinite():
            clip_grads_with_norm_(self.parameters, self.options.max_norm, norm)

        # 4. the step
        self.scaler.step(self.optimizer)  # left out where the gradient overflowed in float16
        self.scaler.update()
        if self.model.logit_scale.requires_grad:
            clip_scale_(self.model.logit_scale, self.options.max_scale)
        self.step += 1
        return {
            "step": self.step,
            "loss": loss.item(),
            "chance": self._chance(identities),
            "scale": self.model.logit_scale.exp().item(),
            "gradient_norm": norm.item(),
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
        }

    def _chance(self, identities: torch.Tensor) -> float:
        """The loss of a model that tells nothing apart: ln(batch), or less where several answers are right."""
        same = torch.ones(len(identities), 1, device=identities.device)
        return self.loss(same, same, same.new_ones(()), identities).item()

    def run(self) -> None:
        """Train to the end, from wherever the run is.

        Ctrl-C, or the system's request to end, stops the run once the step is done and saved; a second one does not
        wait.

        Raises
        ------
        TrainingError
            If the loss or its gradient is no finite number. `last.pt` is from before.
        CheckpointError, OSError
            If something cannot be written. What was written before is intact.
        KeyboardInterrupt
            If the run was stopped from outside.
        """
        started, pairs, first = time.monotonic(), 0, self.step
        steady = saved = started
        bar = tqdm(total=self.total, initial=self.step, unit="step", desc="training")
        with bar, self.log, _patience() as asked, closing(self.batches):
            for batch in self._batches_to_come():
                if self.step == 0:
                    self.save()  # from now on there is something to go on from
                row = self.update(batch)
                pairs += len(batch.images)
                now = time.monotonic()
                self._report({**row, "samples_per_second": pairs / (now - started)}, batch, bar)
                if self.step - first == STEPS_TO_WARM_UP:
                    steady = now
                if self.total is None and self.step - first == STEPS_TO_KNOW_THE_SPEED:
                    pace = (now - steady) / (STEPS_TO_KNOW_THE_SPEED - STEPS_TO_WARM_UP)  # seconds a step
                    left = 60 * self.options.minutes - (now - started)
                    self.total = bar.total = self.step + max(0, round(left / pace))
                if self.step == self.total or self.step % self.options.evaluate_every == 0:
                    self._look_up()
                due = self.step % self.options.save_every == 0 or now - saved > PATIENCE
                if due or asked or self.step == self.total:
                    self.save()
                    saved = time.monotonic()
                if asked and self.step != self.total:
                    raise KeyboardInterrupt(f"stopped after step {self.step}, which is saved")

    def _batches_to_come(self) -> Iterator[Batch]:
        """The batches from here to the end; which these are follows from the number of steps done."""
        while self.total is None or self.step < self.total:
            epoch, position = divmod(self.step, len(self.batches))
            for batch in self.batches.epoch(epoch, start=position):
                yield batch
                if self.step == self.total:
                    return

    def _report(self, row: dict[str, float], batch: Batch, bar: tqdm) -> None:
        """One step into the log and onto the screen."""
        self.log.write(row)
        if new := sorted(set(batch.bad) - self.bad):
            self.bad.update(new)
            with (self.folder / BAD_PICTURES).open("a", encoding="utf-8") as file:
                file.writelines(f"{picture}\n" for picture in new)
            logger.warning("%d bad pictures so far, left out; the last: %s", len(self.bad), new[-1])
        bar.set_postfix_str(
            f"loss {row['loss']:.3f} of {row['chance']:.2f}, scale {row['scale']:.1f}, "
            f"|g| {row['gradient_norm']:.2f}, {row['samples_per_second']:.0f} pairs/s",
            refresh=False,
        )
        bar.update()

    def _look_up(self) -> None:
        """Evaluate, and keep the weights if they are the best so far; without a validation loss the last are."""
        self._check_finite()
        figures = {}
        if self.evaluate:
            self.model.eval()
            figures = self.evaluate(self.model)
            training_mode(self.model)
            self.log.write({"step": self.step, **figures})
            tqdm.write(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
            for name, value in figures.items():
                if not math.isfinite(value):
                    raise TrainingError(f"step {self.step}: {name} is {value}, though the weights are finite")
        if "validation_loss" in figures:
            if figures["validation_loss"] >= self.best:
                return
            self.best = figures["validation_loss"]
        save(self.model, self.folder / "best.safetensors")

    def _check_finite(self) -> None:
        """Raise a TrainingError if the model, statistics of BatchNorms included, holds what is no number."""
        for name, entry in self.model.state_dict().items():
            if not entry.isfinite().all():
                raise TrainingError(f"step {self.step}: {name} holds a number that is not finite, so it is not saved")

    def save(self) -> None:
        """Write `last.pt`, which :meth:`resume` goes on from and `clip.load` reads as a model.

        Raises
        ------
        TrainingError
            If the model holds a number that is not finite; what was there before is left as it was.
        CheckpointError
            If it cannot be written; likewise.
        """
        self._check_finite()
        self.log.flush()  # what `last.pt` knows of is on the disk before it
        state = {
            "step": self.step,
            "total": self.total,
            "best": self.best,
            "batches": self.batches.fingerprint,
            "log_size": self.log.size,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        save(self.model, self.folder / "last.pt", state)

    def resume(self) -> None:
        """Go back to where `last.pt` was written, log included.

        Raises
        ------
        TrainingError
            If there is no such file, or it belongs to other data.
        """
        path = self.folder / "last.pt"
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            state = saved["training"]
        except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise TrainingError(f"{path}: cannot go on from here ({error})") from error
        if state["batches"] != self.batches.fingerprint:
            raise TrainingError(
                f"{path} was trained on other data: pictures, captions, batch size or seed have changed since; put "
                "them back, or start a new run from this file with --init"
            )
        self.model.load_state_dict(saved["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.total, self.best = state["step"], state["total"], state["best"]
        self._freeze()
        torch.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)
        if self.log.size < state["log_size"]:
            raise TrainingError(
                f"{self.log.path} is shorter than it was when {path} was written; it cannot be continued"
            )
        self.log.cut(state["log_size"])
        if (listed := self.folder / BAD_PICTURES).exists():
            self.bad = set(listed.read_text(encoding="utf-8").splitlines())
        for left_over in self.folder.glob(".*.part"):  # of a checkpoint that was being written when the run was killed
            left_over.unlink()


@contextmanager
def _patience() -> Iterator[list[int]]:
    """Gather requests to stop instead of obeying them in the middle of something, but for the second one."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # the only one that may handle signals
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_half_precision(model: CLIP) -> None:
    """Raise the error that explains a NaN before it happens."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"the weights are in half precision ({name} is {parameter.dtype}): there, an update a five-thousandth "
                "of a weight's size is rounded away, and Adam's ε of 1e-8 is 0, so that the first steps divide by zero "
                "and give NaN. Load the model with clip.load(name, dtype=torch.float32), or call model.float(), and "
                "choose precision bfloat16 or float16: the products are then computed in it, the weights stay exact"
            )


def _length(options: TrainingOptions, batches: int) -> int | None:
    """The number of updates that a run is to have, if it can be said beforehand."""
    if options.minutes is not None:
        return None
    return options.steps or math.ceil((options.epochs or 32) * batches)  # CLIP §2.5: 32 epochs
