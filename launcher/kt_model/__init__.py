"""Models, adapters and plans as files: what the launcher and the plugin both stand on. No Hydra, SGLang or torch."""
