"""Reads the facts for planning, from disk, the Hub and the machine; every plan is made through facts.py."""
