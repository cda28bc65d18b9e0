"""It learns: a short run in the drawn world, from scratch, by the command that people type."""

import math

import clip
from clip.app.cli import main
from clip.training.evaluation import drawn_abilities
from clip.training.log import read_log


def test_a_minute_in_the_drawn_world_is_enough_to_see_it_learn(tmp_path):
    out = tmp_path / "run"
    command = "train drawn --model tiny --twins --loss multi-positive --precision bfloat16 --lr 1e-3 --warmup 20"
    command += f" --batch-size 96 --steps 90 --evaluate-every 1000 --out {out}"
    assert main(command.split()) == 0

    rows = [row for row in read_log(out / "log.jsonl") if "loss" in row]
    late = rows[-10:]
    assert rows[0]["loss"] > 0.9 * rows[0]["chance"]
    assert sum(row["loss"] for row in late) < 0.6 * sum(row["chance"] for row in late)

    model, preprocess = clip.load(out / "best.safetensors", device="cpu")
    figures = drawn_abilities(preprocess, count=300, seed=3, abilities=("counting", "things"))(model)
    chance = {"counting": 1 / 5, "things": 1 / 480}
    for ability, share in chance.items():  # five standard deviations beyond guessing
        assert figures[f"drawn_{ability}"] > share + 5 * math.sqrt(share * (1 - share) / 300), figures
