"""One file a command. A module loads nothing heavy until its command runs."""
