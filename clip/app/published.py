"""What others measured: published figures of the nine released models on well-known data sets, each with its source.

Sources: Radford et al. (2103.00020); the result tables of open_clip (`docs/openclip_results.csv`, its retrieval table)
and of LAION's CLIP_benchmark (`benchmark.csv`), both of OpenAI's weights; the release's notebook "Prompt Engineering
for ImageNet". The last three were read where they stand. The paper's figures were taken from transcriptions of it: a
figure with a ~ is known from one of them only, the others from two or more that agree. What was not found is left out;
so are most columns of the paper's Tables 10 and 11. Pets, Aircraft and Caltech101 are measured there by mean per class
accuracy (Table 9).

The same model gets different figures in different places, for other templates and other class names. And users with
the released weights do not reach the paper's figures everywhere: RN50 has 75.6 on CIFAR10 in Table 11 and 71.6 in
open_clip's table. So all that is known is given.
"""

from dataclasses import dataclass

__all__ = ["Figure", "datasets", "published"]


@dataclass(frozen=True)
class Figure:
    """One published number.

    Attributes
    ----------
    name : str
        Which one: "top_1", "top_5", "mean_per_class", "picture_to_text_R@1", ...
    percent : float
        As printed, or from a share in [0, 1].
    source : str
        Where it stands.
    """

    name: str
    percent: float
    source: str


@dataclass(frozen=True)
class _Table:
    """Figures of one kind from one place: a row a model, a column a data set; - where nothing is known."""

    task: str
    name: str
    source: str
    cells: str


_TABLES = (
    _Table(
        "zero-shot",
        "top_1",
        "CLIP Table 11",
        """
        model           imagenet  cifar10  cifar100  food101  stl10  sun397  mnist  country211
        RN50            59.6      75.6     41.6      81.1     94.3~  59.6~   66.6   -
        RN101           62.2      81.0~    49.0~     83.9~    96.7~  59.9~   -      -
        RN50x4          65.8      79.2~    48.9~     86.8~    96.4~  62.7~   -      -
        RN50x16         70.5      82.2~    54.2~     90.5~    97.8~  65.0~   -      -
        RN50x64         73.6      86.8~    61.3~     91.8~    98.3~  66.9~   -      -
        ViT-B/32        63.2      91.3~    65.1      84.4     97.2~  63.2~   51.9~  -
        ViT-B/16        68.6      91.6~    68.7~     89.2~    98.2~  65.2~   -      -
        ViT-L/14        75.3      96.2~    77.9~     92.9~    99.3~  67.7~   -      -
        ViT-L/14@336px  76.2      95.7~    77.5~     93.8     99.4~  68.4~   88.3~  34.9~
        """,
    ),
    _Table(
        "zero-shot",
        "mean_per_class",
        "CLIP Table 11",
        """
        model           pets   aircraft  caltech101
        RN50            85.4   19.3~     -
        RN101           -      19.5~     -
        RN50x4          -      24.6~     -
        RN50x16         -      30.3~     -
        ViT-B/32        87.0~  -         87.9~
        ViT-B/16        -      27.1~     -
        ViT-L/14@336px  93.5   -         -
        """,
    ),
    _Table("zero-shot", "top_5", "CLIP §3.1.3", "model imagenet\nViT-L/14@336px 95~"),
    _Table(
        "zero-shot",
        "top_1",
        "CLIP Table 16",
        """
        model           imagenet-v2  imagenet-a  imagenet-r  imagenet-sketch  objectnet
        ViT-L/14@336px  70.1         77.2        88.9        60.2             72.3
        """,
    ),
    _Table(
        "zero-shot",
        "top_1",
        "open_clip",
        """
        model           imagenet  imagenet-v2  imagenet-a  imagenet-r  imagenet-sketch  objectnet
        RN50            59.82     52.84        23.27       60.73       35.44            41.41
        RN101           62.28     56.12        29.44       68.17       41.06            45.15
        RN50x4          66.27     59.44        41.45       72.74       44.68            51.41
        RN50x16         70.72     64.20        57.24       79.33       50.63            60.71
        RN50x64         73.91     67.06        70.77       84.41       55.93            68.20
        ViT-B/32        63.32     55.92        31.55       69.33       42.29            44.31
        ViT-B/16        68.34     61.88        49.95       77.70       48.24            55.31
        ViT-L/14        75.54     69.83        70.75       87.84       59.59            68.89
        ViT-L/14@336px  76.56     70.89        77.48       89.05       61.00            71.83
        """,
    ),
    _Table(
        "zero-shot",
        "top_1",
        "open_clip",
        """
        model           cifar10  cifar100  food101  sun397  mnist  stl10
        RN50            71.57    40.30     80.80    59.94   57.55  94.19
        RN101           80.78    47.64     83.67    58.03   52.54  96.80
        RN50x4          79.43    45.14     86.40    60.89   49.03  96.58
        RN50x16         81.34    52.09     90.51    63.91   67.98  97.75
        RN50x64         85.10    59.85     92.05    66.61   85.83  98.29
        ViT-B/32        89.83    64.23     84.00    62.48   48.39  97.13
        ViT-B/16        90.77    66.95     88.72    64.35   51.35  98.25
        ViT-L/14        95.59    75.82     93.05    67.56   76.34  99.36
        ViT-L/14@336px  94.93    74.36     93.86    68.65   79.16  99.43
        """,
    ),
    _Table(
        "zero-shot",
        "top_1",
        "CLIP_benchmark",
        """
        model           imagenet  imagenet-v2  cifar10  cifar100  mnist  pets
        ViT-B/32        63.33     55.96        89.82    64.53     48.55  87.33
        ViT-B/16        68.35     61.88        90.83    66.91     49.55  88.93
        ViT-L/14        75.49     69.68        95.69    76.13     76.79  93.08
        ViT-L/14@336px  76.55     70.74        94.97    74.64     78.71  93.81
        """,
    ),
    _Table(
        "zero-shot",
        "top_5",
        "CLIP_benchmark",
        """
        model           imagenet  imagenet-v2
        ViT-B/32        88.78     83.41
        ViT-B/16        91.86     -
        ViT-L/14        94.60     -
        ViT-L/14@336px  95.17     -
        """,
    ),
    _Table("zero-shot", "top_1", "the release's notebook, 80 templates", "model imagenet-v2\nViT-B/32 55.93"),
    _Table("zero-shot", "top_5", "the release's notebook, 80 templates", "model imagenet-v2\nViT-B/32 83.36"),
    _Table(
        "linear-probe",
        "top_1",
        "CLIP Table 10",
        """
        model           sun397
        RN50            73.3~
        RN101           75.1~
        RN50x4          77.0~
        RN50x16         79.2~
        RN50x64         81.1~
        ViT-B/32        76.6~
        ViT-B/16        78.4~
        ViT-L/14        81.8~
        """,
    ),
    _Table(
        "linear-probe",
        "top_1",
        "CLIP Table 10",
        """
        model           imagenet  food101  cifar10  cifar100  sun397  cars
        ViT-L/14@336px  85.4      95.9~    97.9~    87.4~     82.2~   91.5~
        """,
    ),
    _Table(
        "linear-probe",
        "top_1",
        "CLIP Table 10",
        """
        model           gtsrb  country211  sst2   ucf101  kinetics700
        ViT-L/14@336px  92.4~  46.4~       80.5~  92.0~   73.0~
        """,
    ),
    _Table(
        "linear-probe",
        "top_1",
        "CLIP Table 16, fitted to ImageNet",
        """
        model           imagenet-v2  imagenet-a  imagenet-r  imagenet-sketch  objectnet
        ViT-L/14@336px  75.9         75.3        84.2        57.4             66.2
        """,
    ),
    *(
        _Table("retrieval", name, 'CLIP Table 13, after "a photo of"', f"model flickr30k coco\nViT-L/14@336px {cells}")
        for name, cells in (
            ("picture_to_text_R@1", "88.0 58.4"),
            ("picture_to_text_R@5", "98.7 81.5"),
            ("picture_to_text_R@10", "99.4 88.1"),
            ("text_to_picture_R@1", "68.7 37.8"),
            ("text_to_picture_R@5", "90.6 62.4"),
            ("text_to_picture_R@10", "95.2 72.2"),
        )
    ),
    _Table(
        "retrieval",
        "picture_to_text_R@1",
        "open_clip",
        """
        model           flickr30k  coco
        RN50            80.0       48.8
        RN50x64         86.9       58.4
        ViT-B/32        78.9       50.1
        ViT-B/16        82.2       52.4
        ViT-L/14        85.2       56.3
        ViT-L/14@336px  87.7       57.9
        """,
    ),
    _Table(
        "retrieval",
        "text_to_picture_R@1",
        "open_clip",
        """
        model           flickr30k  coco
        RN50            57.4       28.5
        RN50x64         69.0       35.2
        ViT-B/32        58.8       30.4
        ViT-B/16        62.2       33.1
        ViT-L/14        65.0       36.5
        ViT-L/14@336px  66.9       37.1
        """,
    ),
    _Table("retrieval", "picture_to_text_R@5", "CLIP_benchmark", "model coco\nViT-B/32 74.82"),
    _Table("retrieval", "text_to_picture_R@5", "CLIP_benchmark", "model coco\nViT-B/32 55.85"),
)


def datasets(task: str) -> list[str]:
    """The data sets that something is known of, for "zero-shot", "retrieval" or "linear-probe"."""
    return sorted({dataset for table in _TABLES if table.task == task for _, dataset in _cells(table)})


def published(task: str, dataset: str, model: str) -> list[Figure]:
    """What was published about a released model on a data set.

    Parameters
    ----------
    task : str
        "zero-shot", "retrieval" or "linear-probe".
    dataset : str
        One of :func:`datasets`.
    model : str
        A released model's name, as "ViT-B/32".

    Returns
    -------
    list of Figure
        Empty if nothing is known.
    """
    figures = []
    for table in _TABLES:
        cell = _cells(table).get((model, dataset), "-") if table.task == task else "-"
        if cell != "-":
            source = f"{table.source}, by one transcription" if cell.endswith("~") else table.source
            figures.append(Figure(table.name, float(cell.rstrip("~")), source))
    return figures


def _cells(table: _Table) -> dict[tuple[str, str], str]:
    """A table by model and data set."""
    (_, *columns), *rows = (line.split() for line in table.cells.strip().splitlines())
    return {(model, column): cell for model, *cells in rows for column, cell in zip(columns, cells, strict=True)}
