"""Decode steps that a CUDA graph replays: how a batch reaches kt_kernels without Python, and comes back."""
