"""From a config and facts to a plan: resolve.py turns every "auto" into a value with its source."""
