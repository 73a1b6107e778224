"""Checks a server must pass before it is called ready: its schedulers' own reports (proof.py), the whole model compared
with transformers in float32, run in a separate process, and a shipped text that it has to predict.
"""
