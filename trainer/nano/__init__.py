"""The nano models: Wan's architecture, small enough to be trained and to generate on a laptop."""
