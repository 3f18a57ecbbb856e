"""Published figures, each a module: ``python -m experiments.NAME --preset smoke|cpu|paper``."""
