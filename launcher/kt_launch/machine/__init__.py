"""The machine: its hardware, limits and processes, and where things are stored on it."""
