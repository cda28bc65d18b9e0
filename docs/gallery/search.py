"""
Search pictures by words
========================

What one learns here: pictures become vectors once, a query becomes another, and the nearest are the answer; and
queries can be added up, words and pictures alike.
"""

# %%
# Two hundred drawings, of combinations of colour and thing that the model was never shown.

from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib import pyplot
from PIL import Image

import clip
from clip.tasks.retrieval import Index, Match, Query
from clip.training.drawn import write_folder

folder = TemporaryDirectory()
drawings = Path(folder.name, "drawings")
write_folder(drawings, 200, seed=0, resolution=128, held_out=True)

# %%
# An index is a folder: each picture's vector, and what it takes to keep up with files that come, go and move.

model, preprocess = clip.load("tiny", device="cpu")
index = Index.build(Path(folder.name, "drawings.clipindex"), [drawings], model, preprocess, name="tiny")
print(index.changes)

# %%
# Sentences ask. Each answer is a list of matches with their cosines, the best first.

sentences = ["four purple trees", "a turquoise thing", "a star"]
answers = index.search(*sentences, top=6)
for match in answers[0]:
    print(f"{match.rank}  {match.cosine:.3f}  {Path(match.path).name}")


def show(queries: list[str], answers: list[list[Match]]) -> None:
    """A row for each query, its best match on the left."""
    columns = len(answers[0])
    size = (1.3 * columns, 1.62 * len(queries))
    _, rows = pyplot.subplots(len(queries), columns, figsize=size, squeeze=False, layout="constrained")
    for query, row, matches in zip(queries, rows, answers, strict=True):
        for panel, match in zip(row, matches, strict=True):
            panel.imshow(Image.open(match.path))
            panel.set_title(f"{match.cosine:.2f}", fontsize=9)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        row[0].set_ylabel(query.replace(" ", "\n"), fontsize=9, rotation=0, ha="right", va="center", labelpad=8)
    pyplot.show()


show(sentences, answers)

# %%
# One picture of four purple trees is there, and six were asked for: a search always answers, with the nearest there is.
# The cosine says how near that is.
#
# Pictures ask, too: these two were drawn by hand, in another style than all that is in the index. No yellow sun is
# there. Of green leaves there are four together, which are found, and a small one alone, which is not.

pictures = Path(clip.__file__).parents[1] / "examples" / "pictures"
show(
    ["yellow-sun.png", "green-leaf.png"], index.search(pictures / "yellow-sun.png", pictures / "green-leaf.png", top=6)
)

# %%
# And queries add up: more like this, less like that. The sum of unit vectors is brought back to unit length.

queries = [
    Query([(1, "a purple tree"), (-1, "purple"), (1, "orange")]),
    Query([(1, "a turquoise cat"), (-1, "a cat"), (1, "a leaf")]),
    Query([(1, pictures / "purple-umbrella.png"), (-1, "a purple umbrella"), (1, "an orange umbrella")]),
]
print(*queries[:2], sep="\n")
show(
    ["purple tree − purple + orange", "turquoise cat − cat + leaf", "umbrella.png − purple + orange"],
    index.search(*queries, top=6),
)

# %%
folder.cleanup()
