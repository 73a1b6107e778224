"""The chat in the terminal: which server, the conversation, and its display."""
