"""The record of a run: its folder, plan, lock and state, and which recorded runs are safe to replay."""
