"""Drawn clips of known content, and a judge that tells the content from pixels alone."""
