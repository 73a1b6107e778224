"""From a config to a plan: facts.py reads what is there, resolve.py turns every "auto" into a value with its source."""
