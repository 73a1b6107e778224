"""What a server is held against before it is called ready, beyond what its own schedulers report (proof.py): the whole
model in float32, run by transformers in a process of its own, and a shipped text that it has to predict.
"""
