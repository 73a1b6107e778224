"""action=schema: the config's JSON schema on stdout, for editors that complete and check YAML."""

from __future__ import annotations

import json

from kt_launch.actions import Job
from kt_launch.actions.page import Data, Page
from kt_launch.config.schema import Config

PAGE = Page(
    ("Prints the JSON schema of the whole config; editors complete and check presets with it.",),
    (("kt-launch schema", ""),),
    data=Data("the same"),
)


def run(job: Job) -> None:
    job.problems.raise_if_any()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    print(json.dumps(schema, indent=2))
