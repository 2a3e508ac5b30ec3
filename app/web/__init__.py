"""The app in a browser on this machine. Needs the extra `menma[serve]`."""
