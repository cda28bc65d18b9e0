"""What several test modules share: the golden models, and tiny models whose sizes all differ."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fill import fill, image

import clip
from clip.checkpoints import CheckpointError
from clip.model import CLIP

GOLDEN = json.loads((Path(__file__).parent / "golden" / "models.json").read_text())
# Axes all of different size, so that a swapped axis cannot pass
TINY = {
    "vit": dict(
        embed_dim=24,
        image_resolution=48,
        vision_layers=3,
        vision_width=128,
        vision_patch_size=16,
        context_length=77,
        vocab_size=49408,
        transformer_width=64,
        transformer_heads=4,
        transformer_layers=2,
    ),
    "rn": dict(
        embed_dim=24,
        image_resolution=64,
        vision_layers=(1, 2, 1, 1),
        vision_width=16,
        vision_patch_size=None,
        context_length=77,
        vocab_size=49408,
        transformer_width=64,
        transformer_heads=4,
        transformer_layers=2,
    ),
}


def filled(config, salt=""):
    """The model of a configuration with the weights of the golden rule, in evaluation mode."""
    model = CLIP(**config)
    weights = {key: torch.as_tensor(fill(key, tuple(entry.shape), salt)) for key, entry in model.state_dict().items()}
    model.load_state_dict(weights)
    return model.eval()


def pytest_runtest_setup(item):
    if item.get_closest_marker("requires_cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(params=["vit", "rn"])
def tiny(request):
    """A tiny model of each kind of image tower."""
    return filled(TINY[request.param])


@pytest.fixture
def tiny_vit():
    return filled(TINY["vit"])


def golden_inputs(name):
    """The images and the token ids behind the golden figures of one model."""
    case = GOLDEN[name]
    images = image(case["salt"] + "image", case["images"], case["config"]["image_resolution"])
    return torch.from_numpy(images), clip.tokenize(case["texts"])


ODD = [None, True, 0, -1, 2.5, 10**30, float("nan"), "x", [], [1, 2, 3], {}, {"height": []}, {"width": []}]


def load_with_odd_values(folder, file, objects):
    """Load a folder with each entry of some `objects` of a JSON file in turn as each odd value: read, or refused."""
    path = folder / file
    content = json.loads(path.read_text())
    for target in objects(content):
        for name, kept in list(target.items()):
            for odd in ODD:
                target[name] = odd
                path.write_text(json.dumps(content))
                with suppress(CheckpointError):
                    clip.load(folder, device="cpu")
            target[name] = kept
    path.write_text(json.dumps(content))
