"""`menma bench`: speed and memory as ratios to something else."""
