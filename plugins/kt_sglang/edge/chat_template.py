"""Which chat template the chat routes use: the tokenizer's, or the one that was typed (`--chat-template`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def around_guess_chat_template(original: Callable[..., Any], manager: Any, model_path: str) -> None:
    """AROUND hook of `TemplateManager.guess_chat_template_from_model_path`: guesses nothing.

    SGLang looks for names of multimodal models in the whole path, and their templates go before the tokenizer's:
    `/home/janus/models/x`, `/data/whisper/x` and `/mnt/check-points/x` got those of Janus, Whisper and POINTS, in
    silence. Safe because it has templates only for multimodal families, which kt_model.families has none of. Remove
    once SGLang looks at the model instead of its path.
    """
