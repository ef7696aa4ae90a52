"""One-pass teaching of the models people train: tiny random configurations of transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attent.one_pass import OnePass
from tests.one_pass_learners import gradients, relative_error

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")

B, T, VOCABULARY = 6, 8, 50
KINDS = ("gpt2", "llama", "qwen2", "bert", "vit")
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def language_model(kind: str, dropout: float) -> nn.Module:
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=T,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    elif kind == "llama":
        config = transformers.LlamaConfig(
            **TEXT, intermediate_size=32, num_key_value_heads=1, attention_dropout=dropout
        )
    else:
        config = transformers.Qwen2Config(
            **TEXT, intermediate_size=32, num_key_value_heads=1, attention_dropout=dropout
        )
    return transformers.AutoModelForCausalLM.from_config(config)


def language_losses(model: nn.Module) -> Callable[..., Tensor]:
    def losses(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        labels = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
        per_token = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return per_token.sum(1) / (labels != -100).sum(1)

    return losses


def text_batch() -> dict[str, Tensor]:
    lengths = torch.tensor([8, 5, 8, 3, 6, 7])
    return {
        "input_ids": torch.randint(1, VOCABULARY, (B, T)),
        "attention_mask": (torch.arange(T) < lengths[:, None]).long(),
    }


def bert(dropout: float) -> tuple[nn.Module, Callable[..., Tensor], dict[str, Tensor]]:
    config = transformers.BertConfig(
        **TEXT, intermediate_size=32, max_position_embeddings=T, num_labels=4,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)

    def losses(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(input_ids, attention_mask).logits, labels, reduction="none")

    return model, losses, {**text_batch(), "labels": torch.randint(4, (B,))}


def vit(dropout: float) -> tuple[nn.Module, Callable[..., Tensor], dict[str, Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=4, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)

    def losses(pixel_values: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(pixel_values).logits, labels, reduction="none")

    return model, losses, {"pixel_values": torch.randn(B, 3, 8, 8), "labels": torch.randint(4, (B,))}


def learner(kind: str, dropout: float) -> tuple[nn.Module, Callable[..., Any], dict[str, Tensor]]:
    if kind in ("bert", "vit"):
        model, losses, batch = bert(dropout) if kind == "bert" else vit(dropout)
    else:
        model = language_model(kind, dropout)
        losses, batch = language_losses(model), text_batch()
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    return model.double().train(), losses, batch


#: Engine and, for the compile engine, backend. Inductor takes minutes for each model.
ENGINES = [(kind, engine, "aot_eager") for kind in KINDS for engine in ("eager", "two_pass", "compile")]


@pytest.mark.parametrize(("kind", "engine", "backend"), [*ENGINES, ("gpt2", "compile", "inductor")])
def test_gradients_equal_training_on_the_chosen_rows_alone(kind: str, engine: str, backend: str) -> None:
    torch._dynamo.reset()
    model, losses, batch = learner(kind, 0.0)
    step = OnePass(losses, engine=engine, compile_backend=backend)
    for chosen in ([4, 0, 3], [2], [5, 1, 1]):
        index = torch.tensor(chosen)
        step.backward(step(**batch), index)
        ours = gradients(model)
        losses(**{name: x[index] for name, x in batch.items()}).mean().backward()
        # Sums over rows run in another order than on the chosen rows alone: some hundred roundings of 1e-16.
        assert relative_error(ours, gradients(model)) < 1e-10
        assert step.report().engine == engine


@pytest.mark.parametrize("engine", ["eager", "compile"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_and_checkpointing_are_exact(kind: str, checkpointed: bool, engine: str) -> None:
    torch._dynamo.reset()
    model, losses, batch = learner(kind, 0.1)
    batch.pop("attention_mask", None)
    if "input_ids" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False  # or the model logs that it is, and a log call breaks the graph
    step = OnePass(losses, engine=engine, compile_backend="aot_eager")
    for chosen in ([4, 0, 3], [5, 1]):
        index = torch.tensor(chosen)
        pool = step(**batch)
        torch.autograd.backward(pool[index].mean(), retain_graph=True)
        truth = gradients(model)
        step.backward(pool, index)
        assert relative_error(gradients(model), truth) < 1e-10
