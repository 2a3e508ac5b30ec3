"""The full-screen app. It reads what is on the disk and leaves requests there; it owns no run."""
