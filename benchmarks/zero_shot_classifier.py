"""How long does it take to make a classifier for 100 classes from 80 templates?

The original's loop takes a class after the other, each like the last, so it is timed on some and scaled up.
"""

from .contest import Contest, angle
from .inputs import TEMPLATES, class_names
from .peak import text_operations


def run(contest: Contest) -> None:
    path = contest.checkpoint("ViT-B/32")
    classes, sample = contest.size(100, 2), contest.size(2, 1)
    sentences = [template.format(name) for name in class_names(classes) for template in TEMPLATES]
    contest.race(
        "100 classes x 80 templates",
        "zero_shot",
        {"ours": {"path": path, "classes": classes}, "original": {"path": path, "classes": sample}},
        angle,
        1e-5,
        operations=("float32", text_operations(contest.config("ViT-B/32"), sentences, 256)),
        part={"original": sample / classes},
    )
