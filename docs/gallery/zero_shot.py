"""
Zero-shot classification
========================

What one learns here: a classifier can be written down as a list of sentences, its answer is two numbers, and they do
not mean the same. (CLIP §3.1)
"""

# %%
# The model is a small one that we trained on drawings. The pictures were drawn by hand, and it has never seen them.

from pathlib import Path

from matplotlib import pyplot
from PIL import Image

import clip

PICTURES = Path(clip.__file__).parents[1] / "examples" / "pictures"

model, preprocess = clip.load("tiny", device="cpu")
names = ("orange-fish", "brown-cat", "purple-umbrella", "star-above-boat")
pictures = [Image.open(PICTURES / f"{name}.png") for name in names]
images = preprocess.batch(pictures)
print(tuple(images.shape))

# %%
# A classifier is made of labels, and that is all. The text tower turns each into a vector, which is a column of the
# weights of a linear classifier; the picture's vector is its input.

labels = ["a cat", "a fish", "a bird", "an umbrella", "a boat", "a star"]
classifier = clip.ZeroShotClassifier(model, labels, templates="{}")
answers = classifier(images)

print(tuple(classifier.weights.shape))
for name, [best] in zip(names, answers.top(1), strict=True):
    print(f"{name:16} {best.label:12} probability {best.probability:.2f}  cosine {best.cosine:.2f}")

# %%
# Blue bars are cosines: how alike this picture and this label are, whatever the other labels may be. Orange dots are
# probabilities: which of *these* labels it is, so that they add to one. The model makes them from the cosines, times
# ``exp(logit_scale)``, by a softmax.

_, panels = pyplot.subplots(2, 4, figsize=(9, 4), height_ratios=(1.2, 1), sharey="row", layout="constrained")
for column, picture in enumerate(pictures):
    panels[0, column].imshow(picture)
    panels[0, column].axis("off")
    panels[1, column].barh(labels, answers.cosines[column], color="#9db9d6")
    panels[1, column].plot(answers.probabilities[column], labels, "o", color="#c2571a", markersize=5)
    panels[1, column].set(xlim=(-0.45, 1.05))
    panels[1, column].spines[["top", "right"]].set_visible(False)
panels[1, 0].invert_yaxis()
pyplot.show()

# %%
# The last picture shows a star and a boat. Their cosines are nearly the same, and yet one has more than twice the
# probability of the other; the cat, a little behind, gets 7 %.
#
# And the third? Take the umbrella from the labels, and look at what the probability says then.

labels.remove("an umbrella")
[best] = clip.ZeroShotClassifier(model, labels, templates="{}")(images[2:3]).top(1)[0]
print(f"{best.label}: probability {best.probability:.3f}, cosine {best.cosine:.2f}")

# %%
# It is as sure of a star as it was of the umbrella, since it says *which of these*, and one of these must win. The
# cosine shows that there is less to it. "None of these" has to be a label, with sentences of its own: here, other
# things that it might be.

others = ["a house", "a key", "a tree", "a hat", "a leaf", "a mushroom"]
classifier = clip.ZeroShotClassifier(model, labels, templates="{}", none_prompts=others)
[best] = classifier(images[2:3]).top(1)[0]
print(f"{best.label}: probability {best.probability:.3f}, cosine {best.cosine:.2f}")

# %%
# Labels may say more than a name. These four differ in colours and in the order of words alone, and nothing in its
# training was called a blue boat.

sentences = [
    "a yellow star above a blue boat",
    "a blue boat above a yellow star",
    "a blue star above a yellow boat",
    "a yellow boat above a blue star",
]
for match in clip.ZeroShotClassifier(model, sentences, templates="{}")(images[3:]).top(4)[0]:
    print(f"{match.label:34} probability {match.probability:.2f}  cosine {match.cosine:.2f}")
