"""The kinds of files that a sample is written as, one module each."""
