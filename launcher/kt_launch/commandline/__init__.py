"""The words that are typed and what the terminal shows."""
