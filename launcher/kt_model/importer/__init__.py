"""Reads a LoRA adapter written by any tool, and converts it to one normal form. Torch-free.

files.py finds the files and tensors/stored.py opens them, settings.py reads adapter_config.json, names.py interprets
each key, one file per format (per_expert.py, fused.py with layouts.py, stacked.py, kt_training.py) turns keys into
pairs, base_match.py checks them against the base, and serving.py converts them for SGLang. Reports are made elsewhere.
"""

from kt_model.importer.normal import Imported, Pair
from kt_model.importer.reading import import_adapter

__all__ = ["Imported", "Pair", "import_adapter"]
