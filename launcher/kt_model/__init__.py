"""Models, adapters and plans as files: the common base of the launcher and the plugin. No Hydra, SGLang or torch."""
