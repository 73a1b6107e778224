"""What a user may write, and how Hydra composes it from presets and the command line."""
