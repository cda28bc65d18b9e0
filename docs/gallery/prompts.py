"""
Prompt ensembling
=================

What one learns here: the sentence around a label matters, the mean of several sentences is steadier than one, and how
large the gain is, with its error. (CLIP §3.1.4)
"""

# %%
# The question: which of 480 things is it, forty kinds in twelve colours? The pictures show combinations of kind and
# colour that training never showed. The model is right on 99 % of them, which leaves nothing to gain; so they are made
# hard: each is a drawing of 16 by 16 pixels.

import random

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot

import clip
from clip.tasks.encode import encode_images, gather
from clip.training.drawn import COLOURS, KINDS, Scene, Thing, draw_scene, held_out

COUNT = 1000

model, preprocess = clip.load("tiny", device="cpu")
labels = [f"{colour} {kind}" for kind in KINDS for colour in COLOURS]
unseen = [Thing(kind, colour) for kind in KINDS for colour in COLOURS if held_out(kind, colour)]
asked = [unseen[number % len(unseen)] for number in range(COUNT)]
pictures = [draw_scene(Scene((thing,)), random.Random(number), 16) for number, thing in enumerate(asked)]
answers = torch.tensor([labels.index(thing.words) for thing in asked])
image_features = gather(encode_images(model, preprocess, pictures)).values  # (1000, E), unit length

_, panels = pyplot.subplots(1, 6, figsize=(9, 1.9), layout="constrained")
for panel, picture, thing in zip(panels, pictures[::7], asked[::7], strict=False):
    panel.imshow(picture)
    panel.set_title(thing.words, fontsize=9)
    panel.axis("off")
pyplot.show()

# %%
# Ten sentences. From "a {}" to "a big {}" they are as training worded its drawings; the bare name and the last one it
# used for emoji only.

PROMPTS = (
    "{}",
    "a {}",
    "one {}",
    "there is a {}",
    "a drawing of a {}",
    "a picture of a {}",
    "a photo of a {}.",
    "a small {}",
    "a big {}",
    "an emoji of a {}",
)


def right(templates: list[str]) -> np.ndarray:
    """Which pictures find their own label, (1000,): 0 or 1."""
    weights = clip.ZeroShotClassifier(model, labels, templates).weights  # (E, 480)
    return ((image_features @ weights).argmax(dim=1) == answers).double().numpy()


found = {prompt: right([prompt]) for prompt in PROMPTS}
found["all ten together"] = right(list(PROMPTS))
for name, hits in found.items():
    print(f"{name:20} {hits.mean():.1%}")

# %%
# The ensemble is made in the space of the embeddings: the mean of ten unit vectors, brought back to unit length, is one
# vector for a label. So it costs nothing when pictures are classified.

shares = [hits.mean() for hits in found.values()]
errors = [1.96 * hits.std() / COUNT**0.5 for hits in found.values()]
_, panel = pyplot.subplots(figsize=(6.5, 3.2), layout="constrained")
panel.errorbar(shares, list(found), xerr=errors, fmt="none", ecolor="#9aa5b1")
panel.scatter(shares, list(found), color=["#2563a8"] * len(PROMPTS) + ["#c2571a"], zorder=2)
panel.set(xlabel="right, of 480 labels (95 % intervals)")
panel.invert_yaxis()
panel.spines[["top", "right"]].set_visible(False)
pyplot.show()

# %%
# The bare name is the worst: in training the captions of drawings always had an article or a number. The intervals
# overlap, but the pictures were the same for all, so the difference is known better than either share.

gains = found["all ten together"] - found["{}"]
print(f"gain over the bare name: {gains.mean():.1%} ± {1.96 * gains.std() / COUNT**0.5:.1%}")

# %%
# Some sentences do better than the ensemble, by a little. But nobody knows which beforehand, and that is what an
# ensemble is for. Here are ensembles of one to ten, twenty choices of sentences for each size; the band reaches from
# the worst of them to the best.

vectors = torch.stack([clip.ZeroShotClassifier(model, labels, prompt).weights for prompt in PROMPTS])  # (10, E, 480)
rng = random.Random(0)
sizes = range(1, len(PROMPTS) + 1)
curve = []
for size in sizes:
    choices = [rng.sample(range(len(PROMPTS)), size) for _ in range(20)]
    means = [F.normalize(vectors[choice].mean(dim=0), dim=0) for choice in choices]
    curve.append([((image_features @ mean).argmax(dim=1) == answers).double().mean().item() for mean in means])

_, panel = pyplot.subplots(figsize=(5, 3), layout="constrained")
panel.fill_between(sizes, np.min(curve, axis=1), np.max(curve, axis=1), color="#e9f2fb")
panel.plot(sizes, np.mean(curve, axis=1), "o-", color="#2563a8")
panel.set(xlabel="sentences in the ensemble", ylabel="right, of 480 labels", xticks=sizes)
panel.spines[["top", "right"]].set_visible(False)
pyplot.show()

# %%
# In the paper eighty sentences for ImageNet's photographs gain 3.5 points over one good sentence, "a photo of a {}.".
# This world is smaller: its captions were made of a few frames, so that one sentence is soon as good as another.
