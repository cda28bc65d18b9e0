"""
A linear probe
==============

What one learns here: how good the features are if a linear classifier may learn from labelled pictures, and how many
pictures it takes to overtake a sentence, which needs none. (CLIP §3.1.5, Fig. 6, and §3.2)
"""

# %%
# Twenty kinds of thing, in colours in which training never showed them, drawn with 16 by 16 pixels to be hard: 32
# pictures of each kind to learn from, and thirty to be tested on.

import random
from collections.abc import Sequence

import torch
from matplotlib import pyplot
from PIL import Image

import clip
from clip.tasks.encode import gather
from clip.tasks.linear_probe import fit_linear_probe, probe_features
from clip.training.drawn import COLOURS, KINDS, Scene, Thing, draw_scene, held_out

CLASSES = list(KINDS)[:20]

model, preprocess = clip.load("tiny", device="cpu")


def drawn(kind: str, number: int) -> Image.Image:
    """A small drawing of a thing in some colour."""
    rng = random.Random(f"{kind} {number}")
    colour = rng.choice([colour for colour in COLOURS if held_out(kind, colour)])
    return draw_scene(Scene((Thing(kind, colour),)), rng, 16)


def features_of(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (20 n, D) and classes (20 n,) of n pictures of each class."""
    pictures = [drawn(kind, number) for kind in CLASSES for number in numbers]
    features = gather(probe_features(model, preprocess, pictures)).values
    return features, torch.arange(len(CLASSES)).repeat_interleave(len(numbers))


first, second, test = (features_of(numbers) for numbers in (range(16), range(16, 32), range(32, 62)))
print([tuple(features.shape) for features, _ in (first, second, test)])

# %%
# The features are those of the image tower, not normalised. Sentences are the first classifier, with no picture to
# learn from at all.

features, answers = test
weights = clip.ZeroShotClassifier(model, CLASSES, "a {}").weights
zero_shot = ((features @ weights).argmax(dim=1) == answers).double().mean().item()
print(f"zero-shot: {zero_shot:.1%}")

# %%
# A logistic regression is the other, from 2, 4, 8, 16 and 32 pictures of each kind. One half of them is to fit it, the
# other to choose the strength λ of its regularisation by; then it is fitted once more to both, as in the paper.

shots = (2, 4, 8, 16, 32)
accuracies = []
for count in shots:
    few = torch.arange(len(first[0])) % 16 < count // 2
    probe = fit_linear_probe(first[0][few], first[1][few], second[0][few], second[1][few])
    accuracies.append((probe(features).argmax(dim=1) == answers).double().mean().item())
    print(f"{count:2} pictures of each: {accuracies[-1]:.1%}, λ = {probe.strength:.2g}")

_, panel = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
panel.axhline(zero_shot, color="#c2571a", label="sentences")
panel.plot(shots, accuracies, "o-", color="#2563a8", label="linear probe")
panel.set(xlabel="labelled pictures of each kind", ylabel="right, of twenty kinds", xscale="log", xticks=shots)
panel.set_xticklabels(shots)
panel.minorticks_off()
panel.spines[["top", "right"]].set_visible(False)
panel.legend(frameon=False)
pyplot.show()

# %%
# Two or four labelled pictures of each kind tell less than its name does; eight tell more. In the paper, on average
# over its data sets, four pictures of each class are worth as much as its name.
