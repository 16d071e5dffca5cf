"""Models whose weights in 4 bits were rounded together (``gptq``), for bitsandbytes to load.

What is made is a plain model with weights on the grid, which bitsandbytes' own rounding leaves as they are.

Legend: I inputs of a linear layer, N texts, T tokens, G values of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_modules.errors import ModelError
from lightning_modules.llm.bars import bar_of
from lightning_modules.llm.model_files import cached_folder, source_identity, written_once
from lightning_modules.llm.saving import save_model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_modules.llm.specs import BackboneSpec

VERSION = 1  # part of a rounded model's name: raise it when others come of the same texts
AT_ONCE = 24  # texts that are read together


@dataclass(frozen=True)
class Rounded:
    """A language model with its linear layers' weights on bitsandbytes' grid of 4 bits, made in the cache.

    What a layer's inputs are like is learned from prompts, or from texts that the model itself writes. A
    model of 7 billion weights takes 28 GB while it is made, on the first GPU or, without one, the CPU.

    Args:
        source, revision: of the model, as in ``BackboneSpec``.
        grid: the values that weights have, before their scale.
        block_size: weights that share a scale.
        prompts: what the model is going to read. Without any it writes ``texts`` of its own, with ``seed``.
        texts: how many.
        tokens: of each; prompts are joined, and cut into pieces of so many.
        seed: of the texts.
    """

    source: Any
    revision: str | None
    grid: Literal["nf4", "fp4"]
    block_size: int
    prompts: tuple[str, ...] = ()
    texts: int = 96
    tokens: int = 192
    seed: int = 0

    def folder(self) -> Path:
        """Where it lies; made by whoever comes first, others wait."""
        identity = {**asdict(self), "source": source_identity(self.source, self.revision)}
        target = cached_folder(f"gptq-{self.grid}-{self.block_size}", ["gptq", VERSION, identity])
        return written_once(target, self.write, "rounding weights together")

    def write(self, folder: Path) -> None:
        """Fill ``folder`` as ``save_pretrained`` does, float32.

        Raises:
            DataSourceError: the model cannot be had.
            ModelError: a layer's inputs are no whole number of blocks.
        """
        import torch

        from lightning_modules.llm.backbones import load_causal_lm, load_tokenizer
        from lightning_modules.llm.precision import grid_of
        from lightning_modules.llm.specs import BackboneSpec

        spec = BackboneSpec(
            self.source, self.revision, "float32", chat_template=False, max_length=1
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer, model = load_tokenizer(spec), load_causal_lm(spec, device)
        texts = (
            self._read(tokenizer).to(device) if self.prompts else self._written(model, tokenizer)
        )
        round_model(model, texts.split(AT_ONCE), grid_of(self.grid).to(device), self.block_size)
        save_model(model.cpu(), folder)
        tokenizer.save_pretrained(folder)

    def _read(self, tokenizer: Any) -> Tensor:
        """(N, T) token ids of the prompts."""
        import torch

        each = tokenizer(list(self.prompts), add_special_tokens=False)["input_ids"]
        ids = [token for prompt in each for token in prompt]
        size = min(self.tokens, len(ids))
        count = len(ids) // size
        return torch.tensor(ids[: count * size]).view(count, size)

    def _written(self, model: Any, tokenizer: Any) -> Tensor:
        """(N, T) token ids that the model writes by itself, from the token that texts begin with."""
        import torch

        first = tokenizer.bos_token_id
        start = torch.full((self.texts, 1), tokenizer.eos_token_id if first is None else first)
        start = start.to(model.device)
        cuda = [start.device] if start.is_cuda else []
        with torch.random.fork_rng(devices=cuda), bar_of(self.tokens, "writing texts") as bar:

            def tick(texts: Tensor, *unused: Any, **others: Any) -> Tensor:
                bar.update()
                return torch.zeros(len(texts), dtype=torch.bool, device=texts.device)  # none ends

            torch.manual_seed(self.seed)
            written: Tensor = model.generate(
                input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, top_k=50,
                temperature=1.0, top_p=1.0, min_new_tokens=self.tokens, max_new_tokens=self.tokens,
                use_cache=True, pad_token_id=tokenizer.pad_token_id, stopping_criteria=[tick],
            )  # fmt: skip
        return written


def rounded_folder(spec: BackboneSpec, prompts: Callable[[], Sequence[str]]) -> Path | None:
    """The folder of a model that is rounded before it is loaded; None where nothing asks for that."""
    if spec.rounding == "nearest":
        return None
    grid: Any = (spec.quantization or "").removesuffix("-dq")
    return Rounded(spec.source, spec.revision, grid, spec.block_size, tuple(prompts())).folder()


def round_model(model: Any, texts: Sequence[Tensor], grid: Tensor, block_size: int) -> None:
    """Put the weights of the linear layers of all decoder layers on a grid, in place.

    Layer by layer, each with the inputs that it has behind the rounded ones before it.

    Args:
        model: a causal language model in float32.
        texts: token ids, each (n, T), without padding.
        grid: (G,) ascending, from -1 to 1.
        block_size: weights of a row that share a scale.

    Raises:
        ModelError: a layer's inputs are no whole number of blocks.
    """
    import torch

    from lightning_modules.llm.backbones import decoder_layers
    from lightning_modules.llm.gptq import round_weight

    layers = decoder_layers(model)
    for layer in layers:
        for name, part in _linear(layer):
            if part.in_features % block_size:
                raise ModelError(
                    f"{name} has {part.in_features} inputs, no whole number of blocks of {block_size} "
                    "weights: take a smaller llm.block_size, or llm.rounding=nearest"
                )
    with torch.inference_mode():
        states, beside = _first_inputs(model, layers, texts)
        bar = bar_of(len(layers), "rounding layers")
        for layer, given in zip(layers, beside, strict=True):
            runs = [_run(layer, *one) for one in given]
            for group in _by_input(layer, runs[0], states[0]):
                with _summed(group[0]) as products:
                    for run, state in zip(runs, states, strict=True):
                        run(state)
                for part in group:
                    part.weight.copy_(round_weight(part.weight, products[0], grid, block_size))
            states = [_state(run(state)) for run, state in zip(runs, states, strict=True)]
            bar.update()
        bar.close()


def _linear(layer: Any) -> Iterator[tuple[str, nn.Linear]]:
    from torch import nn

    return ((name, part) for name, part in layer.named_modules() if isinstance(part, nn.Linear))


def _run(layer: Any, rest: tuple[Any, ...], options: dict[str, Any]) -> Callable[[Tensor], Any]:
    return lambda state: layer(state, *rest, **options)


def _first_inputs(
    model: Any, layers: Sequence[Any], texts: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[tuple[tuple[Any, ...], dict[str, Any]]]]]:
    """What the first layer reads of each batch (n, T, d), and by layer what each is given beside that."""
    states: list[Tensor] = []
    beside: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in layers]

    def note(place: int, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        if place == 0:
            states.append(inputs[0])
        beside[place].append((inputs[1:], options))

    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, options, place=place: note(place, inputs, options), with_kwargs=True
        )
        for place, layer in enumerate(layers)
    ]
    for tokens in texts:
        model.get_decoder()(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states, beside


def _by_input(layer: Any, run: Any, state: Tensor) -> list[list[nn.Linear]]:
    """The linear layers in the order in which they are asked, those with one input together."""
    seen: list[tuple[Any, nn.Linear]] = []
    hooks = [
        part.register_forward_pre_hook(lambda part, inputs: seen.append((inputs[0], part)))
        for _, part in _linear(layer)
    ]
    run(state)
    for hook in hooks:
        hook.remove()
    groups: list[list[nn.Linear]] = []
    for place, (read, part) in enumerate(seen):
        if place and read is seen[place - 1][0]:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


@contextmanager
def _summed(part: nn.Linear) -> Iterator[list[Tensor]]:
    """The sum of x x^T (I, I), float64, over all inputs of a linear layer inside."""
    import torch

    size = part.in_features
    sums = [torch.zeros(size, size, dtype=torch.float64, device=part.weight.device)]

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1, size)
        sums[0] += (rows.T @ rows).double()

    hook = part.register_forward_pre_hook(add)
    try:
        yield sums
    finally:
        hook.remove()


def _state(given: Any) -> Tensor:
    """A layer's output, which some give in a tuple."""
    found: Tensor = given[0] if isinstance(given, tuple) else given
    return found
