"""In which order the gallery is read."""

READING_ORDER = ("zero_shot", "prompts", "search", "linear_probe", "explain", "train_from_scratch", "load_checkpoints")


class ReadingOrder:
    """The key by which sphinx-gallery sorts the scripts of a folder."""

    def __init__(self, folder: str):
        pass

    def __call__(self, file: str) -> int:
        return READING_ORDER.index(file.removesuffix(".py"))
