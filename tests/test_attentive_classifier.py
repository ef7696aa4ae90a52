"""attent.AttentiveClassifier: the same logits with and without labels, losses and scores of the op behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attent
from attent import AttentiveClassifier

# float32: attention and two matrix products with sums of at most 32 terms of size about 1, eps 1.2e-7.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def classifier(**options: Any) -> AttentiveClassifier:
    return AttentiveClassifier(embed_dim=32, num_heads=4, num_classes=10, **options)


@pytest.mark.parametrize("pool_queries", [1, 3])
@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 1, 0, 4, 6])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_are_the_same_with_and_without_labels(
    pool_queries: int, lengths: Tensor | None, dtype: torch.dtype
) -> None:
    model = classifier(pool_queries=pool_queries).to(dtype)
    tokens, labels = torch.randn(5, 7, 32).to(dtype), torch.tensor([0, 9, 3, 3, 1])
    logits = model(tokens, key_lengths=lengths)
    out = model(tokens, labels, key_lengths=lengths)
    assert logits.dtype == out.logits.dtype == dtype
    if dtype == torch.bfloat16:
        # Attention runs in bfloat16 without labels, in float32 with. Probabilities and output are rounded: pooled
        # features move by twice eps of the largest value, logits by that times the L1 norm of a class's weights, and
        # by one rounding.
        with torch.no_grad():
            pooled = 2 * float(model.value_proj(tokens).abs().max())
            largest = pooled * float(model.readout.weight.abs().sum(1).max()) + float(logits.abs().max())
        budget = torch.finfo(dtype).eps * largest
        torch.testing.assert_close(out.logits, logits, rtol=0, atol=budget)
    else:
        torch.testing.assert_close(out.logits, logits, **FLOAT32)
    assert out.output is None and out.logsumexp is None


def test_losses_scores_and_gradients_are_those_of_cross_entropy_on_its_logits() -> None:
    model = classifier(pool_queries=2).double()
    tokens, labels = torch.randn(6, 5, 32).double().requires_grad_(), torch.randint(10, (6,))
    parameters = [tokens, *model.parameters()]
    losses = F.cross_entropy(model(tokens), labels, reduction="none")
    for score in ("logit", "head", "loss"):
        out = model(tokens, labels, score=score)
        torch.testing.assert_close(out.losses, losses)
        torch.testing.assert_close(
            torch.autograd.grad(out.losses.mean(), parameters),
            torch.autograd.grad(losses.mean(), parameters, retain_graph=True),
        )
        if score == "head":
            for i in range(6):
                own = torch.autograd.grad(losses[i], list(model.readout.parameters()), retain_graph=True)
                torch.testing.assert_close(out.scores[i], torch.cat([g.flatten() for g in own]).norm())


def test_the_lesson_is_the_top_of_its_scores() -> None:
    out = classifier()(torch.randn(8, 5, 32), torch.randint(10, (8,)), top_k=3)
    assert out.selection.index.tolist() == attent.select_top_k(out.scores, 3).index.tolist()
    drawn = classifier()(torch.randn(8, 5, 32), torch.randint(10, (8,)), top_k=3, temperature=1.0, floor=0.4, seed=1)
    assert drawn.selection.index.shape == (3,) and (drawn.selection.inclusion < 1).all()


def test_padding_is_never_read() -> None:
    model, tokens, lengths = classifier(), torch.randn(3, 5, 32), torch.tensor([5, 2, 0])
    labels = torch.tensor([1, 2, 3])
    padded = tokens.clone()
    padded[1, 2:] = padded[2] = torch.nan
    for arguments in ((), (labels,)):
        results = [model(t, *arguments, key_lengths=lengths) for t in (tokens, padded)]
        logits = [r.logits if arguments else r for r in results]
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)


def test_starts_near_the_mean_of_the_tokens_and_the_uniform_prediction() -> None:
    torch.manual_seed(0)
    model = AttentiveClassifier(embed_dim=256, num_heads=4, num_classes=10)
    tokens, labels = torch.randn(64, 50, 256), torch.randint(10, (64,))
    out = model(tokens, labels)
    assert abs(float(out.losses.detach().mean()) - torch.tensor(10.0).log()) < 0.1
    with torch.no_grad():
        mean = model.value_proj(tokens).mean(1)
    cosine = F.cosine_similarity(out.pooled.detach(), mean, dim=1)
    assert 0.5 < float(cosine.mean()) < 1 - 1e-4  # near the mean, and not it


@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32)])
def test_empty_batches_and_sequences_give_empty_results_and_the_bias(shape: tuple[int, ...]) -> None:
    model, labels = classifier(), torch.zeros(shape[0], dtype=torch.int64)
    torch.nn.init.normal_(model.readout.bias)
    out = model(torch.randn(shape), labels, top_k=0)
    assert out.losses.shape == out.scores.shape == (shape[0],) and out.selection.index.shape == (0,)
    for logits in (out.logits, model(torch.randn(shape))):
        torch.testing.assert_close(logits, model.readout.bias.expand(shape[0], 10))
    out.losses.sum().backward()


def test_its_parameters() -> None:
    shapes = {name: tuple(p.shape) for name, p in classifier(pool_queries=3).named_parameters()}
    assert shapes == {
        "query": (3, 4, 8),
        "key_proj.weight": (32, 32),
        "value_proj.weight": (32, 32),
        "value_proj.bias": (32,),
        "readout.weight": (10, 32),
        "readout.bias": (10,),
    }


def test_trains_under_autocast() -> None:
    model, tokens, labels = classifier(), torch.randn(4, 5, 32), torch.tensor([0, 1, 2, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens, labels)
        assert out.logits.dtype == model(tokens).dtype == torch.bfloat16
    out.losses.mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model, tokens, labels = classifier(), torch.randn(4, 5, 32), torch.tensor([0, 1, 2, 3])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([1, 5, 3, 2])
    torch.testing.assert_close(compiled(tokens, key_lengths=lengths), model(tokens, key_lengths=lengths))
    out, expected = compiled(tokens, labels, key_lengths=lengths), model(tokens, labels, key_lengths=lengths)
    torch.testing.assert_close(out.losses, expected.losses)
    torch.testing.assert_close(
        torch.autograd.grad(out.losses.sum(), list(model.parameters())),
        torch.autograd.grad(expected.losses.sum(), list(model.parameters())),
    )


def test_one_pass_trains_it_on_the_chosen_rows_of_its_own_lesson() -> None:
    model, tokens, labels = classifier(pool_queries=2).double(), torch.randn(12, 7, 32).double(), torch.arange(12) % 10
    lengths = torch.arange(12) % 7 + 1

    def per_example_loss(tokens: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out = model(tokens, labels, key_lengths=lengths, score="head")
        return out.losses, out.scores

    step = attent.OnePass(per_example_loss, engine="eager")
    losses, scores = step(tokens, labels, lengths)
    chosen = attent.select_top_k(scores, 5).index
    parameters = list(model.parameters())
    found = torch.autograd.grad(step.loss(losses, chosen), parameters)
    expected = model(tokens[chosen], labels[chosen], key_lengths=lengths[chosen]).losses.mean()
    torch.testing.assert_close(found, torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize(
    ("argument", "numbers"),
    [
        ("embed_dim", (0, 1, 2)),
        ("embed_dim", (2.0, 1, 2)),
        ("num_heads", (8, 0, 2)),
        ("num_heads", (8, 3, 2)),
        ("num_classes", (8, 2, 0)),
        ("pool_queries", (8, 2, 2, 0)),
    ],
)
def test_bad_sizes_are_refused_by_name(argument: str, numbers: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: got .*; takes "):
        AttentiveClassifier(*numbers)


@pytest.mark.parametrize(
    ("argument", "tokens", "options"),
    [
        ("tokens", torch.zeros(4, 5, 31), {}),
        ("tokens", torch.zeros(4, 32), {}),
        ("tokens", torch.zeros(4, 5, 32, dtype=torch.int64), {}),
        ("tokens", torch.zeros(4, 5, 32, dtype=torch.float64), {}),
        ("key_lengths", torch.zeros(4, 5, 32), {"key_lengths": torch.tensor([6, 1, 1, 1])}),
        ("key_lengths", torch.zeros(4, 5, 32), {"key_lengths": torch.tensor([1, 1])}),
        (
            "key_lengths",
            torch.zeros(4, 5, 32),
            {"key_lengths": torch.tensor([6, 1, 1, 1]), "target": torch.zeros(4).long()},
        ),
        ("readout.target", torch.zeros(4, 5, 32), {"target": torch.full((4,), 10)}),
        ("score", torch.zeros(4, 5, 32), {"target": torch.zeros(4).long(), "score": "hidden"}),
        ("top_k", torch.zeros(4, 5, 32), {"target": torch.zeros(4).long(), "top_k": 5}),
    ],
)
def test_bad_input_is_refused_by_name(argument: str, tokens: Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: got .*; takes "):
        classifier()(tokens, **options)


def test_an_adapted_readout_is_refused_rather_than_half_used() -> None:
    class Adapted(torch.nn.Linear):
        pass

    model = classifier()
    model.readout = Adapted(32, 10)
    with pytest.raises(ValueError, match=r"^readout: got Adapted; takes "):
        model(torch.zeros(4, 5, 32), torch.zeros(4).long())
