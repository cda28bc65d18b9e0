"""The trainer: killed and resumed it takes the same steps, a NaN is found, a full disk loses nothing, it learns."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import TINY, filled
from PIL import Image

import clip
from clip.checkpoints import CheckpointError
from clip.checkpoints import files as checkpoint_files
from clip.model import CLIP
from clip.preprocess import ImageError, Preprocess
from clip.training.data import Batches, Pair
from clip.training.diagnosis import TrainingError
from clip.training.log import read_log
from clip.training.options import TrainingOptions
from clip.training.trainer import Trainer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


class Squares:
    """Plain pictures of one colour, named: what any model learns at once."""

    def __len__(self):
        return 24

    def draw(self, index, rng):
        name = list(COLOURS)[index % len(COLOURS)]
        shade = tuple(min(255, channel + rng.randrange(15)) for channel in COLOURS[name])
        return [Pair(Image.new("RGB", (64, 64), shade), f"a {name} square", name)]


def trainer(folder, kind="vit", dataset=None, evaluate=None, **options):
    torch.manual_seed(0)
    model = CLIP(**TINY[kind])
    settings = dict(batch_size=4, steps=6, warmup=2, lr=1e-3, save_every=2, out=str(folder), loss="multi-positive")
    options = TrainingOptions(**settings | options)
    preprocess = Preprocess(model.visual.input_resolution)
    batches = Batches(dataset or Squares(), options.batch_size, preprocess, options.seed, options.workers)
    Path(folder).mkdir(exist_ok=True)
    return Trainer(model, batches, options, evaluate)


def losses(folder):
    return {row["step"]: row["loss"] for row in read_log(Path(folder) / "log.jsonl") if "loss" in row}


def test_it_learns_colours(tmp_path):
    learner = trainer(tmp_path, "rn", steps=60, batch_size=8)
    learner.run()
    curve = losses(tmp_path)
    assert len(curve) == 60
    assert curve[60] < 0.3 * curve[1]
    model, preprocess = clip.load(tmp_path / "best.safetensors", device="cpu")
    classifier = clip.ZeroShotClassifier(model, list(COLOURS), "a {} square")
    pictures = torch.stack([preprocess(Image.new("RGB", (80, 80), colour)) for colour in COLOURS.values()])
    assert [matches[0].label for matches in classifier(pictures).top(1)] == list(COLOURS)


def test_every_step_is_logged_beside_the_line_of_not_learning(tmp_path):
    trainer(tmp_path, loss="clip").run()
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["chance"] for row in rows] == pytest.approx([math.log(4)] * 6)
    assert {"loss", "scale", "gradient_norm", "lr", "samples_per_second"} <= rows[0].keys()


def test_where_several_answers_are_right_the_line_of_not_learning_is_lower(tmp_path):
    class Twice(Squares):
        def draw(self, index, rng):
            return super().draw(0, rng) + super().draw(1, rng)

    run = trainer(tmp_path, dataset=Twice())
    assert run.update(next(run.batches.epoch(0)))["chance"] == pytest.approx(math.log(2))  # half of 8 are right


@pytest.mark.parametrize("stop", [1, 2, 5, 7, 8])
def test_a_stopped_and_resumed_run_takes_the_same_steps(tmp_path, stop):
    whole = trainer(tmp_path / "whole", steps=9)
    whole.run()

    stopped = trainer(tmp_path / "stopped", steps=9)
    update = stopped.update

    def until(batch):
        if stopped.step == stop:
            raise MemoryError
        return update(batch)

    stopped.update = until
    with pytest.raises(MemoryError):
        stopped.run()
    resumed = trainer(tmp_path / "stopped", steps=9)
    resumed.resume()
    assert resumed.step == stop // 2 * 2
    resumed.run()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    for name, entry in whole.model.state_dict().items():
        assert torch.equal(entry, resumed.model.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
def test_what_is_left_of_a_run_holds_no_process(tmp_path, fails):
    run = trainer(tmp_path, workers=1, steps=3)
    update, seen = run.update, []

    def watched(batch):
        seen.append(len(multiprocessing.active_children()))
        if fails and run.step == 1:
            raise MemoryError
        return update(batch)

    run.update = watched
    with pytest.raises(MemoryError) if fails else nullcontext():
        run.run()
    assert set(seen) == {1}
    assert multiprocessing.active_children() == []


RUN_UNTIL_KILLED = """
import sys
sys.path[:0] = [{tests!r}, {golden!r}, {root!r}]
import torch
torch.set_num_threads(1)
from test_trainer import trainer
run = trainer({folder!r}, steps=40, save_every=3)
if {resume}:
    run.resume()
run.run()
"""


def test_killed_by_the_system_at_any_moment_it_goes_on_bit_by_bit(tmp_path):
    here = Path(__file__).parent

    def start(folder, resume=False):
        code = RUN_UNTIL_KILLED.format(
            tests=str(here), golden=str(here / "golden"), root=str(here.parent), folder=str(folder), resume=resume
        )
        return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)

    def wait_for_step(process, folder, step):
        log = folder / "log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= step):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    whole = start(tmp_path / "whole")
    killed = tmp_path / "killed"
    rng = random.Random(0)
    for attempt, step in enumerate([5, 14, 31]):
        process = start(killed, resume=attempt > 0)
        wait_for_step(process, killed, step)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(killed, resume=True).wait(120) == 0
    assert whole.wait(120) == 0
    assert losses(killed) == losses(tmp_path / "whole")
    assert list(losses(killed)) == list(range(1, 41))
    assert not list(killed.glob(".*"))  # nothing half written is left over


@pytest.mark.parametrize("request_to_stop", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_finishes_the_step_and_saves(tmp_path, request_to_stop):
    run = trainer(tmp_path, save_every=100)
    update = run.update

    def interrupted(batch):
        if run.step == 3:
            os.kill(os.getpid(), request_to_stop)
        return update(batch)

    before = signal.getsignal(request_to_stop)
    run.update = interrupted
    with pytest.raises(KeyboardInterrupt, match="after step 4"):
        run.run()
    assert signal.getsignal(request_to_stop) is before
    again = trainer(tmp_path)
    again.resume()
    assert again.step == 4


def test_asked_twice_it_stops_at_once(tmp_path):
    run = trainer(tmp_path, save_every=100)

    def interrupted(batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    run.update = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.run()
    again = trainer(tmp_path)
    again.resume()
    assert again.step == 0  # what was saved before the first step


def test_bad_pictures_are_left_out_counted_and_listed_once(tmp_path, caplog):
    class Torn(Squares):
        def draw(self, index, rng):
            if index in (3, 5):
                raise ImageError(f"{index}.png: torn")
            return super().draw(index, rng)

    run = trainer(tmp_path, dataset=Torn(), steps=12)  # two epochs
    run.run()
    assert (tmp_path / "bad_pictures.txt").read_text().splitlines() in (
        ["3.png: torn", "5.png: torn"],
        ["5.png: torn", "3.png: torn"],
    )
    assert "2 bad pictures so far" in caplog.text
    assert len(losses(tmp_path)) == 12


def test_a_picture_that_is_no_number_stops_the_run_and_is_named(tmp_path):
    run = trainer(tmp_path, steps=6)
    update = run.update

    def spoiled(batch):
        if run.step == 4:
            batch.images[2, 0, 5, 5] = math.nan
        return update(batch)

    run.update = spoiled
    with pytest.raises(
        TrainingError, match=r"step 5: loss nan.* pair 2 of the batch .*square.* holds a value that is not"
    ):
        run.run()
    again = trainer(tmp_path)
    again.resume()
    assert again.step == 4
    assert all(p.isfinite().all() for p in again.model.parameters())


def test_a_layer_that_overflows_is_named_with_what_it_saw(tmp_path):
    run = trainer(tmp_path)
    block = run.model.visual.transformer.resblocks[1]
    block.mlp.c_fc.register_forward_hook(lambda module, inputs, output: output * math.inf)
    with pytest.raises(TrainingError, match=r"In the image tower the layer visual.transformer.resblocks.1.mlp.c_fc is"):
        run.run()


def test_weights_that_are_no_numbers_are_named(tmp_path):
    run = trainer(tmp_path)
    run.model.ln_final.bias.data[3] = math.inf
    with pytest.raises(TrainingError, match=r"weight ln_final\.bias already held"):
        run.update(next(run.batches.epoch(0)))


def test_a_gradient_that_is_no_number_is_traced_to_its_weight(tmp_path):
    run = trainer(tmp_path)
    run.model.transformer.resblocks[1].mlp.c_fc.bias.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        TrainingError, match=r"gradients of 1 weights are not, the last of them transformer\.resblocks\.1"
    ):
        run.run()


def test_evaluations_that_are_no_numbers_stop_the_run(tmp_path):
    run = trainer(tmp_path, evaluate=lambda model: {"validation_loss": math.nan}, evaluate_every=2)
    with pytest.raises(TrainingError, match="step 2: validation_loss is nan"):
        run.run()


def test_a_model_that_holds_no_numbers_is_not_saved_over_a_sound_one(tmp_path):
    run = trainer(tmp_path, "rn", steps=4)
    run.run()
    run.model.visual.bn1.running_var[0] = math.inf
    with pytest.raises(TrainingError, match=r"step 4: visual\.bn1\.running_var holds"):
        run.save()
    assert all(entry.isfinite().all() for entry in clip.load(tmp_path / "last.pt")[0].state_dict().values())


def test_half_precision_weights_are_refused_with_the_reason(tmp_path):
    model = filled(TINY["vit"]).half()
    batches = Batches(Squares(), 4, Preprocess(48), 0)
    with pytest.raises(ValueError, match=r"float16.*rounded away.*dtype=torch.float32"):
        Trainer(model, batches, TrainingOptions(out=str(tmp_path)))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_learns_over_float32_weights(tmp_path, precision):
    run = trainer(tmp_path, "rn", precision=precision, steps=40, batch_size=8)
    run.run()
    curve = losses(tmp_path)
    assert curve[40] < 0.5 * curve[1]
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_an_overflow_in_float16_is_skipped_and_the_scaler_gives_way(tmp_path):
    run = trainer(tmp_path, precision="float16", steps=1)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.run()
    assert run.scaler.get_scale() == 2.0**99
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_a_full_disk_is_a_clear_stop_and_the_last_checkpoint_is_intact(tmp_path, monkeypatch):
    run = trainer(tmp_path, steps=6)
    save = torch.save
    saves = []

    def full(obj, file):
        saves.append(1)
        if len(saves) == 3:  # before the first step, after the second, after the fourth
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(obj, file)

    monkeypatch.setattr(checkpoint_files.torch, "save", full)
    with pytest.raises(CheckpointError, match=r"last.pt: cannot be written \(No space left on device\)"):
        run.run()
    again = trainer(tmp_path)
    again.resume()
    assert again.step == 2


def test_another_data_set_is_not_mistaken_for_the_old_one(tmp_path):
    trainer(tmp_path).run()
    with pytest.raises(TrainingError, match="trained on other data"):
        trainer(tmp_path, seed=1).resume()


def test_what_is_no_checkpoint_is_no_place_to_go_on_from(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(TrainingError, match="cannot go on"):
        run.resume()
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(TrainingError, match="cannot go on"):
        run.resume()


def test_the_best_weights_are_those_of_the_lowest_validation_loss(tmp_path):
    found = iter([3.0, 1.0, 2.0])
    scales = []

    def evaluate(model):
        assert not model.training
        scales.append(model.logit_scale.item())
        return {"validation_loss": next(found)}

    run = trainer(tmp_path, steps=6, evaluate_every=2, evaluate=evaluate)
    run.run()
    best, _ = clip.load(tmp_path / "best.safetensors", device="cpu")
    assert best.logit_scale.item() == scales[1] != scales[2]
    assert [row["validation_loss"] for row in read_log(tmp_path / "log.jsonl") if "validation_loss" in row] == [3, 1, 2]
    assert run.model.training


def test_the_last_checkpoint_is_a_model_too(tmp_path):
    run = trainer(tmp_path)
    run.run()
    model, _ = clip.load(tmp_path / "last.pt", device="cpu")
    for name, entry in model.state_dict().items():
        assert torch.equal(entry, run.model.state_dict()[name]), name


def test_a_fixed_scale_stays_and_a_learned_one_is_capped(tmp_path):
    fixed = trainer(tmp_path / "a", scale=20.0)
    fixed.run()
    assert fixed.model.logit_scale.exp().item() == pytest.approx(20)
    capped = trainer(tmp_path / "b", max_scale=14.0)
    capped.run()
    assert capped.model.logit_scale.exp().item() <= 14.0001


def test_minutes_become_steps_once_the_speed_is_known(tmp_path):
    run = trainer(tmp_path, steps=None, minutes=0.02)
    run.run()
    assert run.total == run.step >= 20


def test_chunks_train_as_the_whole_batch_does(tmp_path):
    trainer(tmp_path / "whole", batch_size=8).run()
    trainer(tmp_path / "chunks", batch_size=8, chunk=3).run()
    assert list(losses(tmp_path / "chunks").values()) == pytest.approx(
        list(losses(tmp_path / "whole").values()), rel=1e-4
    )


def test_options_come_back_from_the_run_s_folder(tmp_path):
    options = TrainingOptions(captions=("a.csv", "drawn"), shares=(0.5, 0.5), freeze=("text",), out=str(tmp_path))
    options.save(tmp_path)
    assert TrainingOptions.read(tmp_path) == options
    json.loads((tmp_path / "options.json").read_text())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 1, "steps": 1}, "give one of them"),
        ({"batch_size": 1}, "at least 2"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"validation": 1.0}, "below 1"),
        ({"loss": "hinge"}, "loss must be one of clip, multi-positive, soft-target; got 'hinge'"),
        ({"thaw": 5}, "say what with freeze"),
        ({"shares": (1.0,)}, "1 shares for 0 sources"),
    ],
)
def test_options_that_make_no_sense_say_so(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TrainingOptions(), **wrong)
