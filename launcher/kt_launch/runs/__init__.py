"""The record of a run: its folder, plan, lock and state, and how far a folder is trusted."""
