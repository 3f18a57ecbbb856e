"""Training: the pure step, one-scan fits, the loop over devices, checkpoints, run directory."""

from lowdim_diffusion.training import (
    checkpoint,
    ema,
    guards,
    optimizers,
    programs,
    rundir,
    sinks,
    throughput,
)
from lowdim_diffusion.training.factorization import (
    Compressed,
    adapter_loss,
    compress,
    factor_product,
    init_adapter,
    merge_adapter,
    orthogonal_factors,
)
from lowdim_diffusion.training.fit import fit
from lowdim_diffusion.training.loop import Stretch, compile_loop
from lowdim_diffusion.training.preemption import StopSignal
from lowdim_diffusion.training.progress import ConsoleMonitor, Monitor, Report
from lowdim_diffusion.training.stages import (
    StageSimilarity,
    denoiser_similarity,
    find_stages,
    stage_similarity,
)
from lowdim_diffusion.training.step import TrainState, TrainStep, init_state, make_train_step
from lowdim_diffusion.training.subspace import SubspaceFit, denoising_loss, fit_subspaces
from lowdim_diffusion.training.subspace_training import ProjectionKind, random_subspace
from lowdim_diffusion.training.sweep import Sweep, sweep, table
from lowdim_diffusion.training.trainer import LossSpikeError, NonFiniteLossError, Outcome, train
from lowdim_diffusion.training.transfer import transfer

__all__ = [
    "Compressed",
    "ConsoleMonitor",
    "LossSpikeError",
    "Monitor",
    "NonFiniteLossError",
    "Outcome",
    "ProjectionKind",
    "Report",
    "StageSimilarity",
    "StopSignal",
    "Stretch",
    "SubspaceFit",
    "Sweep",
    "TrainState",
    "TrainStep",
    "adapter_loss",
    "checkpoint",
    "compile_loop",
    "compress",
    "denoiser_similarity",
    "denoising_loss",
    "ema",
    "factor_product",
    "find_stages",
    "fit",
    "fit_subspaces",
    "guards",
    "init_adapter",
    "init_state",
    "make_train_step",
    "merge_adapter",
    "optimizers",
    "orthogonal_factors",
    "programs",
    "random_subspace",
    "rundir",
    "sinks",
    "stage_similarity",
    "sweep",
    "table",
    "throughput",
    "train",
    "transfer",
]
