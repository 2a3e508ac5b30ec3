"""The wizard: from nothing to a queued run."""
