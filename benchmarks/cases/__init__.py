"""The cases, by name."""

from benchmarks.cases import (
    checkpoints,
    denoisers,
    devices,
    distillation,
    geometry,
    jacobians,
    likelihoods,
    neighbours,
    samplers,
    startup,
    streams,
    sweeps,
    training,
)
from benchmarks.harness import Case

CASES: dict[str, Case] = {
    case.name: case
    for module in (
        startup,
        denoisers,
        samplers,
        training,
        checkpoints,
        streams,
        sweeps,
        distillation,
        jacobians,
        likelihoods,
        geometry,
        neighbours,
        devices,
    )
    for case in module.CASES
}
