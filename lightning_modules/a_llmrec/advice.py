"""Why an item was chosen, in the language model's own words. Nobody has checked them.

Legend: L tokens of a prompt, A of an answer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from datamodules.types import Batch
from lightning_modules.llm.generation import generate
from lightning_modules.llm.prompt_tokens import prompts_of

if TYPE_CHECKING:
    from lightning_modules.a_llmrec.stage2 import Stage2Module

_BEGINNING = ", because"
_LONGEST = 40  # tokens


def reason(module: Stage2Module, batch: Batch, item: int) -> str:
    """What the model writes behind the item's title and ``because``, up to the end of its sentence.

    Args:
        module: loaded, with the rows' users at hand.
        batch: one row.
        item: that was chosen.
    """
    assert batch.tokens is not None
    assert batch.token_mask is not None
    assert batch.slots is not None
    begin = module.tokenizer(_BEGINNING, add_special_tokens=False)["input_ids"]
    answer = torch.tensor(
        [[*module.table.title(item), *begin]], device=batch.tokens.device
    )  # (1, A)
    asked = replace(
        batch,
        tokens=torch.cat([batch.tokens, answer], dim=1),  # (1, L + A)
        token_mask=torch.cat([batch.token_mask, torch.ones_like(answer)], dim=1),
        slots=torch.cat([batch.slots, torch.zeros_like(answer)], dim=1),
    )
    with module.soft(asked, "test"):
        (ids,) = generate(module.model, module.tokenizer, prompts_of(asked), _LONGEST)
    text = str(module.tokenizer.decode(ids, skip_special_tokens=True)).strip()
    sentence, stop, _ = text.partition(". ")
    return " ".join(f"because {sentence}{stop}".split())
