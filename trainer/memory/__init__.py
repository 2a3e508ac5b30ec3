"""What does not stay on the device: frozen blocks and kept activations, streamed from RAM."""
