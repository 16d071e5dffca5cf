"""Weights in 4 bits whose rounding errors make up for each other, as a source of models for bitsandbytes.

bitsandbytes rounds each weight to the nearest value of its grid. Here the columns of a layer are rounded one
after the other, and what one loses the later ones take over, so that the layer's outputs stay what they were
(GPTQ: Frantar et al., ICLR 2023, arXiv 2210.17323, algorithm 1; scales are searched for as in its code). The
result is a plain model with weights on the grid, which bitsandbytes' own rounding leaves as they are.

Legend: O outputs and I inputs of a linear layer, N texts, T tokens, G values of the grid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datamodules.sources import Wheel
from lightning_modules.errors import ModelError
from lightning_modules.llm.random_models import RandomModel
from lightning_modules.llm.saving import save_model

if TYPE_CHECKING:
    from torch import Tensor, nn

AT_ONCE = 24  # texts that are read together
DAMPING = 0.02  # of the mean of the products' diagonal, added to it
_SHARES = (
    0.7,
    1.1,
    17,
)  # scales that are tried, of a block's largest weight
_COLUMNS = 64


@dataclass(frozen=True)
class Rounded:
    """A language model with its linear layers' weights on bitsandbytes' grid of 4 bits, made in the cache.

    What a layer's outputs are like is learned from texts that the model itself writes. A model of 7 billion
    weights takes 28 GB while it is made, on the first GPU or, without one, the CPU.

    Args:
        language_model: a wheel, a random model, a local folder or a hub id.
        revision: the full commit hash of a hub id; None for the others.
        grid: the values of ``quantization``, which the spec that loads it must name, too.
        block_size: weights that share a scale, as in that spec.
        texts, tokens: how many texts are written, of how many tokens each.
        seed: of the texts.

    Raises:
        ValueError: an unknown grid, or a number below 1.
    """

    language_model: Wheel | RandomModel | str
    revision: str | None = None
    grid: Literal["nf4", "fp4"] = "nf4"
    block_size: int = 32
    texts: int = 96
    tokens: int = 192
    seed: int = 0

    def __post_init__(self) -> None:
        if self.grid not in ("nf4", "fp4"):
            raise ValueError(f"grid must be nf4 or fp4, got {self.grid!r}")
        if min(self.block_size, self.texts, self.tokens) < 1:
            raise ValueError(
                f"block_size is {self.block_size}, texts {self.texts} and tokens {self.tokens}: expected "
                "positive numbers"
            )

    @property
    def name(self) -> str:
        """The model and the grid."""
        part = self.language_model
        whole = part if isinstance(part, str) else getattr(part, "package", None) or part.name
        return f"{Path(whole).name}-{self.grid}-{self.block_size}"

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
            self.language_model, self.revision, "float32", chat_template=False, max_length=1
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer, model = load_tokenizer(spec), load_causal_lm(spec, device)
        texts = _written(model, tokenizer, self.texts, self.tokens, self.seed)
        round_model(model, texts.split(AT_ONCE), grid_of(self.grid).to(device), self.block_size)
        save_model(model.cpu(), folder)
        tokenizer.save_pretrained(folder)


def _written(model: Any, tokenizer: Any, count: int, tokens: int, seed: int) -> Tensor:
    """(N, T) token ids that the model writes by itself, from the token that texts begin with."""
    import torch

    first = tokenizer.bos_token_id
    start = torch.full((count, 1), tokenizer.eos_token_id if first is None else first)
    start = start.to(model.device)
    cuda = [start.device] if start.is_cuda else []
    with torch.random.fork_rng(devices=cuda), _bar(tokens, "writing texts to round by") as bar:

        def tick(texts: Tensor, *unused: Any, **others: Any) -> Tensor:
            bar.update()
            return torch.zeros(len(texts), dtype=torch.bool, device=texts.device)  # (N,) none ends

        torch.manual_seed(seed)
        written: Tensor = model.generate(
            input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, top_k=50,
            temperature=1.0, top_p=1.0, min_new_tokens=tokens, max_new_tokens=tokens, use_cache=True,
            pad_token_id=tokenizer.pad_token_id, stopping_criteria=[tick],
        )  # fmt: skip
    return written


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

    layers = decoder_layers(model)
    for layer in layers:
        for name, part in _linear(layer):
            if part.in_features % block_size:
                raise ModelError(
                    f"{name} has {part.in_features} inputs, no whole number of blocks of {block_size} "
                    "weights: take a smaller block_size"
                )
    with torch.inference_mode():
        states, beside = _first_inputs(model, layers, texts)
        bar = _bar(len(layers), "rounding layers")
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


def round_weight(weight: Tensor, products: Tensor, grid: Tensor, block_size: int) -> Tensor:
    """A layer's weights on the grid, times a scale for each block; each block's largest is at an end of it.

    So bitsandbytes, whose scale is a block's largest weight, finds the same scales and the same values. The
    columns whose inputs are largest are rounded first, when there are most others to make up for them.

    Args:
        weight: (O, I).
        products: (I, I) float64, the sum of x x^T over the layer's inputs x.
        grid: (G,) ascending, from -1 to 1.
        block_size: a divisor of I.

    Returns:
        (O, I) of the weight's type.
    """
    import torch

    width = weight.shape[1]
    left = weight.to(products)  # (O, I), what is still to be rounded
    sizes = products.diagonal()  # (I,)
    scales, largest = _scales(left, sizes, grid.to(products), block_size)  # (O, I / block) each
    ends = left.gather(1, largest).sign() * scales
    order = sizes.argsort(descending=True, stable=True)
    columns = order.tolist()
    # How an error in a column is made up for by the later ones: rows of the inverse's Cholesky factor.
    damped = products + torch.eye(width).to(products) * (DAMPING * sizes.mean()).clamp_min(1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    pull = torch.linalg.cholesky(inverse, upper=True)  # (I, I)
    left, found = left[:, order], torch.empty_like(left)
    for start in range(0, width, _COLUMNS):  # as algorithm 1: the far columns are told once a block
        stop = min(start + _COLUMNS, width)
        errors = torch.empty_like(left[:, start:stop])
        for place in range(start, stop):
            column, block = columns[place], columns[place] // block_size
            value = _nearest(left[:, place], scales[:, block], grid)
            value = torch.where(largest[:, block] == column, ends[:, block], value)
            error = (left[:, place] - value) / pull[place, place]  # (O,)
            left[:, place:stop] -= error[:, None] * pull[place, place:stop]
            found[:, column], errors[:, place - start] = value, error
        left[:, stop:] -= errors @ pull[start:stop, stop:]
    return found.to(weight.dtype)


def _scales(weight: Tensor, sizes: Tensor, grid: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """For each block the scale that loses least, and its largest weight's column, (O, I / block) each."""
    import torch

    blocks = weight.unflatten(1, (-1, block_size))  # (O, I / block, block)
    weights = sizes.view(-1, block_size)
    most, places = blocks.abs().max(-1)
    most = most.clamp_min(1e-12)
    best, least = most, torch.full_like(most, torch.inf)
    for share in torch.linspace(*_SHARES).tolist():
        scale = most * share
        lost = _nearest(blocks, scale[..., None], grid).sub_(blocks).square_().mul_(weights).sum(-1)
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    columns = places + torch.arange(len(weights), device=weight.device) * block_size
    return best, columns


def _nearest(values: Tensor, scale: Tensor, grid: Tensor) -> Tensor:
    """The value of the scaled grid that is nearest to each."""
    import torch

    between = (grid[1:] + grid[:-1]) / 2
    return grid[torch.bucketize(values / scale, between)] * scale


def _bar(total: int, what: str) -> Any:
    """A bar of something that takes longer than two seconds; a log file needs few lines of it."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds
    return tqdm(total=total, desc=what, unit="", delay=2, mininterval=interval)


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
