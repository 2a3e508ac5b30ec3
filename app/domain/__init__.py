"""What the app knows about configs and machines; no terminal in it."""
