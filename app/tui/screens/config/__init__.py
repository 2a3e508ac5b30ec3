"""The screen of one config: options and text, side by side or in turns."""
