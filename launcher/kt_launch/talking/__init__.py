"""Talking to a server in the terminal: which server, what is said to it, what is shown."""
