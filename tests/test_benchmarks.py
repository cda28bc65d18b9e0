"""The benchmarks' own arithmetic: targets and ratios, what is fed in, and one question answered in a process."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks import inputs, table  # noqa: E402
from benchmarks.contest import MACHINE, angle, difference  # noqa: E402
from benchmarks.peak import image_operations, text_operations  # noqa: E402
from clip.config import RELEASED  # noqa: E402

TIME = table.Target("q", "case", ("a", "b"), 2)
MEMORY = replace(TIME, case="case, peak memory", bound=0.5)
FIGURES = {
    "q": {
        "question": "q",
        "quick": False,
        "machine": {"processor": "abacus"},
        "versions": {"a": "a 1.0"},
        "left out": {"c": "not installed"},
        "peak": {"float32": {"by hand": 2e9, "by foot": 1e9}},
        "cases": {
            "case": {"unit": "s", "figures": {"ours": [1.0, 2.0, 9.0], "a": [8.0], "b": [6.0], MACHINE: [1.0]}},
            "case, peak memory": {"unit": "MiB", "figures": {"ours": [30.0], "a": [100.0], "b": [50.0]}},
        },
    }
}


def test_a_time_is_compared_with_the_best_peers_by_medians():
    row = table.outcome(TIME, FIGURES)
    assert (row.ratio, row.against, row.verdict) == (3.0, "b", "met")
    assert table.outcome(replace(TIME, bound=3.1), FIGURES).verdict == "not met"


def test_memory_is_a_share_of_the_best_peers_and_small_is_good():
    row = table.outcome(MEMORY, FIGURES)
    assert (row.ratio, row.against, row.verdict) == (0.6, "b", "not met")
    assert table.outcome(replace(MEMORY, bound=0.7), FIGURES).verdict == "met"


def test_the_share_of_the_machines_peak_is_a_ratio_like_others():
    assert table.outcome(replace(TIME, against=(MACHINE,)), FIGURES).ratio == 0.5


@pytest.mark.parametrize(
    "target", [replace(TIME, question="p"), replace(TIME, case="x"), replace(TIME, against=("c",))]
)
def test_what_was_not_measured_is_neither_met_nor_zero(target):
    row = table.outcome(target, FIGURES)
    assert row.ratio is None
    assert row.verdict == "not measured"


def test_the_table_has_every_target_and_what_it_was_measured_with(monkeypatch):
    monkeypatch.setattr(table, "TARGETS", [TIME, MEMORY])
    text = table.markdown(FIGURES)
    assert "| `q` case | best of a, b (b) | 2x | 3.00x | met |" in text
    assert "| `q` case, peak memory | best of a, b (b) | at most 0.5x | 0.60x | not met |" in text
    assert "| case | b | 6.00 s | 6.00 s - 6.00 s | 3.00 | 17% |" in text
    for said in ("abacus", "a 1.0", "c is left out: not installed", "by hand 2"):
        assert said in text


def test_the_picture_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "TARGETS", [TIME, MEMORY])
    table.draw(FIGURES, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_answers_differ_by_their_worst_number_and_by_their_worst_row():
    a, b = np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([[2.0, 0.0], [4.0, 3.0]])
    assert difference(a, b) == 1
    assert difference(a, b[:1]) == float("inf")
    assert angle(a, b) == pytest.approx(1 - 24 / 25)
    assert angle(a, b[:1]) == pytest.approx(0)


def test_a_vision_transformers_operations_are_those_of_its_matrices():
    config = RELEASED["ViT-B/32"]
    tokens, width = 50, config.vision_width
    patches = 49 * 3 * 32**2 * width
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    last = 12 * width**2 + 2 * 12 * tokens * width  # one query, and no key or value but regrouped
    assert image_operations(config, 3) == 3 * 2 * (patches + 11 * block + last + width * config.embed_dim)


def test_texts_are_counted_to_the_longest_of_a_batch():
    config = RELEASED["ViT-B/32"]
    short, long = "a", "a b c d e f"
    apart = text_operations(config, [long, short, short, long], 2)
    assert apart == text_operations(config, [short] * 2, 2) + text_operations(config, [long] * 2, 2)
    assert apart < text_operations(config, [long, short, short, long], 4)


def test_what_is_fed_in_is_the_same_in_every_process():
    program = "from benchmarks import inputs; print([inputs.texts(kind, 3) for kind in ('captions', 'mixed', 'noisy')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([inputs.texts(kind, 3) for kind in ("captions", "mixed", "noisy")])
    assert torch.equal(inputs.images(2), inputs.images(2))


def test_captions_are_short_have_many_words_and_noise_only_where_asked_for():
    english, noisy = inputs.texts("captions", 500), inputs.texts("noisy", 500)
    assert len({word for text in english for word in text.split()}) > 700
    assert max(len(text.split()) for text in english) < 12
    assert all(text.isascii() and "&" not in text for text in english)
    assert not any(text.isascii() for text in noisy)


def test_a_question_is_answered_in_a_process_and_kept(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "tokenize", "--quick", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "tokenize.json").read_text())
    assert results["cases"]["English, warm"]["figures"]["ours"][0] > 0
    assert results["machine"]["threads"] == 1
    assert "`tokenize` English, warm" in (tmp_path / "results.md").read_text()
