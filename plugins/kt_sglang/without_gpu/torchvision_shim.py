"""Names of torchvision that SGLang imports at start, for text-only serving where torchvision cannot load.

Trigger: SGLang imports torchvision unconditionally (multimodal/internvl_utils.py, configs/deepseek_ocr.py) and PyPI's
build does not load on CPU torch. Safe because nothing of it is called when text is served; calling one of these
functions raises. Installed only without CUDA and without a working torchvision. Remove when SGLang imports it lazily.
"""

from __future__ import annotations

import enum
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class InterpolationMode(enum.Enum):
    """The modes that image processors name in their defaults."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class ImageReadMode(enum.Enum):
    """The modes of `torchvision.io`."""

    RGB = "RGB"
    GRAY = "GRAY"
    UNCHANGED = "UNCHANGED"


class _Shim(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Unavailable,), {})


class _Unavailable:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(
            f"torchvision.{type(self).__name__}: torchvision is not usable here, and without it kt-launch serves text "
            "only; install a torchvision that matches this torch"
        )


def install_if_needed() -> None:
    """Put the shim into `sys.modules` unless a GPU or a working torchvision is there."""
    import torch

    if torch.cuda.is_available() or _works():
        return
    for name in ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional", ".io"):
        _install("torchvision" + name)
    for name in ("torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.functional"):
        sys.modules[name].InterpolationMode = InterpolationMode  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.v2.functional"].InterpolationMode = InterpolationMode  # type: ignore[attr-defined]
    sys.modules["torchvision.io"].ImageReadMode = ImageReadMode  # type: ignore[attr-defined]


def _works() -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
            del sys.modules[name]
        return False
    return True


def _install(name: str) -> None:
    module = _Shim(name)
    module.__spec__ = ModuleSpec(name, loader=None, is_package=True)
    module.__path__ = []
    module.__version__ = "0.0.0+shim"  # type: ignore[attr-defined]
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
