"""Finding the layer whose output the loss is taken of, and what the model does to that output on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ..._checks import refuse

_WAY_OUT = (
    "pass score_func=lambda outputs, inputs: scores [B], computed for instance by attent.example_scores or "
    "attent.gradient_scores from what the model returned"
)


@dataclass(frozen=True)
class Head:
    """A plain ``nn.Linear`` and the elementwise step between its output z and the logits: c·tanh(scale·z/c)."""

    linear: nn.Linear
    name: str
    language: bool  # a language model's (labels shifted by one); else a classifier of the whole example
    scale: float
    softcap: float | None

    def logits(self, output: Tensor) -> Tensor:
        """What the model is expected to make of the head's ``output``."""
        output = output if self.scale == 1 else output * self.scale
        return output if self.softcap is None else self.softcap * (output / self.softcap).tanh()

    def check(self, output: Tensor, logits: Tensor) -> None:
        """Refuse a model that makes something else of it; reads values back, so once per run.

        Either side rounds each of three steps (scale, tanh, cap) once, in the narrower dtype: at most 3 eps, and the
        division before tanh, whose slope is at most 1, another two. 8 eps is out of reach of rounding only.
        """
        expected = self.logits(output).float()
        eps = torch.finfo(output.dtype).eps
        if expected.shape != logits.shape or not torch.allclose(
            logits.float(), expected, rtol=8 * eps, atol=8 * eps * float(expected.abs().max() if len(expected) else 0)
        ):
            refuse(
                "model",
                f"one whose logits are not the output of {self.name!r} times {self.scale:g}"
                + ("" if self.softcap is None else f", capped at {self.softcap:g}"),
                f"a plain head, a constant scale and a softcap; otherwise {_WAY_OUT}",
            )


def find_head(model: Any, name: str | None) -> Head:
    """The head of a causal language model, a sequence or an image classifier, PEFT's around it included.

    ``name``: the module's dotted name in the model (in PEFT's base model); None: found by the model's class.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(base).__name__
    language = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    classifier = kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values() or (
        kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    )
    if not (language or classifier):
        takes = f"a causal language model, a sequence or an image classifier of transformers; for others, {_WAY_OUT}"
        refuse("model", kind, takes)
    if name is None:
        name = _language_head(base) if language else _classifier(base)
    try:
        module = base.get_submodule(name)
    except AttributeError:
        refuse("head", repr(name), f"the dotted name of a module of {kind}")
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    if classifier:
        problem = getattr(base.config, "problem_type", None)
        if problem not in (None, "single_label_classification") or base.config.num_labels < 2:
            got = f"a {kind} with problem_type={problem!r}, num_labels={base.config.num_labels}"
            refuse("model", got, f"single-label classification of two classes or more; for other losses, {_WAY_OUT}")
        return Head(_plain_linear(module, name), name, False, 1.0, None)
    return Head(_plain_linear(module, name), name, True, *_logit_steps(base, config))


def _language_head(base: Any) -> str:
    output = base.get_output_embeddings()
    for name, module in base.named_modules():
        if module is output:
            return str(name)
    refuse("head", f"no output embeddings in {type(base).__name__}", f"the head's dotted name, head=...; or {_WAY_OUT}")


def _classifier(base: Any) -> str:
    """The one linear layer outside the backbone that has an output per class."""
    backbone = getattr(base, "base_model_prefix", "") or "\0"
    found = [
        name
        for name, module in base.named_modules()
        if hasattr(module, "out_features")
        and module.out_features == base.config.num_labels
        and not (name == backbone or name.startswith(backbone + "."))
        and not _inside_adapter(name)
    ]
    names = sorted({name.split(".modules_to_save.")[0].removesuffix(".original_module") for name in found})
    if len(names) != 1:
        got = f"{len(names)} candidates in {type(base).__name__}: {', '.join(names) or 'no linear layer'}"
        refuse("head", got, f"the dotted name of the layer with num_labels outputs, head=...; or {_WAY_OUT}")
    name: str = names[0]
    return name


def _inside_adapter(name: str) -> bool:
    return any(part in name.split(".") for part in ("lora_A", "lora_B", "base_layer"))


def _plain_linear(module: Any, name: str) -> nn.Linear:
    """The ``nn.Linear`` that runs, PEFT's ``modules_to_save`` copy of it among them; adapters in it are refused."""
    wrapped: Any = getattr(module, "modules_to_save", None)
    if wrapped is not None:
        active: Any = module.active_adapters
        module = wrapped[active[0]] if active and active[0] in wrapped else module.original_module
    if type(module) is not nn.Linear:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        adapted = hasattr(module, "lora_A") or hasattr(module, "base_layer")
        advice = (
            f"keep adapters out of the head (leave {name!r} out of target_modules, or train it whole with "
            "modules_to_save)"
            if adapted
            else "the name of the linear layer, head=..."
        )
        refuse("head", f"{name!r}, a {kind}", f"a plain torch.nn.Linear: {advice}; or {_WAY_OUT}")
    return module


def _logit_steps(base: Any, config: Any) -> tuple[float, float | None]:
    """Scale and softcap by the names that transformers' models give them; :meth:`Head.check` sees what this misses."""
    scale = 1.0
    if getattr(base, "logit_scale", None) is not None:  # Cohere
        scale = float(base.logit_scale)
    elif getattr(config, "logits_scaling", None):  # Granite
        scale = 1 / float(config.logits_scaling)
    elif getattr(config, "lm_head_multiplier", None):  # FalconH1
        scale = float(config.lm_head_multiplier)
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return scale, None if softcap is None else float(softcap)
