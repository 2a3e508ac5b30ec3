"""Weights in 8-bit floats: how they are scaled, rounded and multiplied with."""
