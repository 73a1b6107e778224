"""Secrets in a config: replaced by references before anything is written."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from kt_launch.config.schema import Config
from kt_model.redaction import hide_arguments


def hide_config(config: Config, environ: MutableMapping[str, str] = os.environ) -> Config:
    """The config, with references instead of the secrets that presets hold."""
    words = hide_arguments(config.server.extra_args, environ)
    if words == config.server.extra_args:
        return config
    return config.model_copy(update={"server": config.server.model_copy(update={"extra_args": words})})
