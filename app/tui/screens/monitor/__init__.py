"""The monitor: one training as it goes on, its samples, its metrics."""
