"""Reads what is there, on disk, on the Hub and in the machine, for planning: the one way to a plan."""
