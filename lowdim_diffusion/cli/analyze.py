"""``lowdim analyze``: measure a run and write its report."""

import json
import pathlib
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowdim_diffusion.cli import toml
from lowdim_diffusion.cli.config import option
from lowdim_diffusion.cli.errors import CommandError, ExitCode
from lowdim_diffusion.cli.parse import parse_of_run
from lowdim_diffusion.cli.summary import last_loss

__all__ = ["AnalyzeArguments", "main", "run"]


@dataclass(frozen=True)
class AnalyzeArguments:
    """What ``lowdim analyze`` is given."""

    run: str = ""
    """Run directory to measure, or a pretrained network: a folder of diffusers, or a .safetensors
    file of EDM (required); the report goes there."""
    data: str | None = None
    """Where the training data are now, if they have moved; needed for a pretrained network."""
    seed: int = option(0, ge=0, lt=2**32)
    """Seed of the samples."""
    memorization: bool = False
    """List the training examples that samples reproduce, estimate how many more the model holds,
    and judge detectors of copies by features."""
    num_samples: int | None = option(ge=1)
    """Samples to compare with the training data; unset takes 64, or 1000 with --memorization."""
    num_spectra: int | None = option(ge=1)
    """Of these, how many to follow with Jacobians; unset takes 4, or 1 where that is slow."""
    rank: int = option(16, ge=1)
    """Leading singular values where there are too many to compute all, and size of subspaces."""


_DESCRIPTION = """\
Measure a run: nearest training images of its samples; singular values, rank and
linearity of its Jacobian from noise to data; angles between subspaces.
Writes RUN/report.html and the numbers to RUN/analysis.npz."""
_EXAMPLES = """\
lowdim analyze --run runs/digits
lowdim analyze --run runs/mnist --num-samples 256 --num-spectra 8
lowdim analyze --run runs/mnist --memorization
lowdim analyze --run runs/mnist --data /mnt/elsewhere/mnist"""


def main(argv: Sequence[str]) -> int:
    """Measure and report; return the exit code."""
    given = parse_of_run(
        AnalyzeArguments,
        argv,
        prog="lowdim analyze",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    return run(given)


def run(given: AnalyzeArguments) -> int:
    """Measure and report; return the exit code."""
    from lowdim_diffusion.cli import analysis, build, drawing, memorization
    from lowdim_diffusion.cli.loading import load_run

    begin = time.monotonic()
    loaded = load_run(given.run)
    config = loaded.model.config.data
    if loaded.pretrained and given.data is None:
        raise CommandError(
            "--data is needed: images to compare a pretrained network's samples with"
        )
    loaded.path.mkdir(parents=True, exist_ok=True)
    dataset = build.dataset(replace(config, path=given.data or config.path))
    notes = []
    if loaded.data_sha256 and dataset.sha256 != loaded.data_sha256:
        notes.append("The data found now are not those that the run was trained on.")
        print(f"warning: {dataset.source or dataset.name} is not the data of this run")
    num_samples = given.num_samples or (1000 if given.memorization else 64)
    measured = analysis.analyze(
        loaded,
        dataset,
        num_samples=num_samples,
        num_spectra=given.num_spectra,
        rank=given.rank,
        seed=given.seed,
        note=lambda text: print(text, flush=True),
    )
    held = None
    if given.memorization:
        print("looking for training examples among the samples", flush=True)
        labels = drawing.default_labels(loaded.model, num_samples)
        held = memorization.measure(loaded, dataset, measured.samples, labels)
    numbers = _write_numbers(loaded.path / "analysis.npz", measured, held)
    report = _write_report(loaded, dataset, measured, held, notes)
    print(_summary(measured))
    if held is not None:
        print("\n".join(memorization.summary(held)))
    print(f"measured in {time.monotonic() - begin:.1f} s")
    print(f"report   {report}\nnumbers  {numbers}")
    return ExitCode.DONE


def _write_numbers(path: pathlib.Path, measured: Any, held: Any) -> pathlib.Path:
    """Write everything measured as arrays."""
    from lowdim_diffusion import subspaces
    from lowdim_diffusion._files import write_npz
    from lowdim_diffusion.cli import memorization

    arrays = {
        "samples": measured.samples,
        "nearest_distance": measured.distance,
        "nearest_index": measured.index,
        "memorized_fraction": measured.memorized,
        "generalization_score": measured.novel,
        "threshold": measured.threshold,
        "distance_ratio_score": measured.distance_ratio,
        "sigmas": measured.sigmas,
        "ts": measured.ts,
        "trajectory": measured.trajectory,
        "singular_values": measured.spectrum.values,
        "rank_ratio": measured.spectrum.rank_ratio,
        "energy": measured.spectrum.energy,
        "asymmetry": measured.spectrum.asymmetry,
        "linearity_steps": subspaces.STEPS,
        "linearity_norm_ratio": measured.spectrum.norm_ratio,
        "linearity_cosine": measured.spectrum.cosine,
        "exact_singular_values": measured.exact and measured.exact.values,
        "exact_rank_ratio": measured.exact and measured.exact.rank_ratio,
        **{f"angles: {name}": value for name, value in measured.angles.items()},
        **({} if held is None else memorization.arrays(held)),
    }
    return write_npz(path, {k: v for k, v in arrays.items() if v is not None})


def _write_report(
    loaded: Any, dataset: Any, measured: Any, held: Any, notes: list[str]
) -> pathlib.Path:
    from lowdim_diffusion import reporting, subspaces
    from lowdim_diffusion.cli import memorization
    from lowdim_diffusion.training.rundir import read_metrics

    rows = read_metrics(loaded.path / "metrics.jsonl")
    losses = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    config, net = loaded.model.config, loaded.model.net
    spectrum, exact = measured.spectrum, measured.exact
    count = spectrum.values.shape[-1]
    if (spectrum.rank_ratio * measured.samples[0].size > count + 0.5).any():
        notes.append(
            f"Only the leading {count} of {measured.samples[0].size} singular values were "
            f"computed: a rank of {count + 1} stands for all above {count}; --rank {4 * count} "
            "sees more."
        )
    where = shlex.quote(str(loaded.path))
    shown = 24
    return reporting.write_html(
        loaded.path / "report.html",
        title=loaded.path.resolve().name,
        subtitle=dataset.describe(),
        summary={
            "training steps": loaded.step,
            "images seen": loaded.step * config.train.batch_size,
            "last loss": last_loss(losses),
            "parameters": (net.num_params, net.name),
            "sampler": f"{config.sample.solver}, {config.sample.num_steps} steps",
            **_copying(measured),
        },
        neighbors=reporting.Neighbors(
            measured.samples[:shown],
            dataset.floats(measured.index[:shown]),
            measured.distance[:shown],
        ),
        memorized=measured.memorized,
        copies=held and memorization.section(held, dataset, measured.samples),
        loss=tuple(zip(*losses, strict=True)) if losses else None,  # pyright: ignore[reportArgumentType]
        trajectory=(measured.trajectory, measured.sigmas),
        spectra=reporting.Spectra(
            measured.sigmas[:-1],
            spectrum.values,
            spectrum.rank_ratio,
            exact and exact.values,
            exact and exact.rank_ratio,
            {f"λ = {step:g} √n": spectrum.cosine[..., i] for i, step in enumerate(subspaces.STEPS)},
            spectrum.asymmetry,
        ),
        angles={name: value.tolist() for name, value in measured.angles.items()},
        config="" if loaded.pretrained else toml.dumps(config),
        versions=_versions(loaded.path),
        next_commands=[]
        if loaded.pretrained
        else [
            ("More samples", f"lowdim sample --run {where} --num-samples 256"),
            ("Another sampler", f"lowdim sample --run {where} --solver dpmpp-2m --steps 12"),
            (
                "Train on",
                f"lowdim train --out {where} --train.steps {2 * max(config.train.steps, 1)}",
            ),
            (
                "Your own images",
                "lowdim train --data.path photos/ --data.size 32 --out runs/photos",
            ),
        ],
        notes=notes,
    )


def _copying(measured: Any) -> dict[str, tuple[str, str]]:
    """What was measured of copies beside the memorized fraction: label to value and meaning."""
    found = {}
    if measured.novel is not None:
        found["new samples"] = (
            f"{100 * measured.novel:.1f} %",
            f"cosine to every training example at most {measured.threshold:.3f}, as of 99 % of "
            "training examples to the others",
        )
    if measured.distance_ratio is not None:
        meaning = "mean distance to the training data, over that of fresh examples"
        found["distance ratio"] = (f"{measured.distance_ratio:.2f}", meaning)
    return found


def _versions(path: pathlib.Path) -> dict[str, str]:
    try:
        found = json.loads((path / "versions.json").read_text(encoding="utf-8"))
        return {name: str(value) for name, value in found.items() if value != ""}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _summary(measured: Any) -> str:
    import numpy as np

    lines = [f"nearest training example: median distance {np.median(measured.distance):.3g}"]
    if measured.memorized is not None:
        lines.append(f"memorized samples: {100 * measured.memorized:.1f} %")
    lines += [f"{name}: {value} ({note})" for name, (value, note) in _copying(measured).items()]
    mean = measured.spectrum.rank_ratio.mean(1)
    low = int(np.argmin(mean))
    lines.append(
        f"numerical rank / dimension: {mean[-1]:.2g} at sigma {measured.sigmas[-2]:.2g}, "
        f"smallest {mean[low]:.2g} at sigma {measured.sigmas[low]:.2g}"
    )
    for name, angles in measured.angles.items():
        lines.append(f"{name}: median angle {np.degrees(np.median(angles)):.1f} degrees")
    return "\n".join(lines)
