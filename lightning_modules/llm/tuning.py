"""``LanguageModelModule``: a language model with an adapter, loaded, started, trained and exported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor
from torch.optim import AdamW

from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import adapter_is_untrained, attach_adapter
from lightning_modules.llm.backbones import (
    load_causal_lm,
    load_tokenizer,
    recompute_activations,
    resolve_dtype,
)
from lightning_modules.llm.export import export_model
from lightning_modules.llm.guards import (
    digests,
    has_constant_start,
    moved,
    require_frozen,
    require_same_adapter,
    require_source,
    require_trained,
    some,
)
from lightning_modules.llm.label_scoring import last_logits
from lightning_modules.llm.memory import memory_report
from lightning_modules.llm.precision import QLoRAPrecision, paged_adamw_8bit, refuse_sharding
from lightning_modules.llm.reloading import Reloaded, rounding_prompts, tell_written
from lightning_modules.llm.sharding import ShardedStrategy, shard
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.starts import SPEC, start_adapter, starts_like
from lightning_modules.loss_settings import refuse_rates
from lightning_modules.schedules import Schedule, learning_rate_share, scheduled
from lightning_modules.stage_module import StageModule

OptimizerName = Literal["adamw", "paged_adamw_8bit"]


class LanguageModelModule(StageModule):
    """Base of the methods that train an adapter of a language model, whatever they train it on.

    Args:
        llm: the frozen language model.
        adapter: what of it is trained.
        start: where the adapter's first weights come from: an adapter's folder in PEFT's format, or a
            checkpoint of a module of this kind; None starts it anew. It must be such an adapter, of such a
            language model.
        optimizer: ``adamw``, or ``paged_adamw_8bit`` with a quarter of its state, which the GPU may page out
            (QLoRA, arXiv 2305.14314); for GPUs.
        learning_rate: peak of AdamW.
        weight_decay: decoupled, on all that is trained.
        betas: of AdamW.
        warmup_steps: steps of linear warm-up.
        schedule: what follows.
        options: of a further base class.

    Raises:
        ValueError: ``start`` without an adapter that could start there, or an optimizer that cannot be.
    """

    def __init__(
        self,
        llm: BackboneSpec,
        adapter: AdapterSpec,
        start: str | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 20,
        schedule: Schedule = "linear",
        optimizer: OptimizerName = "adamw",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if optimizer not in get_args(OptimizerName):
            known = " or ".join(get_args(OptimizerName))
            raise ValueError(f"optimizer is {optimizer!r}, expected {known}")
        refuse_rates(
            betas, learning_rate=learning_rate, weight_decay=weight_decay, warmup_steps=warmup_steps
        )
        if start and adapter.method == "none":
            raise ValueError(f"the adapter is none, so that nothing can start from {start}")
        self.llm, self.adapter = llm, adapter
        self.start = Path(start).expanduser() if start else None
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup_steps, self.schedule, self.optimizer = warmup_steps, schedule, optimizer
        self.model: Any = None
        self.recomputes = False  # activations, in the backward pass
        self._begun: dict[str, str] = {}  # digests of what is trained, before any step
        self._frozen: dict[str, str] = {}  # and of what is not
        self._reloaded: Reloaded | None = None  # what was read, until it has been looked at

    @cached_property
    def tokenizer(self) -> Any:
        """Of the language model."""
        return load_tokenizer(self.llm)

    @property
    def source(self) -> Path | None:
        """Where the adapter's weights come from, if from anywhere."""
        return self._weights or self.start

    # The model -----------------------------------------------------------------------------------------

    def precision_plugin(self, device: str, strategy: str) -> Precision | None:
        """4-bit where the language model is quantized, else what its dtype asks for."""
        if self.llm.quantization:
            refuse_sharding(strategy)
            return QLoRAPrecision.for_spec(self.llm)
        dtype = resolve_dtype(self.llm, device)
        if dtype == torch.float32:
            return None
        if dtype == torch.float16 and strategy == "fsdp":
            raise ModelError(
                "launch.strategy=fsdp computes in bfloat16 or float32: take llm.dtype=bfloat16"
            )
        return MixedPrecision("bf16-mixed" if dtype == torch.bfloat16 else "16-mixed", device)

    def sharded_strategy(self, devices: int) -> ShardedStrategy:
        """FSDP2, layer by layer."""
        return ShardedStrategy(devices)

    def untrainable(self, trainer: pl.Trainer) -> str | None:
        """An optimizer that is not for the device or the strategy."""
        if self.optimizer == "paged_adamw_8bit":
            if not isinstance(trainer.accelerator, CUDAAccelerator):
                return (
                    "optimizer paged_adamw_8bit keeps its state on a GPU, and there is none here: "
                    "take optimizer: adamw"
                )
            if isinstance(trainer.strategy, ShardedStrategy):
                return (
                    "optimizer paged_adamw_8bit cannot step weights that are spread over devices: take "
                    "optimizer: adamw (its state is spread, too), or launch.strategy=ddp"
                )
        return super().untrainable(trainer)

    def setup(self, stage: str) -> None:
        """Refuse to test an adapter without weights, before the language model is loaded.

        Raises:
            ModelError: see ``require_source``.
        """
        super().setup(stage)
        if stage in ("test", "predict") and self.model is None:
            require_source(self.adapter, self.source)

    def configure_model(self) -> None:
        """Load the language model onto this rank's own device and attach the adapter, once."""
        if self.model is not None:
            return
        strategy: Any = self.trainer.strategy
        plugin, device = self.trainer.precision_plugin, strategy.root_device
        seed: int = self.trainer.datamodule.seed  # type: ignore[attr-defined]
        if isinstance(strategy, ShardedStrategy):
            # No device has to hold the whole model: it is read into the host's memory, and split.
            dtype: Any = str(resolve_dtype(self.llm, device)).removeprefix("torch.")
            self._load(replace(self.llm, dtype=dtype), torch.device("cpu"), None, seed)
            shard(self.model, strategy.device_mesh["data_parallel"])
            return
        config = plugin.quantization_config(device) if isinstance(plugin, QLoRAPrecision) else None
        self._load(self.llm, device, config, seed)

    @property
    def is_sharded(self) -> bool:
        """Whether each device holds a part of every weight."""
        return isinstance(self.trainer.strategy, ShardedStrategy)

    def on_validation_start(self) -> None:
        """Ranks keep pace."""
        self._keep_pace(self.trainer.num_val_batches)

    def on_test_start(self) -> None:
        """Ranks keep pace, and what is tested was trained, see ``on_predict_start``."""
        self._require_trained()
        self._keep_pace(self.trainer.num_test_batches)

    def on_predict_start(self) -> None:
        """What is asked was trained, and is as it was saved."""
        self._require_trained()

    def _require_trained(self, ask: bool = True) -> None:
        require_trained(self.model, self.adapter, self.source)
        if self._reloaded is not None:
            self._reloaded.require(self, ask)
            self._reloaded = None  # once is enough

    def _keep_pace(self, batches: list[int | float]) -> None:
        """Read a token for each batch that other ranks have more: split layers run on all ranks or none."""
        if not self.is_sharded:
            return
        mine = int(sum(batches))
        most = self.all_gather(torch.tensor(mine, device=self.device)).max()  # type: ignore[union-attr]
        token = torch.ones(1, 1, dtype=torch.long, device=self.device)
        for _ in range(int(most) - mine):
            with self.trainer.precision_plugin.forward_context():
                last_logits(self.model, token, token)

    def _load(self, spec: BackboneSpec, device: torch.device, config: Any, seed: int) -> None:
        base = load_causal_lm(spec, device, config, lambda: self.rounded_by)
        self.model = attach_adapter(base, self.adapter, seed)
        if self.recomputes:
            recompute_activations(self.model)
        self.add_parts(device, seed)
        self.take_weights()
        if self._weights is None and self.start is not None:
            self._reloaded = start_adapter(self, self.start)
        # Not at the fit's start: a fit that is resumed begins elsewhere.
        self._begun = digests(some(self._adapted()))

    def calibration_prompts(self) -> list[str]:
        """What ``llm.rounding=gptq`` rounds by, of nobody's history; nothing: by the model's own texts."""
        return []

    @cached_property
    def rounded_by(self) -> list[str]:
        """What it does round by: of a checkpoint, what that was trained on."""
        return rounding_prompts(self)

    def _adapted(self) -> Iterator[tuple[str, Tensor]]:
        """What of the language model is trained."""
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def add_parts(self, device: torch.device, seed: int) -> None:
        """What a method trains beside the language model: made when that is there, before any weights are."""

    def checkpoint_activations(self) -> None:
        """Recompute each layer in the backward pass, once the model is loaded.

        Raises:
            ModelError: the adapter is ``prefix``, whose keys and values reach no layer that is recomputed.
        """
        if self.adapter.method == "prefix":
            raise ModelError(
                "adapter prefix hands keys and values to layers, which recomputed layers do not take: set "
                "launch.activation_checkpointing=false, or take module.adapter.method=prompt or lora"
            )
        self.recomputes = True

    def remarks(self) -> list[str]:
        """What a quantized model's weights take."""
        told = super().remarks()
        if self.llm.quantization is None or self.model is None:
            return told
        return [*told, f"{self.llm.kept}: {memory_report(self.model).told}"]

    def export(self, folder: Path, device: torch.device) -> dict[str, Path]:
        """Write the model with the weights of ``load_weights``, see ``export_model``; needs no trainer."""
        quantized = self.llm.quantization is not None
        plugin = QLoRAPrecision.for_spec(self.llm) if quantized else None
        config = plugin.quantization_config(device) if plugin else None
        self._load(self.llm, device, config, seed=0)
        self._require_trained(ask=False)
        return export_model(self.model, self.tokenizer, self.adapter, folder)

    # Checkpoints ---------------------------------------------------------------------------------------

    @property
    def has_parts(self) -> bool:
        """The language model."""
        return self.model is not None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained, of what kind it is (weights do not tell alpha), and what it answers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[SPEC] = asdict(self.adapter)
        tell_written(self, checkpoint)

    def require_same_settings(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """The adapter's, which ``on_save_checkpoint`` has kept; notes what must be found later.

        Raises:
            ModelError: see ``require_same_adapter`` and ``Reloaded``.
        """
        super().require_same_settings(path, checkpoint)
        require_same_adapter(path, checkpoint.get(SPEC), self.adapter)
        self._reloaded = Reloaded.of(path, checkpoint, self)

    # Training ------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained, with the schedule by step."""
        trained = [p for p in self.parameters() if p.requires_grad]
        make = paged_adamw_8bit if self.optimizer == "paged_adamw_8bit" else AdamW
        optimizer = make(
            trained, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        steps, rise = int(self.trainer.estimated_stepping_batches), self.warmup_steps
        share = partial(learning_rate_share, steps=steps, rise=rise, schedule=self.schedule)
        return scheduled(optimizer, share)

    def on_fit_start(self) -> None:
        """Note what must not move. Of split weights nobody holds enough to look at without gathering them."""
        self._reloaded = None  # what was read is trained on
        self._frozen = {} if self.is_sharded else digests(self._kept())

    def _kept(self) -> Iterator[tuple[str, Tensor]]:
        """What is frozen, of all parts; biases aside, which bitsandbytes' layers cast as they compute."""
        named = self.named_parameters()
        return ((n, p) for n, p in named if not p.requires_grad and not n.endswith("bias"))

    def on_train_end(self) -> None:
        """Sound the alarm when a fit has trained nothing, or what is frozen.

        Raises:
            ModelError: the adapter is as it was made, or as it was started from.
            RuntimeError: see ``require_frozen``.
        """
        steps = self.trainer.global_step
        if self._frozen:
            require_frozen(self._frozen, digests(self._kept()), steps)
        if self.start is not None:
            if starts_like(self.model, self.start):
                raise ModelError(
                    f"the adapter is still that of {self.start} after {steps} steps: look at the learning "
                    "rate and the loss"
                )
        elif has_constant_start(self.adapter):
            if adapter_is_untrained(self.model):
                raise ModelError(
                    f"the {self.adapter.method} adapter has not moved in {steps} steps: its "
                    "scores are those of the language model alone; look at the learning rate and the loss"
                )
        elif self._begun and not moved(self._begun, digests(some(self._adapted()))):
            raise ModelError(
                f"adapter {self.adapter.method} is as it was made after {steps} steps: look at the learning "
                "rate and the loss"
            )
