"""The Data screen: what a config's dataset is."""
