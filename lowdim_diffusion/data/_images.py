"""Pictures in a folder, a zip or a tar: class folders, one size, 8 bits."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lowdim_diffusion.data._dataset import DataError, Dataset, data_error, from_arrays
from lowdim_diffusion.data._files import Member, Source, check_bytes, natural_key

# Only these decoders: others of Pillow start programs (EPS) or see little use and less care.
_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "GIF", "TIFF", "WEBP")
_SUFFIXES = ("png", "jpg", "jpeg", "pgm", "ppm", "pnm", "pbm", "bmp", "gif", "tif", "tiff", "webp")
_SPLITS = ("train", "test", "val", "valid", "validation", "dev")
_MAX_PIXELS = 2**26

Select = Callable[[np.ndarray | None, tuple[str, ...] | None, int], np.ndarray | None]
"""``(labels, class_names, count) -> indices`` of the examples to keep, or None for all."""


def is_image_name(name: str) -> bool:
    """Whether a file's name ends like a picture's and is not a system's leftover."""
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().rpartition(".")[2] in _SUFFIXES


class Listed(NamedTuple):
    """The pictures of a source that are asked for."""

    members: list[Member]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None


def list_images(source: Source, *, split: str | None, select: Select) -> Listed:
    """Return the pictures of a source in natural order of their names, labelled by class folder.

    Folders that hold everything else are stepped over. If the next level is ``train``, ``test``,
    ``val``, one is chosen. If pictures then lie in several folders, each folder is a class, its
    name the class name.
    """
    members = [m for m in source.members if is_image_name(m.name)]
    if not members:
        other = ", ".join(sorted({m.name.rpartition("/")[2] for m in source.members})[:5])
        raise data_error(
            source.path,
            "no data found in it",
            "pictures (png, jpg, pgm, ...), IDX files or CIFAR batches",
            f"files such as {other}" if other else "no files",
        )
    members.sort(key=lambda m: natural_key(m.name))
    keep, labels, names = _layout(source, [m.name.split("/") for m in members], split)
    members = [members[i] for i in keep]
    rows = select(labels, names, len(members))
    if rows is not None:
        members = [members[i] for i in rows]
        labels = None if labels is None else labels[rows]
    return Listed(members, labels, names)


def load_images(
    source: Source,
    *,
    split: str | None,
    select: Select,
    size: tuple[int, int] | None,
    channels: int | None,
    name: str,
) -> Dataset:
    """Return the pictures that :func:`list_images` finds, decoded."""
    members, labels, names = list_images(source, split=split, select=select)
    pictures = _decode_all(source, members, size, channels)
    return from_arrays(pictures, labels, name=name, source=str(source.path), class_names=names)


def _strip_common(paths: list[list[str]]) -> list[list[str]]:
    depth = 0
    while all(len(p) > depth + 1 and p[depth] == paths[0][depth] for p in paths):
        depth += 1
    return [p[depth:] for p in paths]


def _layout(
    source: Source, paths: list[list[str]], split: str | None
) -> tuple[list[int], np.ndarray | None, tuple[str, ...] | None]:
    """Return which paths belong to the split, their labels and the class names.

    Classes are those of all splits together, so that a class has one number everywhere.
    """
    inner = _strip_common(paths)
    outer = {part.lower() for part in paths[0][: len(paths[0]) - len(inner[0])]} & set(_SPLITS)
    tops = {p[0].lower() if len(p) > 1 else "" for p in inner}
    keep = list(range(len(paths)))
    if tops <= set(_SPLITS):
        wanted = (split or "train").lower()
        keep = [i for i in keep if inner[i][0].lower() == wanted]
        inner = _strip_common([p[1:] for p in inner])
        if not keep:
            raise data_error(source.path, "no such split", " or ".join(sorted(tops)), repr(wanted))
    elif split is not None and split not in (outer or {"train"}):
        raise data_error(source.path, f"no split {split!r}", f"a folder {split}/ in it")
    folders = {p[0] for p in inner if len(p) > 1}
    if not folders:
        return keep, None, None
    loose = [p[0] for p in inner if len(p) == 1]
    if loose:
        raise data_error(
            source.path,
            "pictures beside class folders",
            "all pictures in class folders, or none",
            f"{loose[0]!r} beside {min(folders)!r}",
            "move it, or give one folder",
        )
    names = tuple(sorted(folders, key=natural_key))
    number = {name: i for i, name in enumerate(names)}
    return keep, np.array([number[inner[i][0]] for i in keep], np.int32), names


def _decode_all(
    source: Source, members: list[Member], size: tuple[int, int] | None, channels: int | None
) -> np.ndarray:
    """Return uint8 ``[N, h, w, c]``: read as stored, placed in the order of ``members``."""
    place = {id(member): i for i, member in enumerate(members)}
    stored = [member for member in source.members if id(member) in place]
    out: np.ndarray | None = None
    first = ""
    for member in stored:
        where = f"{source.path}: {member.name}"
        picture = decode(where, source.read(member), size, channels)
        if out is None:
            first, shape = member.name, picture.shape
            check_bytes(
                source.path,
                len(members) * picture.size,
                source.limit,
                "pass num_examples=, a smaller size=, or max_bytes=",
            )
            out = np.empty((len(members), *shape), np.uint8)
        elif picture.shape != out.shape[1:]:
            sizes = _shape(out.shape[1:]), _shape(picture.shape)
            resize, convert = "resize with size= (--data.size)", "convert with channels=1 or 3"
            hint = resize if picture.shape[:2] != out.shape[1:3] else convert
            got = f"{first} is {sizes[0]}, {member.name} is {sizes[1]}"
            raise data_error(source.path, "pictures differ", "one shape", got, hint)
        out[place[id(member)]] = picture
    assert out is not None  # members is never empty
    return out


def _shape(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]} {'grey' if shape[2] == 1 else 'colour'} (rows x columns)"


def _pillow(where: Any) -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        hint = 'pip install "lowdim-diffusion[data]"'
        raise data_error(where, "reading pictures needs Pillow", fix=hint) from error
    return Image


def decode(
    where: Any, content: bytes, size: tuple[int, int] | None, channels: int | None
) -> np.ndarray:
    """Return one picture as uint8 ``[h, w, c]``, upright; transparency is dropped."""
    image_module = _pillow(where)
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            image = image_module.open(io.BytesIO(content), formats=_FORMATS)
        width, height = image.size
        if width * height > _MAX_PIXELS:
            raise data_error(
                where, "picture too large", f"at most {_MAX_PIXELS} pixels", width * height
            )
        if image.mode.startswith("I"):
            image = _to_8_bit(image_module, where, image)
        grey = image.mode in ("1", "L", "LA") if channels is None else channels == 1
        image = ImageOps.exif_transpose(image.convert("L" if grey else "RGB"))
    except DataError:
        raise
    except (image_module.DecompressionBombError, image_module.DecompressionBombWarning) as error:
        raise data_error(where, f"picture too large ({error})") from error
    # Pillow's decoders raise whatever they stumble over; every such picture is damaged.
    except Exception as error:
        reason = re.sub(r"\s*<_io[^>]*>", "", f"{type(error).__name__}: {error}")
        raise data_error(where, f"damaged picture ({reason})", fix="fetch it again") from error
    if size is not None:
        image = fit(image, size)
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def _to_8_bit(image_module: Any, where: Any, image: Any) -> Any:
    """Return a 16-bit grey picture in 8 bits: ``v / 257`` rounded."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise data_error(where, "unfit grey levels", "8 or 16 bits", f"up to {values.max()}")
    return image_module.fromarray(((values + 128) // 257).astype(np.uint8))


def fit(image: Any, size: tuple[int, int]) -> Any:
    """Return a Pillow picture cut to the middle in the proportions of ``size``, resized."""
    height, width = size
    if (image.width, image.height) == (width, height):
        return image
    scale = min(image.width / width, image.height / height)
    cut_width, cut_height = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = (image.width - cut_width) // 2, (image.height - cut_height) // 2
    middle = image.crop((left, top, left + cut_width, top + cut_height))
    return middle.resize((width, height), _pillow("size").Resampling.BICUBIC)


def convert_pictures(
    where: Any, images: np.ndarray, size: tuple[int, int] | None, channels: int | None
) -> np.ndarray:
    """Return uint8 pictures ``[N, h, w, c]`` cut and resized, grey (1) or colour (3)."""
    size = None if size == images.shape[1:3] else size
    channels = None if channels == images.shape[3] else channels
    if size is None and channels is None:
        return images
    if channels is not None and images.shape[3] not in (1, 3):
        raise data_error(where, "cannot change channels", "1 or 3 of them", images.shape[3])
    image_module = _pillow(where)
    return np.stack(list(_converted(image_module, images, size, channels)))


def _converted(
    image_module: Any, images: np.ndarray, size: tuple[int, int] | None, channels: int | None
) -> Iterator[np.ndarray]:
    for picture in images:
        image = image_module.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
        if channels is not None:
            image = image.convert("L" if channels == 1 else "RGB")
        array = np.asarray(image if size is None else fit(image, size))
        yield array[..., None] if array.ndim == 2 else array
