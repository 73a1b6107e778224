"""What a seam into SGLang is, and how a hook reaches all modules that use what it replaces."""
