"""Servers that answer as one: replicas behind a router with the same adapters, and one server on several hosts."""
