"""What becomes of a request's tokens: seeds, penalties, grammars, patterns, NaN, and where an answer ends."""
