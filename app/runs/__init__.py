"""Runs as processes and folders: start, supervise, read the state, follow, control.

Standard library, psutil and `trainer.contract.{errors,events,files,run_dir}` only.
"""
