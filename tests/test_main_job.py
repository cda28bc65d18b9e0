"""The main job on full-size files: an archive with the layout of OpenAI's, real photographs, `clip classify`.

The weights follow the rule of the golden figures, so the labels chosen mean nothing; the numbers do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import skimage
import torch
from archive import write_archive
from conftest import GOLDEN, golden_inputs
from fill import fill
from peer import as_transformers
from PIL import Image

import clip
from clip.app.cli import main
from clip.model import CLIP

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = [
    str(Path(skimage.__file__).parent / "data" / name)
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
]
LABELS = ["an astronaut", "a tabby cat", "a cup of coffee", "a rocket on a launchpad"]

pytestmark = pytest.mark.slow


def write_full_size(name, path, half):
    """A file of OpenAI's kind with the golden weights of a full-size model."""
    case = GOLDEN[name]
    with torch.device("meta"):
        shapes = {key: tuple(entry.shape) for key, entry in CLIP(**case["config"]).state_dict().items()}
    weights = {key: torch.as_tensor(fill(key, shape, case["salt"])) for key, shape in shapes.items()}
    write_archive(weights, path, half=half)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """ViT-B/32 in mixed half precision, as released."""
    path = tmp_path_factory.mktemp("vit") / "ViT-B-32.pt"
    write_full_size("ViT-B/32", path, half=True)
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """RN50 in float32, so that the golden figures hold to the last digit."""
    path = tmp_path_factory.mktemp("resnet") / "RN50.pt"
    write_full_size("RN50", path, half=False)
    return path


def run(*arguments):
    """What a Python of its own prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def classify(model, capsys):
    options = ["--labels", *LABELS, "--model", str(model), "--device", "cpu", "--json"]
    assert main(["classify", *PHOTOGRAPHS, *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_photographs_are_classified_as_transformers_would(vit, capsys):
    answers = classify(vit, capsys)
    model, preprocess = clip.load(vit, device="cpu")
    images = torch.stack([preprocess(Image.open(path)) for path in PHOTOGRAPHS])
    tokens = clip.tokenize([f"a photo of {label}." for label in LABELS])
    with torch.no_grad():
        theirs = as_transformers(model)(input_ids=tokens.long(), pixel_values=images)
    probabilities = theirs.logits_per_image.softmax(-1)
    cosines = theirs.logits_per_image / model.logit_scale.exp()
    for i, answer in enumerate(answers):
        assert answer["picture"] == PHOTOGRAPHS[i]
        for match in answer["matches"]:
            label = LABELS.index(match["label"])
            assert match["probability"] == pytest.approx(probabilities[i, label].item(), rel=1e-3)
            assert match["cosine"] == pytest.approx(cosines[i, label].item(), abs=1e-5)


def test_a_resnet_file_gives_the_golden_logits_and_classifies(resnet, capsys):
    assert len(classify(resnet, capsys)) == len(PHOTOGRAPHS)
    model, _ = clip.load(resnet, device="cpu")
    with torch.no_grad():
        logits = model(*golden_inputs("RN50"))[0]
    want = torch.tensor(GOLDEN["RN50"]["logits_per_image"]["values"])
    assert ((logits - want).abs().max() / want.abs().max()).item() < 1e-4


@pytest.fixture(scope="module")
def half_resnet(tmp_path_factory):
    """RN50 in mixed half precision, as released."""
    path = tmp_path_factory.mktemp("half") / "RN50.pt"
    write_full_size("RN50", path, half=True)
    return path


@pytest.mark.parametrize(("fixture", "name"), [("vit", "ViT-B/32"), ("half_resnet", "RN50")])
def test_weights_in_half_precision_stay_near_the_golden_logits(fixture, name, request):
    model, _ = clip.load(request.getfixturevalue(fixture), device="cpu")
    with torch.no_grad():
        logits = model(*golden_inputs(name))[0]
    # Eleven bits of mantissa in the weights, seen through the scale 1 / 0.07
    assert (logits - torch.tensor(GOLDEN[name]["logits_per_image"]["values"])).abs().max() < 0.01


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of one process is read from /proc")
def test_loading_takes_little_more_memory_than_the_weights(vit):
    code = (
        "import re, sys, clip;"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]);"
        "before = peak(); model, _ = clip.load(sys.argv[1], device='cpu');"
        "print(peak() - before, sum(entry.nbytes for entry in model.state_dict().values()))"
    )
    done = run("-W", "ignore", "-c", code, str(vit))
    above, weights = map(int, done.split())
    # One copy, and the largest tensor of the file; a second copy in half precision alone would be 1.5
    assert weights < above + 2**26
    assert above < 1.3 * weights


def test_verify_tells_made_up_weights_from_the_published_ones(vit, capsys):
    assert main(["verify", str(vit), "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("pass") for line in lines) >= 5  # sizes and token ids are right
    assert sum(line.startswith("FAIL  cosines") for line in lines) >= 6


def test_the_example_prints_a_cosine_for_each_picture_and_sentence(vit):
    example = ROOT / "examples" / "classify_photographs.py"
    names, *columns = zip(*(line.split() for line in run(str(example), str(vit)).splitlines()), strict=True)
    assert list(names) == ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"]
    assert len(columns) == 4
    assert all(-1 <= float(cosine) <= 1 for column in columns for cosine in column)
