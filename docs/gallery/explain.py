"""
Where in the picture is it?
===========================

What one learns here: a text can be found *in* a picture, by covering parts of it, and a map says where and not
whether.
"""

# %%
# A star and a boat, drawn by hand, and three texts, of which one is wrong.

from pathlib import Path

import torch
from matplotlib import pyplot
from PIL import Image

import clip
from clip.tasks.explain import explain

PICTURES = Path(clip.__file__).parents[1] / "examples" / "pictures"

model, preprocess = clip.load("tiny", device="cpu")
picture = Image.open(PICTURES / "star-above-boat.png")
texts = ["a yellow star", "a blue boat", "an orange fish"]
cosines = clip.similarity(model, preprocess(picture)[None], texts)[0].tolist()


def show(picture: Image.Image, texts: list[str], cosines: list[float], maps: list[torch.Tensor]) -> None:
    """A picture, and beside it the map of each text over its grey version."""
    _, panels = pyplot.subplots(1, 1 + len(texts), figsize=(2.2 * (1 + len(texts)), 2.6), layout="constrained")
    panels[0].imshow(picture)
    for panel, text, cosine, heat in zip(panels[1:], texts, cosines, maps, strict=True):
        panel.imshow(picture.convert("L"), cmap="gray", vmin=-200)
        panel.imshow(heat, cmap="Reds", alpha=0.85 * heat.numpy(), vmin=0, vmax=1)
        panel.set_title(f"{text}\n{cosine:.2f}", fontsize=10)
    for panel in panels:
        panel.axis("off")
    pyplot.show()


# %%
# Occlusion: cover a square of the picture with its mean colour, see how far the score of the text falls, and do so
# everywhere: 21 x 21 passes through the model, and nothing has to be known of its inside.

maps = [explain(model, picture, text, "occlusion", stride=4) for text in texts]
print(tuple(maps[0].shape), [f"{heat.min():.2f} to {heat.max():.2f}" for heat in maps])
show(picture, texts, cosines, maps)

# %%
# There is no fish, and its map is as dark as the others: the highest point of each map is 1, whatever it is the highest
# of. *Whether* is the cosine above the map.
#
# Grad-CAM asks the gradient instead: what does each channel of the last stage do for the score, and where is it active?
# One pass forward and one back. This model reads pictures of 64 pixels, and its last stage has 2 x 2 places, so it can
# tell above from below, left from right, and no more; RN50 has 7 x 7.

show(picture, texts, cosines, [explain(model, picture, text, "grad-cam") for text in texts])

# %%
# What a wrong answer looked at is worth a look, too. These keys are nearer to a yellow sun than to two yellow keys, and
# the sun was seen in the bits.

picture = Image.open(PICTURES / "two-yellow-keys.png")
texts = ["two yellow keys", "a yellow sun"]
cosines = clip.similarity(model, preprocess(picture)[None], texts)[0].tolist()
show(picture, texts, cosines, [explain(model, picture, text, "occlusion", stride=4) for text in texts])
