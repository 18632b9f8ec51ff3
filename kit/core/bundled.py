"""The kit's own words and tables: YAML files that stand beside the modules that use them."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

KIT = Path(__file__).parents[1]


@cache
def bundled(name: str) -> Any:
    """The content of a YAML file of the kit, read once.

    Args:
        name: its path under kit/, without the ending: `prompts`, `grading/outputs`.
    """
    return yaml.safe_load((KIT / f"{name}.yaml").read_bytes())
