"""Keys never reach a configuration."""

from __future__ import annotations

import pytest

from experiments import secrets
from experiments.errors import UserError

KEY = "k3y-" * 10


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD", "client_secret"])
def test_a_value_of_the_environment_is_refused_wherever_it_stands(name: str) -> None:
    config = {"stages": {"train": {"module": {"source": f"hub/{KEY}/model"}}}}
    with pytest.raises(
        UserError, match=rf"stages\.train\.module\.source holds the value of {name}"
    ) as error:
        secrets.refuse(config, {name: KEY})
    assert KEY not in str(error.value)


def test_a_setting_that_is_called_like_a_key_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"logger\.wandb\.settings\.api_key looks like a key"
    ) as error:
        secrets.refuse({"logger": {"wandb": {"settings": {"api_key": KEY}}}}, {})
    assert KEY not in str(error.value)


def test_numbers_of_tokens_and_short_values_are_none() -> None:
    config = {"module": {"max_new_tokens": 48, "text_tokens": 8, "title": "token"}, "seed": 1}
    secrets.refuse(
        config, {"MY_TOKEN": "token", "TOKENIZERS_PARALLELISM": "false", "HOME": "module"}
    )
