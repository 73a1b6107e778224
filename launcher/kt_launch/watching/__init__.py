"""Observes a running server: progress, health, memory, metrics, a web page, and why it died."""
