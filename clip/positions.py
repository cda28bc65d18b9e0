"""Positional embeddings for pictures of another size than those of training.

Source: Dosovitskiy et al. (2010.11929) §3.2: the patches keep their size, a larger picture has more of them, and the
learned positions are interpolated in two dimensions, according to where they lie in the picture.

    positional_embedding  (G² + 1, D)      row 0 belongs to the class token (ResNet: to the mean), which lies nowhere
      │  rows 1 ...  (D, G, G)
      │  bicubic, float32
    (D, G', G')  ──  row 0 in front  ──  (G'² + 1, D)

Bicubic with antialiasing, the kernel that resizes the pictures themselves (`preprocess`): on a finer grid it passes
through neighbours smoothly; on a coarser one it averages over all positions that a new place covers, where plain
bicubic would look at the sixteen around its middle and skip the rest. The papers leave this open. open_clip and timm
decide likewise; transformers interpolates without antialiasing, and with PyTorch's other bicubic kernel, so that its
numbers at other sizes differ a little from ours.
"""

import torch
import torch.nn.functional as F


def interpolate_positions(embedding: torch.Tensor, grid: int) -> torch.Tensor:
    """Spread learned positions over a finer or coarser grid.

    Parameters
    ----------
    embedding : torch.Tensor
        (G² + 1, D), row by row as the patches are numbered, after one row that is kept as it is.
    grid : int
        G', places along each side of the new grid.

    Returns
    -------
    torch.Tensor
        (G'² + 1, D), in at least float32: what it was computed in.

    Raises
    ------
    ValueError
        If the positions are not those of a square grid.
    """
    first, places = embedding.to(torch.promote_types(embedding.dtype, torch.float32)).split([1, len(embedding) - 1])
    side = round(len(places) ** 0.5)
    if side == 0 or side**2 != len(places):
        raise ValueError(f"expected the positions of a square grid and one more, G² + 1, got {len(embedding)}")
    places = places.T.reshape(1, -1, side, side)  # (G², D) -> (1, D, G, G)
    places = F.interpolate(places, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, places[0].flatten(1).T])  # (1, D, G', G') -> (G'² + 1, D)
