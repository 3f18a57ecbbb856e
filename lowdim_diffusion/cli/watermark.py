"""``lowdim watermark embed|detect``: mark images with a run's model, and find the mark again."""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lowdim_diffusion.cli import tables
from lowdim_diffusion.cli.config import option
from lowdim_diffusion.cli.errors import CommandError, ExitCode
from lowdim_diffusion.cli.parse import parse_of_run, wants_help

__all__ = ["DetectArguments", "EmbedArguments", "main"]


@dataclass(frozen=True)
class EmbedArguments:
    """What ``lowdim watermark embed`` is given."""

    run: str = ""
    """Run directory whose model marks, or a pretrained network (required)."""
    images: str | None = None
    """Images to mark, of the size the run was trained on: any path that --data.path takes. Unset:
    the run's own."""
    num_images: int | None = option(ge=1)
    """So many, the first ones; unset: all of --images, 16 of the run's own."""
    out: str | None = None
    """Directory for images, table and key; unset: RUN/watermark."""
    key: str | None = None
    """Key file to use again; unset: a new key from --seed, in OUT/key.json. Keep it secret."""
    seed: int | None = option(ge=0, lt=2**32)
    """Seed of a new key; unset: from the system."""
    message: str = ""
    """Text for the key to carry, 8 bits per letter (UTF-8)."""
    pattern: Literal["noise", "rings"] = "noise"
    """What the key looks like in the Fourier transform."""
    band: Literal["high", "low"] = "high"
    """High frequencies change the image least, low ones bear blur and JPEG."""
    radius: float | None = option(gt=0)
    """How far the key reaches, in frequencies; unset: 1/8 of the shorter side, but 3 at least."""
    channels: tuple[int, ...] = ()
    """Channels that carry it, from 0; unset: all."""
    strength: float = option(1.0, gt=0)
    """Amplitude in units of the noise that it replaces."""
    sigma: float | None = option(gt=0)
    """Noise level (sigma / alpha) at which to mark. Unset: 2/3 of the spread of the data."""
    last_sigma: float = option(0.1, gt=0)
    """Noise that marked images are to bear; less changes them less."""
    steps: int = option(20, ge=1)
    """Sampler steps between the noise level and the data, each way."""
    batch_size: int = option(64, ge=1)
    """Images at once."""
    checkpoint: int | None = option(ge=0)
    """Step of the checkpoint; unset takes the newest sound one."""
    average: bool = True
    """Use the moving average of the parameters; --no-average takes the last ones."""


@dataclass(frozen=True)
class DetectArguments:
    """What ``lowdim watermark detect`` is given."""

    run: str = ""
    """Run directory whose model marked them (required)."""
    images: str | None = None
    """Images to look at: any path that --data.path takes; unset: RUN/watermark/images."""
    key: str | None = None
    """Key file that 'embed' wrote; unset: RUN/watermark/key.json."""
    max_fpr: float = option(0.01, ge=0, le=1)
    """Share of unmarked images that may be called marked."""
    clean: str | None = None
    """Unmarked images of the same kind, to set the threshold by; unset: by the p-value."""
    format: tables.Format = "table"
    """How to print."""
    out: str | None = None
    """File to write as .csv or .json as well."""
    batch_size: int = option(64, ge=1)
    """Images at once."""
    checkpoint: int | None = option(ge=0)
    """Step of the checkpoint; unset takes the newest sound one."""
    average: bool = True
    """Use the moving average of the parameters; --no-average takes the last ones."""


_USAGE = """\
usage: lowdim watermark embed --run DIR [--images PATH] [--OPTION VALUE ...]
       lowdim watermark detect --run DIR [--images PATH] [--key FILE] ...

Hide a secret pattern in images where the run's model sees noise (Shallow
Diffuse), and tell by a key whether an image carries it: with a p-value, after
noise or compression too.

  embed          mark images; writes them, key.json and table.csv
  detect         say of each image how likely it is unmarked

  -h, --help     after embed or detect: its options

examples
  lowdim watermark embed --run runs/demo --num-images 16
  lowdim watermark embed --run runs/faces --images photos --message "(c) me"
  lowdim watermark detect --run runs/demo
  lowdim watermark detect --run runs/faces --images found --key key.json
"""
_EMBED = """\
Mark images: carry them up to a noise level, write a key into a few entries of
their Fourier transform, and sample them again. Writes OUT/images/*.png, images
as watermarked.npz, table.csv with PSNR, SSIM and p-values, and key.json."""
_EMBED_EXAMPLES = """\
lowdim watermark embed --run runs/demo
lowdim watermark embed --run runs/faces --images photos --out marked
lowdim watermark embed --run runs/faces --images photos --message "(c) me"
lowdim watermark embed --run runs/faces --images more --key marked/key.json"""
_DETECT = """\
Look for the key in images: p-value (the chance that an unmarked image agrees
with it as well), eta (0 for a perfect match), and yes or no."""
_DETECT_EXAMPLES = """\
lowdim watermark detect --run runs/demo
lowdim watermark detect --run runs/faces --images found --key marked/key.json
lowdim watermark detect --run runs/faces --images found --clean photos"""


def main(argv: Sequence[str]) -> int:
    """Mark or look; return the exit code."""
    action = argv[0] if argv else ""
    if action not in ("embed", "detect"):
        if wants_help(argv):
            print(_USAGE, end="")
            return ExitCode.DONE
        got = repr(action) if action else "nothing"
        raise CommandError(f"expected 'embed' or 'detect', got {got}; lowdim watermark --help")
    if action == "embed":
        given = parse_of_run(
            EmbedArguments,
            argv[1:],
            prog="lowdim watermark embed",
            description=_EMBED,
            examples=_EMBED_EXAMPLES,
        )
        return embed(given)
    given = parse_of_run(
        DetectArguments,
        argv[1:],
        prog="lowdim watermark detect",
        description=_DETECT,
        examples=_DETECT_EXAMPLES,
    )
    return detect(given)


def embed(given: EmbedArguments) -> int:
    """Mark images and write them; return the exit code."""
    import numpy as np

    from lowdim_diffusion import data, editing, reporting
    from lowdim_diffusion._files import write_atomic, write_npz
    from lowdim_diffusion.cli.loading import image_shape, load_run
    from lowdim_diffusion.safety import watermark

    begin = time.monotonic()
    loaded = load_run(given.run, given.checkpoint)
    shape = image_shape(given.run, loaded, "watermarks are for images")
    out = pathlib.Path(given.out) if given.out else loaded.path / "watermark"
    key = _new_key(given, loaded, shape) if given.key is None else read_key(given.key)
    _check_fits(given.key, key, shape)
    images = loaded.model.config.data.path if given.images is None else given.images
    limit = given.num_images or (16 if given.images is None else None)
    x = _images(loaded, images, shape, limit)
    model = _Tools(loaded, key, given.average, given.batch_size)
    marked = model.mark(x)
    if not np.all(np.isfinite(marked)):
        raise CommandError("the marked images hold NaN or infinity; lower --strength")
    pictures = shape[-1] in (1, 3)
    stored = data.to_uint8(marked) if pictures else marked.astype(np.float32)
    seen = data.from_uint8(stored) if pictures else stored
    before, after = (watermark.match(model.carry(a), key.mark) for a in (x, seen))
    size = min(11, min(shape[:2]) - (min(shape[:2]) + 1) % 2)
    ssim = editing.ssim(x, seen, window=size) if size >= 3 else np.full(len(x), np.nan)
    psnr = editing.round_trip_error(x, seen).psnr
    rows = [
        {
            "image": f"{i:04d}",
            "psnr": float(psnr[i]),
            "ssim": float(ssim[i]),
            "eta": float(after.eta[i]),
            "p_value": float(after.p_value[i]),
            "p_value_before": float(before.p_value[i]),
        }
        for i in range(len(x))
    ]
    (out / "images").mkdir(parents=True, exist_ok=True)
    file = out / "key.json" if given.key is None else pathlib.Path(given.key)
    if given.key is None:
        write_atomic(file, key.to_json())
    write_npz(out / "watermarked.npz", {"x": stored})
    if pictures:
        for path in (out / "images").glob("[0-9][0-9][0-9][0-9].png"):
            path.unlink()  # of an earlier, larger batch
        for row, picture in zip(rows, stored, strict=True):
            write_atomic(out / "images" / f"{row['image']}.png", reporting.png(picture))
    write_atomic(out / "table.csv", tables.render(rows, "csv"))
    found = np.mean([row["p_value"] < 0.01 for row in rows])
    print(
        f"{len(x)} images marked at sigma {key.sigma:.3g} in {time.monotonic() - begin:.1f} s: "
        f"PSNR {np.mean(psnr):.1f} dB, SSIM {np.mean(ssim):.3f}\n"
        f"{found:.0%} found at p < 0.01, {np.mean(before.p_value < 0.01):.0%} before marking"
    )
    print(f"images  {out / ('images' if pictures else 'watermarked.npz')}")
    print(f"table   {out / 'table.csv'}\nkey     {file}  (keep it secret)")
    return ExitCode.DONE


def detect(given: DetectArguments) -> int:
    """Say of each image whether it is marked; return the exit code."""
    import numpy as np

    from lowdim_diffusion._files import write_atomic
    from lowdim_diffusion.cli.loading import image_shape, load_run
    from lowdim_diffusion.safety import watermark

    kind = pathlib.Path(given.out).suffix if given.out else ".csv"
    if kind not in (".csv", ".json"):
        raise CommandError(f"--out {given.out}: the table is written as .csv or .json")
    loaded = load_run(given.run, given.checkpoint)
    shape = image_shape(given.run, loaded, "watermarks are for images")
    folder = loaded.path / "watermark"
    key_file = given.key or str(folder / "key.json")
    key = read_key(key_file)
    _check_fits(key_file, key, shape)
    model = _Tools(loaded, key, given.average, given.batch_size)
    x_t = model.carry(_images(loaded, given.images or str(folder / "images"), shape, None))
    found = watermark.match(x_t, key.mark)
    scores, limit = -np.asarray(found.p_value, np.float64), -given.max_fpr
    if given.clean is not None:
        clean = watermark.match(model.carry(_images(loaded, given.clean, shape, None)), key.mark)
        if len(clean.eta) * given.max_fpr < 1:
            print(
                f"lowdim watermark: warning: {len(clean.eta)} clean images are few for "
                f"--max-fpr {given.max_fpr:g}: the threshold is their best score",
                file=sys.stderr,
            )
        scores, limit = (
            np.asarray(found.cosine, np.float64),
            watermark.threshold(clean.cosine, given.max_fpr),
        )
    marked = scores > limit
    texts = key.texts(x_t)
    rows = [
        {
            "image": i,
            "p_value": float(found.p_value[i]),
            "cosine": float(found.cosine[i]),
            "eta": float(found.eta[i]),
            "marked": "yes" if marked[i] else "no",
            **({} if texts is None else {"message": texts[i]}),
        }
        for i in range(len(marked))
    ]
    tables.write(rows, given.format)
    if given.out:
        text = tables.render(rows, "json" if kind == ".json" else "csv")
        write_atomic(pathlib.Path(given.out), text)
    if given.format in ("table", "plain"):
        by = f"p < {given.max_fpr:g}" if given.clean is None else f"cosine > {limit:.3g}"
        print(f"{marked.sum()} of {len(marked)} marked ({by})")
    return ExitCode.DONE


# ---- the key ------------------------------------------------------------------------------------


class KeyFile(NamedTuple):
    """A mark and where it is to be looked for."""

    mark: Any
    sigma: float
    last_sigma: float
    steps: int
    message: str

    def to_json(self) -> str:
        """Return the file's text."""
        mark = self.mark
        about = {
            "format": 1,
            "shape": mark.shape,
            "radius": mark.radius,
            "channels": mark.channels,
            "band": mark.band,
            "pattern": mark.pattern,
            "sigma": self.sigma,
            "last_sigma": self.last_sigma,
            "steps": self.steps,
            "message": self.message,
            "values": [float(f"{value:.7g}") for value in mark.values],
        }
        return json.dumps(about, indent=1) + "\n"

    def texts(self, x_t: Any) -> list[str] | None:
        """Return the messages in images at the key's noise level; None for a key without one."""
        if not self.message:
            return None
        import numpy as np

        from lowdim_diffusion.safety import watermark

        bits = _bits(self.message)
        plain = watermark.turn_signs(self.mark, bits)
        read = np.packbits(np.asarray(watermark.decode(x_t, plain, len(bits))), axis=1)
        return ["".join(_shown(c) for c in row.tobytes().decode(errors="replace")) for row in read]


def _shown(letter: str) -> str:
    return letter if letter.isprintable() else "\ufffd"


def _bits(message: str) -> list[int]:
    import numpy as np

    return np.unpackbits(np.frombuffer(message.encode(), np.uint8)).tolist()


def read_key(path: str) -> KeyFile:
    """Return the key in a file that ``lowdim watermark embed`` wrote.

    Raises:
        CommandError: if there is none, or it does not fit together.
    """
    import jax.numpy as jnp
    import numpy as np

    from lowdim_diffusion.safety import watermark

    file = pathlib.Path(path)
    if not file.is_file():
        raise CommandError(f"no key file {path} ('lowdim watermark embed' writes one)")
    try:
        about = json.loads(file.read_bytes())
        if about["format"] != 1:
            raise CommandError(f"{path}: a key of format {about['format']!r}, only 1 is known")
        values = np.asarray(about["values"], np.float32)
        mark = watermark.Mark(
            jnp.asarray(values),
            tuple(map(int, about["shape"])),
            float(about["radius"]),
            tuple(map(int, about["channels"])),
            about["band"],
            about["pattern"],
        )
        key = KeyFile(
            mark,
            float(about["sigma"]),
            float(about["last_sigma"]),
            int(about["steps"]),
            str(about["message"]),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CommandError(f"{path} is not a key: {reason}") from None
    sound = np.isfinite(values).all() and values.any() and len(_bits(key.message)) <= values.size
    if not (sound and key.steps > 0 and 0 < key.sigma and 0 < key.last_sigma):
        raise CommandError(f"{path} is not a key: its numbers make no sense")
    return key


def _new_key(given: EmbedArguments, loaded: Any, shape: tuple[int, ...]) -> KeyFile:
    import secrets

    import jax

    from lowdim_diffusion.safety import watermark

    schedule = loaded.model.schedule
    spread = loaded.model.config.loss.data_std or 1.0
    sigma = float(f"{2 * spread / 3:.3g}") if given.sigma is None else given.sigma
    seed = secrets.randbits(32) if given.seed is None else given.seed
    mark = watermark.make_mark(
        jax.random.key(seed),
        shape,
        radius=given.radius,
        channels=given.channels or None,
        band=given.band,
        pattern=given.pattern,
        scale=given.strength * float(schedule.sigma(_time(schedule, sigma))),
        message=_bits(given.message) if given.message else None,
    )
    return KeyFile(mark, sigma, given.last_sigma, given.steps, given.message)


def _time(schedule: Any, sigma: float) -> float:
    from lowdim_diffusion import schedules

    low, high = (
        float(schedules.noise_levels(schedule, t)) for t in (schedule.t_min, schedule.t_max)
    )
    if not low < sigma < high:
        raise CommandError(
            f"--sigma {sigma:g}: the schedule's noise levels go from {low:.3g} to {high:.3g}"
        )
    return float(schedules.times_from_sigmas(schedule, sigma))


# ---- images -------------------------------------------------------------------------------------


class _Tools:
    """What a run's model does to images, in blocks of one size."""

    def __init__(self, loaded: Any, key: KeyFile, average: bool, batch_size: int) -> None:
        import jax

        from lowdim_diffusion.cli import build
        from lowdim_diffusion.safety import watermark

        model, self._size = loaded.model, batch_size
        self._params = loaded.averaged if average else loaded.params
        t = _time(model.schedule, key.sigma)
        ts = watermark.grid(model.schedule, t, num_steps=key.steps, sigma_min=key.last_sigma)
        denoise = lambda params: build.denoiser(model, params)
        self._mark = jax.jit(
            lambda p, x: watermark.embed(denoise(p), model.schedule, ts, x, key.mark)
        )
        self._carry = jax.jit(lambda p, x: watermark.recover(denoise(p), model.schedule, ts, x))

    def mark(self, x: Any) -> Any:
        """Return images with the mark."""
        return self._in_blocks(self._mark, x)

    def carry(self, x: Any) -> Any:
        """Return images at the key's noise level."""
        import jax.numpy as jnp

        return jnp.asarray(self._in_blocks(self._carry, x))

    def _in_blocks(self, fn: Callable, x: Any) -> Any:
        import numpy as np

        size = min(self._size, len(x))
        parts = []
        for i in range(0, len(x), size):
            block = x[i : i + size]
            short = size - len(block)
            block = np.pad(block, ((0, short), (0, 0), (0, 0), (0, 0)), mode="edge")
            parts.append(np.asarray(fn(self._params, block))[: size - short])
        return np.concatenate(parts)


def _check_fits(path: str | None, key: KeyFile, shape: tuple[int, ...]) -> None:
    if key.mark.shape != shape:
        have, want = ("x".join(map(str, s)) for s in (key.mark.shape, shape))
        raise CommandError(f"{path}: a key for images of {have}, and the run's are {want}")


def _images(loaded: Any, path: str, shape: tuple[int, ...], limit: int | None) -> Any:
    from lowdim_diffusion import data
    from lowdim_diffusion.cli import build
    from lowdim_diffusion.cli.loading import check_images

    if not path:
        raise CommandError("--images is needed: a pretrained network has no images of its own")
    own = path == loaded.model.config.data.path
    if own:
        dataset = build.dataset(loaded.model.config.data)
    else:
        dataset = data.load(path, num_examples=limit)
    check_images(path, dataset, shape)
    return dataset.floats(range(dataset.num_examples)[:limit])
