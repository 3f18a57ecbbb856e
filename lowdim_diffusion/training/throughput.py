r"""Speed of training: FLOPs of a step, peaks of devices, memory, and the rows of ``stats.jsonl``.

Model-FLOPs utilisation (MFU) is the share of the devices' arithmetic that goes into the model's
matrix products and convolutions,

.. math:: \mathrm{MFU} = \frac{1}{t}\sum_d \frac{F_d}{P_d},

with ``F_d`` the FLOPs of a step in dtype d on one device, ``P_d`` the device's peak in it and t the
time of a step. Forward and backward pass count, and so does what rematerialisation does twice.

FLOPs are counted on the program as it was traced, before any compiler: a product of [m, k] and
[k, n] is 2 m k n; a convolution is 2 times its kernel for each value that it returns, padding
included. The compiler's own count (``compiled.cost_analysis()``) is no substitute: it takes the
body of an inner loop once (half of a step with ``accumulate=4``), leaves out products with padding,
and adds elementwise work.
"""

import contextlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from lowdim_diffusion.training.rundir import RunDirectory

__all__ = ["Meter", "count_flops", "peak_flops", "peak_memory", "profiled"]

PROFILE_AFTER, PROFILE_STEPS = 10, 5
"""Steps before the profiler records, and how many it does."""

# Dense peaks in 1e12 FLOP/s of one device as jax counts devices, from the vendors' data sheets:
# (bfloat16 and float16 products, float32 products at jax's default precision). That is TF32 on
# NVIDIA GPUs since Ampere, and one bfloat16 pass on TPUs. The first name that the device's kind
# contains decides.
_PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250, 1125),
    "H200": (989.4, 494.7),
    "H100 PCIe": (756, 378),
    "H100 80GB HBM3": (989.4, 494.7),
    "A100": (312, 156),
    "A10G": (70, 35),
    "L40S": (362, 183),
    "NVIDIA L4": (121, 60),
    "RTX A6000": (154.8, 77.4),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71, 35.6),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
    "TPU v6 lite": (918, 918),
    "TPU v5 lite": (197, 197),
    "TPU v5": (459, 459),
    "TPU v4": (275, 275),
    "TPU v3": (61.5, 61.5),
    "TPU v2": (22.5, 22.5),
}


def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> dict[str, float]:
    """Return the FLOPs of the matrix products and convolutions of a program, by dtype.

    A ``scan`` counts as often as it runs, a ``while`` once, of a ``cond`` the dearest branch, and
    what ``shard_map`` runs on every device of its mesh counts for all of them.

    Args:
        jaxpr: e.g. ``jax.make_jaxpr(fn)(*args)`` or ``jax.jit(fn).trace(*args).jaxpr``.

    Examples:
        >>> import jax.numpy as jnp
        >>> a, b = jnp.ones((2, 3)), jnp.ones((3, 5))
        >>> count_flops(jax.make_jaxpr(jnp.matmul)(a, b))
        {'float32': 60}
    """
    return dict(_count(jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr))


def _count(jaxpr: Jaxpr) -> Counter[str]:
    total: Counter[str] = Counter()
    eqns: Any = jaxpr.eqns
    for eqn in eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval.shape if eqn.outvars else ()
        if name == "cond":
            branches = [_count(branch) for branch in _inside(eqn.params)]
            total += max(branches, key=Counter.total)
            continue
        times = {"scan": eqn.params.get("length"), "shard_map": _size(eqn.params.get("mesh"))}
        for inner in _inside(eqn.params):
            total += Counter({k: v * times.get(name, 1) for k, v in _count(inner).items()})
        shapes = [v.aval.shape for v in eqn.invars]
        flops = 0
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            flops = 2 * math.prod(out) * math.prod(shapes[0][i] for i in contracted)
        elif name == "conv_general_dilated":
            spec = eqn.params["dimension_numbers"].rhs_spec
            flops = 2 * math.prod(out) * math.prod(shapes[1][i] for i in spec[1:])
        elif name == "lowdim_conv":  # networks/_conv.py
            flops = 2 * math.prod(out) * math.prod(shapes[1][:3])
        elif name == "lowdim_conv_kernel_grad":
            flops = 2 * math.prod(shapes[1]) * math.prod(out[:3])
        if flops:
            total[str(eqn.invars[0].aval.dtype)] += flops
    return total


def _inside(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The programs inside an equation."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _size(mesh: Any) -> int:
    return 1 if mesh is None else mesh.size


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a device for products in a dtype; None if it is not known.

    Examples:
        >>> peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16"), peak_flops("cpu", "float32")
        (312000000000000.0, None)
    """
    column = {"bfloat16": 0, "float16": 0, "float32": 1}.get(dtype)
    for name, peaks in _PEAKS.items():
        if name in device_kind and column is not None:
            return peaks[column] * 1e12
    return None


def peak_memory(devices: Sequence[Any]) -> int | None:
    """Return the most bytes that any of these devices had in use so far; None if it cannot say."""
    own = [d for d in devices if d.process_index == jax.process_index()]
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in own]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


class Meter:
    """Counts steps and seconds between two rows of ``stats.jsonl``.

    Args:
        flops: of one step over all devices, by dtype, from :func:`count_flops`.
        devices: what the steps run on.
        batch_size: global batch size.
        interval_s: time between two rows.
    """

    def __init__(
        self,
        flops: Mapping[str, float],
        devices: Sequence[Any],
        batch_size: int,
        *,
        interval_s: float = 10.0,
    ):
        self._devices, self._batch_size, self._interval_s = devices, batch_size, interval_s
        self._flops = sum(flops.values())
        peaks = {dtype: peak_flops(devices[0].device_kind, dtype) for dtype in flops}
        # What a step would take if the devices did nothing but products, at their peak.
        self._least_s = (
            sum(count / peaks[dtype] for dtype, count in flops.items()) / len(devices)  # pyright: ignore
            if flops and None not in peaks.values()
            else None
        )
        self._reset()

    def _reset(self) -> None:
        self._steps, self._busy_s, self._waited_s = 0, 0.0, 0.0
        self._begin = time.monotonic()

    def add(self, num_steps: int, busy_s: float, waited_s: float = 0.0) -> None:
        """Count a stretch of steps, and how much of its time was waiting for data."""
        self._steps += num_steps
        self._busy_s += busy_s
        self._waited_s += waited_s

    def mfu(self, steps_per_s: float) -> float | None:
        """Return the utilisation at a speed, in [0, 1]; None on devices without a known peak."""
        return None if self._least_s is None else self._least_s * steps_per_s

    def memory(self) -> int | None:
        """Return the peak memory of a device, in bytes; None if it cannot say."""
        return peak_memory(self._devices)

    @property
    def due(self) -> bool:
        """Whether it is time for a row."""
        return time.monotonic() - self._begin >= self._interval_s

    def row(self, step: int) -> dict[str, Any] | None:
        """Return a row of what was counted since the last one, and begin anew; None if nothing was.

        ``other_share`` is the share of the time that went into anything but steps: checkpoints,
        samples, logging, profiles. ``data_wait_share``, of data that are streamed, is the share
        that steps waited for theirs. What is not known is left out.
        """
        if not self._steps:
            return None
        elapsed = max(time.monotonic() - self._begin, self._busy_s)
        rate = self._steps / max(self._busy_s, 1e-9)
        found = {
            "step": step,
            "unix_time_s": round(time.time(), 3),
            "images_per_s": rate * self._batch_size,
            "step_time_s": 1 / rate,
            "other_share": 1 - self._busy_s / elapsed if elapsed else 0.0,
            "data_wait_share": self._waited_s / elapsed if self._waited_s else None,
            "flops_per_s": rate * self._flops or None,
            "mfu": self.mfu(rate),
            "peak_memory_bytes": self.memory(),
        }
        self._reset()
        return {name: value for name, value in found.items() if value is not None}


@contextlib.contextmanager
def profiled(run: RunDirectory, note: Callable[[str], None]) -> Iterator[None]:
    """Record what happens inside into ``profile/`` of a run; failing costs a warning.

    The folder is for xprof and for TensorBoard's profiler; ``perfetto_trace.json.gz`` in it opens
    in https://ui.perfetto.dev.
    """
    if not run.writer:
        yield
        return
    path = run.profile_path
    try:
        jax.profiler.start_trace(path, create_perfetto_trace=True)
    except Exception as error:
        warnings.warn(f"no profile: {error}", stacklevel=3)
        yield
        return
    try:
        yield
    finally:
        try:
            jax.profiler.stop_trace()
            note(f"profile of {PROFILE_STEPS} steps: xprof --logdir {path}")
        except Exception as error:
            warnings.warn(f"no profile in {path}: {error}", stacklevel=3)
