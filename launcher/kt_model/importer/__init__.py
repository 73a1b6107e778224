"""Reads a LoRA adapter as whichever tool wrote it, and brings it to one normal form. Torch-free.

The way: files.py finds the files and stored.py opens them, settings.py reads adapter_config.json, names.py says where
a key belongs, one file a format (per_expert.py, fused.py with layouts.py, stacked.py, kt_training.py) turns keys into
pairs, fit.py holds them against the base, and serving.py says what SGLang is given. Reports are another room's.
"""

from kt_model.importer.normal import Imported, Pair
from kt_model.importer.reading import import_adapter

__all__ = ["Imported", "Pair", "import_adapter"]
