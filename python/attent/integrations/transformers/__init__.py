"""Teaching in the Trainer of Hugging Face's transformers (5 or newer), and in anyone's subclass of it."""

from __future__ import annotations

from .arguments import TeachingArguments
from .trainer import TeachingMixin, TeachingTrainer

__all__ = ["TeachingArguments", "TeachingMixin", "TeachingTrainer"]
