"""Long prompts on a GPU: packed experts are streamed to the card, unpacked and multiplied there, adapters included."""
