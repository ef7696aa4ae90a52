"""A pretrained sentence encoder (all-MiniLM-L6-v2) fine-tuned to say when a passage of the texts was spoken.

The label of a passage is the period of its address, of equally many addresses each. The encoder's lower layers stay as
they are, so what they make of each passage is computed once; the top ones are trained, in full or by LoRA.
"""

from __future__ import annotations

import copy
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import attent

from .variants import variant

DATA_SEED = 11


@dataclass(frozen=True)
class Sizes:
    """Passages of each part, their length in tokens, periods, layers that are trained, LoRA's rank (0: in full)."""

    train: int
    validation: int
    test: int
    length: int
    periods: int
    layers: int = 1
    rank: int = 0
    variant: str = "plain"


def addresses(source: str) -> list[str]:
    """All ``.txt`` files of a folder or tar archive, in the order of their names, which begin with the year."""
    path = Path(source).expanduser()
    if path.is_dir():
        return [file.read_text(errors="replace") for file in sorted(path.glob("*.txt"))]
    with tarfile.open(path) as archive:
        members = sorted((m for m in archive if m.isfile() and m.name.endswith(".txt")), key=lambda m: m.name)
        return [archive.extractfile(member).read().decode(errors="replace") for member in members]


class Data:
    """What the frozen layers make of each passage [N, T, D], and its period [N]; every seventh address is held out."""

    def __init__(self, folder: str, texts: list[str], sizes: Sizes, device: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.encoder = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        generator = torch.Generator().manual_seed(DATA_SEED)
        encoded = [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in texts]
        bounds = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        held_out = [number for number in range(len(texts)) if number % 7 == 3]
        kept = [number for number in range(len(texts)) if number % 7 != 3]

        def part(count: int, among: list[int]) -> tuple[Tensor, Tensor]:
            chosen = [among[int(i)] for i in torch.randint(len(among), (count,), generator=generator)]
            rows = []
            for number in chosen:
                tokens, inner = encoded[number], sizes.length - 2
                start = int(torch.randint(len(tokens) - inner, (1,), generator=generator))
                rows.append([bounds[0], *tokens[start : start + inner], bounds[1]])
            periods = torch.tensor([number * sizes.periods // len(texts) for number in chosen])
            return self._below(torch.tensor(rows), sizes.layers).to(device), periods

        hidden, labels = part(sizes.train, kept)
        ids, labels = variant(sizes.variant, labels, sizes.periods, sizes.train)
        self.hidden, self.labels = hidden[ids.to(device)], labels.to(device)
        self.parts = {}
        for name, count in (("validation", sizes.validation), ("test", sizes.test)):
            held, periods = part(count, held_out)
            self.parts[name] = (held, periods.to(device))

    @torch.no_grad()
    def _below(self, tokens: Tensor, layers: int) -> Tensor:
        made = [self.encoder(some, output_hidden_states=True).hidden_states[-1 - layers] for some in tokens.split(100)]
        return torch.cat(made)


class _Top(nn.Module):
    """The encoder's last layers, their mean over the tokens, and a classifier."""

    def __init__(self, encoder: nn.Module, sizes: Sizes) -> None:
        super().__init__()
        self.layers = copy.deepcopy(encoder.encoder.layer[-sizes.layers :]).eval()  # no dropout
        self.head = nn.Linear(encoder.config.hidden_size, sizes.periods)

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, D] -> [B, D]
        for layer in self.layers:
            made = layer(hidden)
            hidden = made[0] if isinstance(made, tuple) else made
        return hidden.mean(1)


class SentenceClassifier:
    """Metric: accuracy, per cent."""

    def __init__(self, data: Data, sizes: Sizes, device: str) -> None:
        self.data = data
        self.num_examples = len(data.hidden)
        top = _Top(data.encoder, sizes).to(device)
        self.head = top.head
        self.top: nn.Module = top
        if sizes.rank:
            from peft import LoraConfig, get_peft_model

            targets = ["query", "key", "value", "dense"]
            config = LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules=targets)
            self.top = get_peft_model(top, config)
            self.head.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.top.parameters() if parameter.requires_grad]

    def batch(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self.data.hidden[ids], self.data.labels[ids]

    def losses(self, *batch: Tensor, score: str | None) -> tuple[Tensor, Tensor | None]:
        hidden, labels = batch
        result = attent.linear_cross_entropy(
            self.top(hidden),
            self.head.weight,
            labels,
            linear_bias=self.head.bias,
            reduction="example",
            score=score,
        )
        return (result, None) if score is None else result

    @torch.no_grad()
    def evaluate(self, part: str) -> float:
        right = 0
        for hidden, labels in zip(*(tensor.split(100) for tensor in self.data.parts[part]), strict=True):
            right += int((self.head(self.top(hidden)).argmax(1) == labels).sum())
        return 100 * right / len(self.data.parts[part][1])
