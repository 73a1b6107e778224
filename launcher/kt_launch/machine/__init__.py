"""The machine: what it has, and where things lie on it."""
