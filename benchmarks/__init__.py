"""Timings of the denoiser core, the training step and the samplers; see README.md here."""
