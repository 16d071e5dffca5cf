"""Keys of accounts stay in the environment: what a run writes down never holds one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from experiments.errors import UserError
from experiments.keys import flatten

_VARIABLE = re.compile(r"(API_?KEY|TOKEN|PASSWORD|PASSWD|SECRET)S?$", re.IGNORECASE)
_SETTING = re.compile(r"(^|_)(api_?key|password|secret|(access|auth|hf)_token)$", re.IGNORECASE)
_SHORTEST = 8  # letters: what is shorter stands in many places by chance


def refuse(config: Any, environment: Mapping[str, str]) -> None:
    """Refuse a configuration that holds a key, by the name of the setting or by its value.

    Args:
        config: resolved; it is written into run folders and sent to loggers.
        environment: variables; those that are called like keys have values that may stand nowhere else.

    Raises:
        UserError: it names the setting, and not the key.
    """
    known = {v: n for n, v in environment.items() if _VARIABLE.search(n) and len(v) >= _SHORTEST}
    for place, value in flatten(config):
        found = next((name for key, name in known.items() if key in str(value)), None)
        if found:
            raise UserError(
                f"{place} holds the value of {found}, and settings are written into run folders: leave it in "
                "the environment, where it is found by itself"
            )
        if _SETTING.search(place.rpartition(".")[2]) and isinstance(value, str) and value:
            raise UserError(
                f"{place} looks like a key, and settings are written into run folders: give it in the "
                "environment (WANDB_API_KEY, HF_TOKEN)"
            )
