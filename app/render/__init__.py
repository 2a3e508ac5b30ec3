"""Pictures of things in a terminal; nothing here knows a command."""
