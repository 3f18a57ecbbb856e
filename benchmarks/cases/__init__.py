"""The cases, by name."""

from benchmarks.cases import denoisers, devices, samplers, startup, training
from benchmarks.harness import Case

CASES: dict[str, Case] = {
    case.name: case
    for module in (startup, denoisers, samplers, training, devices)
    for case in module.CASES
}
