"""Tiny models of transformers, data for them, and a trainer that notes what each step was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from attent.integrations.transformers import TeachingTrainer

V, T, B = 48, 10, 4
TINY = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def language_model(kind: str = "Llama", **options: Any) -> nn.Module:
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=V,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **options,
        )
        return transformers.GPT2LMHeadModel(config)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**TINY, **options))
    with torch.no_grad():  # a head large enough for softcaps to bend logits, and for examples to differ
        model.lm_head.weight.normal_(0, 1)
    return model


def texts(count: int) -> list[dict[str, Tensor]]:
    items = []
    for number in range(count):
        length = 4 + number % (T - 4)
        ids = torch.randint(3, V, (T,)).where(torch.arange(T) < length, 0)
        items.append({
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": ids.masked_fill(ids == 0, -100),
            "remark": torch.tensor(number),  # a column that no model takes
        })  # fmt: skip
    return items


def arguments(folder: Path, **options: Any) -> Any:
    usual = {"num_train_epochs": 4, "per_device_train_batch_size": B, "report_to": [], "use_cpu": True,
             "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**usual, **options})


def batch_of(trainer: Any) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


def classifier(kind: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    labels = {"num_labels": 3}
    if kind == "ViT":
        config = transformers.ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1,
                                        num_attention_heads=2, intermediate_size=16, **labels)  # fmt: skip
        data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(8)]
        return transformers.ViTForImageClassification(config), data
    data = [{**item, "labels": i % 3} for i, item in enumerate(texts(8))]
    if kind == "Llama":
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TINY, **labels)), data
    small = {name: value for name, value in TINY.items() if name != "num_key_value_heads"}
    config = getattr(transformers, f"{kind}Config")(**small, **labels)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config), data


class Trace(transformers.TrainerCallback):  # type: ignore[misc]
    """What each step was trained on; may end the run like a crash, after a given step."""

    def __init__(self, crash_after: int | None = None) -> None:
        self.crash_after = crash_after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.crash_after:
            raise KeyboardInterrupt


class Traced(TeachingTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[int, list[int]] = {}

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.setdefault(self.state.global_step, []).extend(inputs["example_id"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)
