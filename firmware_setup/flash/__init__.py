"""For the host: which board is in recovery mode, and the command that flashes it. Not yet run on hardware."""
