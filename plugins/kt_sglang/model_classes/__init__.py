"""SGLang's model classes for the supported families, as a package that SGLang's registry reads. Not here: the
definition of a family (kt_model/families.py).
"""

from __future__ import annotations

import os

VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"


def name_package() -> None:
    """Make the registry read this package first; call this before SGLang is imported.

    Trigger: SGLang imports its 170 model files in each scheduler process to find one class, 0.6 s of a start. Safe
    because this is SGLang's own mechanism to defer that: for an architecture that the package lacks, or whose file
    fails to import, all files are imported as before. A package chosen by the user takes precedence. Remove when SGLang
    imports only the one file.
    """
    os.environ.setdefault(VARIABLE, __name__)
