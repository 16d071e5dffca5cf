"""``LanguageModelModule``: a language model with an adapter, loaded, started, trained and exported."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.optim import AdamW

from lightning_modules.llm.adapters import adapter_is_untrained, attach_adapter
from lightning_modules.llm.backbones import (
    load_causal_lm,
    load_tokenizer,
    recompute_activations,
    resolve_dtype,
)
from lightning_modules.llm.export import export_model
from lightning_modules.llm.memory import memory_report
from lightning_modules.llm.precision import QLoRAPrecision, refuse_sharding
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.starts import SPEC, start_adapter, starts_like
from lightning_modules.schedules import Schedule, learning_rate_share, scheduled
from lightning_modules.stage_module import StageModule


class LanguageModelModule(StageModule):
    """Base of the methods that train an adapter of a language model, whatever they train it on.

    Args:
        llm: the frozen language model.
        adapter: what of it is trained.
        start: where the adapter's first weights come from: an adapter's folder in PEFT's format, or a
            checkpoint of a module of this kind; None starts it anew. It must be such an adapter, of such a
            language model.
        learning_rate: peak of AdamW.
        weight_decay: decoupled, on the trained matrices.
        betas: of AdamW.
        warmup_steps: steps of linear warm-up.
        schedule: what follows.
        options: of a further base class.

    Raises:
        ValueError: ``start`` without an adapter that could start there.
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
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if start and adapter.method == "none":
            raise ValueError(f"the adapter is none, so that nothing can start from {start}")
        self.llm, self.adapter = llm, adapter
        self.start = Path(start).expanduser() if start else None
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.model: Any = None
        self._weights: Path | None = None
        self.recomputes = False  # activations, in the backward pass

    @cached_property
    def tokenizer(self) -> Any:
        """Of the language model."""
        return load_tokenizer(self.llm)

    # The model -----------------------------------------------------------------------------------------

    def precision_plugin(self, device: str, strategy: str) -> Precision | None:
        """4-bit where the language model is quantized, else what its dtype asks for."""
        if self.llm.quantization:
            refuse_sharding(strategy)
            return QLoRAPrecision.for_spec(self.llm)
        dtype = resolve_dtype(self.llm, device)
        if dtype == torch.float32:
            return None
        return MixedPrecision("bf16-mixed" if dtype == torch.bfloat16 else "16-mixed", device)

    def configure_model(self) -> None:
        """Load the language model onto this rank's own device and attach the adapter, once."""
        if self.model is not None:
            return
        device = self.trainer.strategy.root_device
        plugin = self.trainer.precision_plugin
        config = None
        if isinstance(plugin, QLoRAPrecision):
            config = plugin.quantization_config(device)
        self._load(device, config, self.trainer.datamodule.seed)  # type: ignore[attr-defined]

    def _load(self, device: torch.device, quantization_config: Any, seed: int) -> None:
        base = load_causal_lm(self.llm, device, quantization_config)
        self.model = attach_adapter(base, self.adapter, seed)
        if self.recomputes:
            recompute_activations(self.model)
        if self._weights is not None:
            super().load_weights(self._weights)
        elif self.start is not None:
            start_adapter(self.model, self.adapter, self.start)

    def checkpoint_activations(self) -> None:
        """Recompute each layer in the backward pass, once the model is loaded."""
        self.recomputes = True

    def remarks(self) -> list[str]:
        """What a quantized model's weights take."""
        if self.llm.quantization is None or self.model is None:
            return []
        report = memory_report(self.model)
        sizes = [report.total, report.dense("bfloat16"), report.dense("float32")]
        kept, half, full = (f"{size / 2**20:.0f} MiB" for size in sizes)
        return [
            f"{self.llm.quantization}: its weights take {kept} ({report.per_parameter:.2f} bytes each), in "
            f"bfloat16 they would take {half}, in float32 {full}"
        ]

    def export(self, folder: Path, device: torch.device) -> dict[str, Path]:
        """Write the model with the weights of ``load_weights``, see ``export_model``; needs no trainer."""
        quantized = self.llm.quantization is not None
        plugin = QLoRAPrecision.for_spec(self.llm) if quantized else None
        self._load(device, plugin.quantization_config(device) if plugin else None, seed=0)
        return export_model(self.model, self.tokenizer, self.adapter, folder)

    # Checkpoints ---------------------------------------------------------------------------------------

    def load_weights(self, path: str | Path) -> None:
        """Take a checkpoint's trained weights when the model is there."""
        self._weights = Path(path)
        if self.model is not None:
            super().load_weights(path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained, and what kind of adapter it is: alpha cannot be read off its weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[SPEC] = asdict(self.adapter)

    # Training ------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained, with the schedule by step."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = AdamW(
            trained, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        share = partial(
            learning_rate_share, steps=steps, rise=self.warmup_steps, schedule=self.schedule
        )
        return scheduled(optimizer, share)

    def on_train_end(self) -> None:
        """Sound the alarm when a fit has trained nothing.

        Raises:
            ValueError: the adapter is as it was made, or as it was started from.
        """
        steps = self.trainer.global_step
        if self.start is not None:
            if starts_like(self.model, self.start):
                raise ValueError(
                    f"the adapter is still that of {self.start} after {steps} steps: look at the learning "
                    "rate and the loss"
                )
            return
        # Vectors before the text have no start that tells whether they were trained.
        told = self.adapter.method not in ("none", "full") and not self.adapter.adds_tokens
        if told and adapter_is_untrained(self.model):
            raise ValueError(
                f"the {self.adapter.method} adapter has not moved in {steps} steps: its "
                "scores are those of the language model alone; look at the learning rate and the loss"
            )
