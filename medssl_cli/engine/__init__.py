"""The training loop, optimisation, checkpoints and telemetry."""
