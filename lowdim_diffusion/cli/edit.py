"""``lowdim edit``: local edits of images by the singular vectors of a run's Jacobian."""

import pathlib
import shlex
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowdim_diffusion.cli.config import option
from lowdim_diffusion.cli.errors import CommandError, ExitCode
from lowdim_diffusion.cli.parse import parse_of_run

__all__ = ["EditArguments", "main"]


@dataclass(frozen=True)
class EditArguments:
    """What ``lowdim edit`` is given."""

    run: str = ""
    """Run directory whose model edits, or a pretrained network: a folder of diffusers, or a
    .safetensors file of EDM (required)."""
    out: str | None = None
    """Directory for pictures, page, report and numbers; unset: RUN/edit."""
    data: str | None = None
    """Images to edit, of the size the run was trained on: any path that --data.path takes. Unset:
    the run's own."""
    images: tuple[int, ...] = (0, 1, 2, 3)
    """Which of them, by number."""
    box: tuple[int, ...] | None = None
    """Region to edit: top, left, height, width in pixels. Unset: the middle half."""
    mask: str | None = None
    """Region to edit: a picture (white inside) or .npy, instead of --box."""
    resize_mask: bool = False
    """Bring a mask of another size to that of the images."""
    directions: int = option(4, ge=1)
    """How many directions per image."""
    compose: tuple[int, ...] = ()
    """Directions to add up into one more, by number from 1; a minus sign turns one around."""
    toward: int | None = option(ge=0)
    """Another image, by number: one direction more, that which takes the region towards it."""
    transfer: tuple[int, ...] = ()
    """Further images, by number, to edit along the directions of the first of --images."""
    null_rank: int = option(5, ge=0)
    """Leading directions of the rest of the image to keep clear of; 0 for none."""
    max_iters: int = option(100, ge=1)
    """Bound on the iterations of the search for directions."""
    sigma: float | None = option(gt=0)
    """Noise level (sigma / alpha) at which to edit. Unset: 1.5 times the spread of the data, and 3
    for a pretrained network."""
    strength: float = option(0.2, gt=0)
    """Longest step, in units of sqrt(n) sqrt(alpha^2 + sigma^2)."""
    num_strengths: int = option(9, ge=3)
    """Steps from -strength to +strength."""
    steps: int = option(20, ge=1)
    """Sampler steps between the noise level and the data, each way."""
    seed: int = option(0, ge=0, lt=2**32)
    """Starts the search for directions; draws the random ones."""
    checkpoint: int | None = option(ge=0)
    """Step of the checkpoint; unset takes the newest sound one."""
    average: bool = True
    """Edit with the moving average of the parameters; --no-average takes the last ones."""


_DESCRIPTION = """\
Edit a region of real images: carry them up to a noise level, step along
singular vectors of the denoiser's Jacobian, and sample. No text, no
training. Writes a picture per image, report.html, a page and edits.npz."""
_EXAMPLES = """\
lowdim edit --run runs/demo
lowdim edit --run runs/faces --images 5 17 --box 8 6 6 20 --directions 6
lowdim edit --run runs/faces --mask eyes.png --sigma 3 --out edits
lowdim edit --run runs/faces --compose 1 -2 --toward 9 --transfer 17 30"""


def main(argv: Sequence[str]) -> int:
    """Edit and report; return the exit code."""
    given = parse_of_run(
        EditArguments,
        argv,
        prog="lowdim edit",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    return run(given, argv)


def run(given: EditArguments, argv: Sequence[str] = ()) -> int:
    """Edit and report; return the exit code."""
    import numpy as np

    from lowdim_diffusion.cli import build, editor
    from lowdim_diffusion.cli.loading import check_images, image_shape, load_run

    begin = time.monotonic()
    loaded = load_run(given.run, given.checkpoint)
    config = loaded.model.config
    if loaded.pretrained and given.data is None:
        raise CommandError("--data is needed: the images that a pretrained network is to edit")
    dataset = build.dataset(replace(config.data, path=given.data or config.data.path))
    shape = image_shape(given.run, loaded, "edits are of images")
    check_images(dataset.name, dataset, shape)
    numbers = {"images": given.images, "transfer": given.transfer, "toward": ()}
    numbers["toward"] = () if given.toward is None else (given.toward,)
    for name, index in numbers.items():
        missing = name == "images" and not index
        if missing or not all(0 <= i < dataset.num_examples for i in index):
            raise CommandError(f"--{name}: expected numbers from 0 to {dataset.num_examples - 1}")
    mask = _mask(given, shape)
    out = pathlib.Path(given.out) if given.out else loaded.path / "edit"
    out.mkdir(parents=True, exist_ok=True)
    index = np.asarray([*given.images, *given.transfer])
    labels = None
    if loaded.model.net.num_classes and dataset.labels is not None:
        labels = dataset.labels[index]
    found = editor.edit(
        loaded,
        dataset.floats(index),
        mask,
        labels=labels,
        num_own=len(given.images),
        compose=given.compose,
        toward=None if given.toward is None else dataset.floats([given.toward])[0],
        averaged=given.average,
        sigma=given.sigma,
        num_directions=given.directions,
        null_rank=given.null_rank,
        max_iters=given.max_iters,
        strength=given.strength,
        num_strengths=given.num_strengths,
        num_steps=given.steps,
        seed=given.seed,
    )
    print(
        f"{len(index)} images, {given.directions} directions each at sigma {found.sigma:.3g}, in "
        f"{time.monotonic() - begin:.1f} s: {found.compile_s:.1f} s to compile, "
        f"{found.learn_s:.2g} s to learn from an image, {found.edit_s:.2g} s per picture"
    )
    own = editor.summary(found, slice(found.num_own))
    print(
        f"round trip without an edit: rms {own.round_trip:.3g}\n"
        f"change inside : outside the mask at strength {given.strength:g}: "
        f"{own.inside:.3g} : {own.outside:.3g}, random directions {own.random_inside:.3g} "
        f": {own.random_outside:.3g}"
    )
    if given.transfer:
        moved = editor.summary(found, slice(found.num_own, None))
        print(f"transferred to other images: {moved.inside:.3g} : {moved.outside:.3g}")
    if which := editor.unconverged(found):
        warnings.warn(
            f"the directions of image {', '.join(str(index[i]) for i in which)} had not converged "
            f"in {given.max_iters} iterations (they still turned by "
            f"{found.directions.change.max():.2g}); raise --max-iters",
            stacklevel=2,
        )
    _write_numbers(out / "edits.npz", found, index)
    names = [_name(dataset, i) for i in given.images]
    names += [f"{_name(dataset, i)} along {names[0]}" for i in given.transfer]
    command = " ".join(["lowdim edit", *map(shlex.quote, argv)])
    for path in editor.report(out, found, names=names, command=command):
        print(path)
    return ExitCode.DONE


def _mask(given: EditArguments, shape: tuple[int, ...]) -> Any:
    from lowdim_diffusion.editing import masks

    if given.mask is not None:
        if given.box is not None:
            raise CommandError("--mask and --box both name the region; give one")
        try:
            return masks.from_file(given.mask, shape, resize=given.resize_mask)
        except ValueError as error:
            raise CommandError(str(error).replace("pass resize=True", "--resize-mask")) from None
    height, width = shape[:2]
    box = given.box
    if box is None:
        box = (height // 4, width // 4, max(height // 2, 1), max(width // 2, 1))
    if len(box) != 4:
        raise CommandError(f"--box: expected top left height width, got {len(box)} numbers")
    return masks.box(shape, *box)


def _name(dataset: Any, i: int) -> str:
    if dataset.labels is None:
        return f"image {i}"
    label = int(dataset.labels[i])
    return f"image {i} ({dataset.class_names[label] if dataset.class_names else label})"


def _write_numbers(path: pathlib.Path, found: Any, index: Any) -> None:
    from lowdim_diffusion._files import write_npz

    arrays = {k: v for k, v in found._asdict().items() if k != "directions"}
    arrays |= {f"direction_{k}": v for k, v in found.directions._asdict().items()}
    write_npz(path, {"index": index, **arrays})
