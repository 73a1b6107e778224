"""SGLang's classes of the models that kt-launch serves, as a package that SGLang's registry reads. Not here: what a
family is (kt_model/families.py).
"""

from __future__ import annotations

import os

VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"


def name_package() -> None:
    """Have the registry begin with this package; to be called before SGLang is imported.

    Trigger: SGLang imports its 170 model files in each scheduler process to find one class, 0.6 s of a start. Safe
    because this is SGLang's own way to put that off: an architecture that the package lacks, or whose file fails here,
    has all of them imported as before. A package that the user names stays. Remove when SGLang imports the one file.
    """
    os.environ.setdefault(VARIABLE, __name__)
