"""Preprocessing: a picture of any size and mode becomes the normalised square that the image towers read.

Source: CLIP's release, whose five steps these are, run there by torchvision and here by Pillow alone, to the same bits.
The paper says only that training cropped a random square of the resized picture (CLIP §2.3).

    picture  (W, H), any mode
      │  Resize                    bicubic, short side to R
      │  CenterCrop                (R, R)
      │  _convert_image_to_rgb     only now: transparent, palette and 16-bit pixels were resized before, in their way
      │  ToTensor                  (3, R, R), [0, 1]
      │  Normalize                 (pixel - CLIP_MEAN) / CLIP_STD
    image  (3, R, R), float32

Some models of others were trained on pictures squashed to (R, R) with nothing cut off, or with another mean and
deviation.

Tensors take the same five steps, so a generated picture can be scored with gradients. On eight photographs of
scikit-image at R = 224 and 336, measured before `Normalize` in grey levels (1/255) against the Pillow path:

    tensor    mean      max
    uint8     0.0003    1       resized in two passes of whole levels, as Pillow does it
    float     0.27      26      linear in the pixels: neither rounded nor clipped, so it overshoots at hard edges
"""

import math
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.nn import functional as F

# Mean and standard deviation of red, green and blue in [0, 1], measured on the training pictures (openai/CLIP issue
# 20); they are near ImageNet's, not equal to them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What the names of picture files end in; of two pictures in one sample of a tar shard, the earlier here is taken.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")

# A sliver such as 1 x 60000 grows to 13 million rows when its short side becomes 224: refuse beyond a gigabyte.
MAX_RESIZED_PIXELS = 2**28


class ImageError(ValueError):
    """A picture could not be read; the message names the file, or its place in the batch."""


class Preprocess:
    """The released preprocessing: resize, center crop, to RGB, to tensor, normalise.

    Parameters
    ----------
    input_resolution : int
        R, the side in pixels of the square that the model reads (`model.visual.input_resolution`).
    mean, std : tuple of three float
        Of red, green and blue in [0, 1].
    resize : str
        "shortest": the short side becomes R, and the middle is cut out. "squash": both sides become R.

    Attributes
    ----------
    transforms : list of callables
        The five steps in order. Each takes what the one before returned; replace, remove or insert steps at will.

    Examples
    --------
    >>> preprocess = Preprocess(224)
    >>> preprocess(Image.new("RGBA", (640, 480))).shape
    torch.Size([3, 224, 224])
    """

    def __init__(
        self,
        input_resolution: int,
        mean: tuple[float, float, float] = CLIP_MEAN,
        std: tuple[float, float, float] = CLIP_STD,
        resize: str = "shortest",
    ):
        if resize not in ("shortest", "squash"):
            raise ValueError(f'resize must be "shortest" or "squash", got {resize!r}')
        self.transforms = [
            Resize(input_resolution if resize == "shortest" else (input_resolution, input_resolution)),
            CenterCrop(input_resolution),
            _convert_image_to_rgb,
            ToTensor(),
            Normalize(mean, std),
        ]

    def __call__(self, picture: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Run the steps on one picture.

        Parameters
        ----------
        picture : PIL.Image.Image, numpy.ndarray or torch.Tensor
            A Pillow picture of any size and mode; its EXIF orientation is left alone, as in the release (`open_image`
            applies it). Or a uint8 array that `Image.fromarray` reads: (H, W), (H, W, 3) or (H, W, 4). Or a tensor
            (..., 3, H, W), uint8 in [0, 255] or floating point in [0, 1], on any device; gradients flow through
            the latter.

        Returns
        -------
        torch.Tensor
            float32 of shape (3, R, R), or (..., 3, R, R) for a tensor.

        Raises
        ------
        TypeError
            If the picture, or the dtype of a tensor, is none of these.
        ValueError
            If it has no pixels, the wrong shape, or floats far outside [0, 1].
        """
        for step in self.transforms:
            picture = step(picture)
        return picture

    def batch(
        self, pictures: Iterable[str | os.PathLike | Image.Image | np.ndarray | torch.Tensor], workers: int = 2
    ) -> torch.Tensor:
        """Run the steps on many pictures at once, on threads (Pillow decodes and resizes outside Python's lock).

        Parameters
        ----------
        pictures : iterable
            What `__call__` takes, or paths, which `open_image` reads.
        workers : int
            The number of threads.

        Returns
        -------
        torch.Tensor
            float32 of shape (N, 3, R, R), equal to the pictures preprocessed one by one and stacked.

        Raises
        ------
        ImageError
            If a picture fails; the message starts with its index, and `__cause__` is the error it gave.
        """
        if isinstance(pictures, str):
            raise TypeError(f"expected several pictures, got one path: use batch([{pictures!r}])")
        pictures = list(pictures)
        if not pictures:
            raise ValueError("expected at least one picture, got none")
        # Pillow decodes at first use, and two threads decoding one picture would spoil it.
        decoding = {id(picture): threading.Lock() for picture in pictures}

        def run(index: int) -> torch.Tensor:
            picture = pictures[index]
            try:
                if isinstance(picture, str | os.PathLike):
                    picture = open_image(picture)
                elif isinstance(picture, Image.Image):
                    with decoding[id(picture)]:
                        picture.load()
                return self(picture)
            except Exception as error:
                raise ImageError(f"picture {index}: {error}") from error

        with ThreadPoolExecutor(workers) as pool:
            return torch.stack(list(pool.map(run, range(len(pictures)))))

    def __repr__(self) -> str:
        steps = (getattr(step, "__name__", None) or repr(step) for step in self.transforms)
        return "\n".join(["Preprocess(", *(f"    {step}" for step in steps), ")"])


class Resize(nn.Module):
    """Bicubic resize with antialiasing.

    Parameters
    ----------
    size : int or (int, int)
        The length of the short side in pixels, the other following in proportion (rounded down); or (height, width).
    """

    def __init__(self, size: int | tuple[int, int]):
        super().__init__()
        self.size = size

    @property
    def interpolation(self) -> Image.Resampling:
        """Always bicubic, as in the release."""
        return Image.Resampling.BICUBIC

    def forward(self, picture: Image.Image | np.ndarray | torch.Tensor) -> Image.Image | torch.Tensor:
        """Resize a picture (or an array, as one) in its own mode, or a tensor (..., C, H, W) in its own dtype."""
        if isinstance(picture, torch.Tensor):
            return self._resize_tensor(picture)
        if isinstance(picture, np.ndarray):
            picture = _picture_of_array(picture)
        if not isinstance(picture, Image.Image):
            raise TypeError(
                f"expected a PIL picture, a uint8 array or a tensor, got {type(picture).__name__}; "
                "open a file with clip.preprocess.open_image, and give several pictures to preprocess.batch"
            )
        height, width = self._new_size(picture.height, picture.width)
        return picture.resize((width, height), self.interpolation)

    def extra_repr(self) -> str:
        return f"size={self.size}, interpolation={self.interpolation.name.lower()}"

    def _new_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize: `_new_size(300, 400)` is (224, 298) for size 224."""
        if min(height, width) < 1:
            raise ValueError(f"expected a picture with pixels, got one of {width} x {height}")
        if not isinstance(self.size, int):
            new_height, new_width = self.size
        elif width <= height:
            new_height, new_width = int(self.size * height / width), self.size
        else:
            new_height, new_width = self.size, int(self.size * width / height)
        if new_height * new_width > MAX_RESIZED_PIXELS:
            raise ValueError(
                f"a picture of {width} x {height} would be resized to {new_width} x {new_height}, more than "
                f"{MAX_RESIZED_PIXELS} pixels: crop it to a wider shape first"
            )
        return new_height, new_width

    def _resize_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Resize (..., C, H, W); half precision is computed in float32 and rounded back."""
        if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
            raise TypeError(f"expected a tensor of uint8 or floating point, got {tensor.dtype}")
        if tensor.ndim < 3:
            raise ValueError(f"expected a tensor of shape (..., 3, H, W), got {tuple(tensor.shape)}")
        *leading, channels, height, width = tensor.shape
        new_height, new_width = self._new_size(height, width)
        pixels = tensor.reshape(math.prod(leading), channels, height, width)
        pixels = pixels.to(torch.promote_types(tensor.dtype, torch.float32))
        if tensor.dtype == torch.uint8:  # as Pillow: first across, then down, whole levels in between
            pixels = _whole_levels(_bicubic(pixels, height, new_width))
            pixels = _whole_levels(_bicubic(pixels, new_height, new_width))
        else:
            pixels = _bicubic(pixels, new_height, new_width)
        return pixels.to(tensor.dtype).reshape(*leading, channels, new_height, new_width)


class CenterCrop(nn.Module):
    """Cut out the middle; where the picture is smaller than the crop, zeros surround it.

    Parameters
    ----------
    size : int or (int, int)
        The side of a square in pixels, or (height, width).
    """

    def __init__(self, size: int | tuple[int, int]):
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, picture: Image.Image | torch.Tensor) -> Image.Image | torch.Tensor:
        """Crop a picture, or a tensor (..., H, W)."""
        new_height, new_width = (self.size, self.size) if isinstance(self.size, int) else self.size
        if isinstance(picture, torch.Tensor):
            height, width = picture.shape[-2:]
        else:
            width, height = picture.size
        top, left = _margin(height, new_height), _margin(width, new_width)
        bottom, right = top + new_height, left + new_width
        if isinstance(picture, torch.Tensor):
            return F.pad(picture, (-left, right - width, -top, bottom - height))  # negative padding crops
        return picture.crop((left, top, right, bottom))

    def extra_repr(self) -> str:
        return f"size={self.size}"


def _convert_image_to_rgb(image: Image.Image | torch.Tensor) -> Image.Image | torch.Tensor:
    """Drop transparency, look up palettes, spread grey over three channels (the name is the release's).

    A tensor is taken to be RGB already; `Normalize` refuses it otherwise.
    """
    return image if isinstance(image, torch.Tensor) else image.convert("RGB")


class ToTensor(nn.Module):
    """Pixels as float32 in [0, 1], channels first."""

    def forward(self, picture: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
        """A picture (W, H) or an array (H, W, C) becomes (C, H, W), a tensor (..., C, H, W) keeps its shape.

        8-bit and 1-bit pixels are scaled to [0, 1]. Wider ones (modes I, I;16 and F) have no common scale and keep
        their values and dtype. A floating-point tensor counts as scaled.
        """
        if isinstance(picture, torch.Tensor):
            return _scaled_tensor(picture)
        if not isinstance(picture, Image.Image | np.ndarray):
            raise TypeError(f"expected a PIL picture, an array or a tensor, got {type(picture).__name__}")
        pixels = torch.from_numpy(np.array(picture))
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        pixels = pixels.permute(2, 0, 1).contiguous()  # (H, W, C) -> (C, H, W)
        if pixels.dtype == torch.uint8:
            return pixels.to(torch.float32).div(255)
        return pixels.to(torch.float32) if pixels.dtype == torch.bool else pixels


class Normalize(nn.Module):
    """Subtract `mean` and divide by `std`, channel by channel.

    Parameters
    ----------
    mean, std : sequence of float
        One value per channel.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.mean = mean
        self.std = std

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Normalise a floating-point tensor (..., C, H, W) in its own dtype."""
        if not tensor.is_floating_point():
            raise TypeError(f"expected a floating-point tensor, got {tensor.dtype}: apply ToTensor first")
        mean, std = (
            torch.as_tensor(values, dtype=tensor.dtype, device=tensor.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        if tensor.ndim < 3 or len(mean) not in (1, tensor.shape[-3]):
            raise ValueError(f"expected a tensor of shape (..., {len(mean)}, H, W), got {tuple(tensor.shape)}")
        return (tensor - mean) / std

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


def open_image(path: str | os.PathLike, draft: int | None = None) -> Image.Image:
    """Read a picture from a file: whole, upright, and in its own mode.

    `Image.open` alone reads only the header, and leaves photographs taken sideways on their side. Of an animated or
    many-paged file this is the first frame.

    Parameters
    ----------
    path : str or os.PathLike
        A file in any format that Pillow reads by itself; not EPS, which is a program.
    draft : int, optional
        Decode a JPEG at a half, a quarter or an eighth of its size, as long as its shorter side keeps this many pixels.
        With twice the model's side, reading and preprocessing 1920 x 1080 pixels takes half the time, and the pixels
        that the model sees differ by less than 0.5 of 255 on average (`python -m benchmarks preprocess`).

    Returns
    -------
    PIL.Image.Image
        The decoded picture, turned as its EXIF orientation says; the file is closed.

    Raises
    ------
    ImageError
        If the file is missing, no picture, cut short, or larger than Pillow's `Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with Image.open(path) as picture:
            limit = Image.MAX_IMAGE_PIXELS  # Pillow itself only warns up to twice this
            if limit is not None and picture.width * picture.height > limit:
                raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels are more than {limit}")
            if picture.format == "EPS":
                raise UnidentifiedImageError("decoding it would run Ghostscript on a program in the file")
            if draft is not None:
                picture.draft(None, (draft, draft))
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError(f"{os.fspath(path)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What went wrong with a file, in words for the person who gave it."""
    if isinstance(error, UnidentifiedImageError):
        return "empty, or not in a picture format that Pillow reads by itself"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"too large to decode safely ({error})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"truncated or damaged ({error})"


def _picture_of_array(array: np.ndarray) -> Image.Image:
    """The Pillow picture of a uint8 array (H, W), (H, W, 3) or (H, W, 4)."""
    if array.dtype != np.uint8 or array.shape[2:] not in ((), (3,), (4,)) or array.ndim < 2:
        raise TypeError(
            f"expected a uint8 array of shape (H, W), (H, W, 3) or (H, W, 4), got {array.dtype} of shape "
            f"{array.shape}; floats in [0, 1] and channels-first pixels go in as a tensor (..., 3, H, W)"
        )
    return Image.fromarray(array)


def _scaled_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A uint8 or floating-point tensor as float32 in [0, 1]."""
    if tensor.dtype == torch.uint8:
        return tensor.to(torch.float32).div(255)
    if not tensor.is_floating_point():
        raise TypeError(f"expected a tensor of uint8 in [0, 255] or floats in [0, 1], got {tensor.dtype}")
    if tensor.numel():
        low, high = tensor.detach().aminmax()
        # Bicubic weights reach below zero: pixels in [0, 1] may come out of Resize within [-0.31, 1.31].
        if not (low > -0.5 and high < 1.5):
            raise ValueError(f"expected floats in [0, 1], got values from {low:.4g} to {high:.4g} after the resize")
    return tensor.to(torch.float32)


def _bicubic(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(N, C, H, W) -> (N, C, height, width), with the kernel Pillow uses."""
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)


def _whole_levels(pixels: torch.Tensor) -> torch.Tensor:
    """Rounded half up and clipped to 0..255."""
    return (pixels + 0.5).floor().clamp(0, 255)


def _margin(side: int, new_side: int) -> int:
    """Where a centered crop begins, negative if it must be padded; halves go to the even neighbour, as in the release.

    `_margin(227, 224)` is 2, `_margin(225, 224)` is 0, `_margin(1, 4)` is -1.
    """
    return round((side - new_side) / 2) if side >= new_side else -((new_side - side) // 2)
