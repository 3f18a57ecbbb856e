"""Every solver of the package by name, with settings that show what it does."""

from lowdim_diffusion import solvers

DETERMINISTIC = {
    "euler": solvers.euler(),
    "heun": solvers.heun(),
    "midpoint": solvers.midpoint(),
    "rk4": solvers.rk4(),
    "dpm_2": solvers.dpm_solver(2),
    "dpm_3": solvers.dpm_solver(3),
    "dpmpp_2m": solvers.dpmpp_2m(),
    "dpmpp_3m": solvers.dpmpp_3m(),
    "deis_3": solvers.deis(3),
    "adams_bashforth_2": solvers.adams_bashforth(2),
    "unipc_1": solvers.unipc(1),
    "unipc_2": solvers.unipc(2),
    "unipc_3": solvers.unipc(3),
    "unipc_2_bh1": solvers.unipc(2, "bh1"),
    "heavy_ball": solvers.heavy_ball(),
    "ghvb_1": solvers.ghvb(1),
    "ghvb_2": solvers.ghvb(2),
    "ghvb_4": solvers.ghvb(4),
}
REVERSIBLE = {"bdia": solvers.bdia(), "edict": solvers.edict()}
STOCHASTIC = {
    "ddim_half": solvers.ddim(0.5),
    "ancestral": solvers.ancestral(),
    "ancestral_large": solvers.ancestral(1.0),
    "heun_churn": solvers.heun(churn=20.0, churn_min=0.05, churn_max=50.0),
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde(),
    "dpmpp_3m_sde": solvers.dpmpp_3m_sde(),
    "euler_maruyama": solvers.euler_maruyama(),
    "sde_heun": solvers.sde_heun(),
    "langevin": solvers.predictor_corrector(solvers.ancestral(), snr=0.1),
}
ALL = DETERMINISTIC | REVERSIBLE | STOCHASTIC
