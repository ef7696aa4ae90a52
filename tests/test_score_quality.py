"""The benchmark of scores measures what it says: the true norm, rank correlations, and who is chosen."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attent.demo.data import load
from benchmarks.score_quality import (
    IGNORED,
    Examples,
    Learner,
    Scale,
    fixed_lengths,
    gpt,
    mixed_lengths,
    run,
    scaled,
    scores_of,
    shares_chosen,
    spearman,
    true_norms,
)
from benchmarks.small_gpt import read_texts

TEXT = (torch.arange(4096) * 7919 % 251).to(torch.uint8)


def test_the_true_norm_of_a_model_that_is_only_a_head_is_its_head_score() -> None:
    torch.manual_seed(1)
    head, width = nn.Linear(6, 11), 6
    lengths = torch.tensor([5, 2, 1])
    hidden = torch.randn(3, 5, width)

    def draw(count: int) -> Examples:
        raise AssertionError

    target = torch.randint(11, (3, 5)).masked_fill(torch.arange(5) >= lengths[:, None], IGNORED)
    table = hidden.flatten(0, 1)  # "input" names rows of a fixed table, so that one(i) can cut it like tokens
    examples = Examples(torch.arange(15).view(3, 5), target, lengths)
    learner = Learner(head, lambda input: table[input], head, draw)
    # Float32 sums of 5 × 11 products: relative errors of some 60 units of roundoff at the very most.
    torch.testing.assert_close(
        scores_of(learner, examples)["head"], true_norms(learner, examples)["all parameters"], rtol=60 * 2**-24, atol=0
    )


def test_embeddings_of_tokens_and_positions_are_left_out_where_it_says_so() -> None:
    learner = gpt(TEXT, Scale(), fixed_lengths, seed=0)
    examples = learner.draw(1)
    model = learner.model
    logits = learner.head(model(examples.input))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), examples.target.flatten(), reduction="sum")
    inner = [*model.blocks.parameters(), *model.norm.parameters(), *model.head.parameters()]
    squares = [gradient.square().sum() for gradient in torch.autograd.grad(loss, inner)]
    torch.testing.assert_close(true_norms(learner, examples)["all but embeddings"], sum(squares).sqrt()[None])


def test_padding_changes_neither_the_true_norms_nor_the_scores() -> None:
    learner = gpt(TEXT, Scale(length=8, lengths=(4, 12)), mixed_lengths, seed=0)
    examples = learner.draw(4)
    alone = [examples.one(i) for i in range(4)]
    together = scores_of(learner, examples)
    # Sums over other shapes round otherwise: 12 tokens through a few thousand products, well within 1e-4.
    for name, scores in together.items():
        by_one = torch.cat([scores_of(learner, example)[name] for example in alone])
        torch.testing.assert_close(scores, by_one, rtol=1e-4, atol=1e-6)
    junk = examples.input.masked_fill(torch.arange(examples.input.shape[1]) >= examples.lengths[:, None], 3)
    torch.testing.assert_close(true_norms(learner, examples), true_norms(learner, examples._replace(input=junk)))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 1000.0], 1.0),
        ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], -1.0),
        ([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], 4.5 / (4.5 * 5) ** 0.5),  # ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3
    ],
)
def test_spearman_correlates_ranks_and_equal_values_share_theirs(
    first: list[float], second: list[float], expected: float
) -> None:
    assert spearman(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected, abs=1e-12)


def test_shares_are_of_the_shortest_and_longest_third() -> None:
    lengths = torch.tensor([9.0, 1, 8, 2, 7, 3])
    assert shares_chosen(lengths, lengths) == {"short": 0.0, "long": 1.0}
    assert shares_chosen(-lengths, lengths) == {"short": 1.0, "long": 0.0}


def test_mean_rms_and_sum_are_the_norms_of_their_own_losses() -> None:
    values, lengths = torch.tensor([6.0, 6.0]), torch.tensor([4.0, 1.0])
    of: dict[str, Tensor] = {s: scaled(values, lengths, s) for s in ("mean", "rms", "sum")}
    assert {s: scaled.tolist() for s, scaled in of.items()} == {"mean": [1.5, 6], "rms": [3, 6], "sum": [6, 6]}


def test_the_whole_benchmark_runs_small(capsys: pytest.CaptureFixture[str]) -> None:
    scale = Scale(at=(0, 1), batch=4, examples=6, length=8, lengths=(4, 16))
    result = run(TEXT, load(), scale, seeds=2)
    mixed = result["learners"]["GPT, mixed lengths"]["steps"]
    assert [entry["step"] for entry in mixed] == [0, 1]
    assert [(row["score"], row["per_example"]) for row in mixed[0]["scores"]][:3] == [
        ("loss", "mean"),
        ("logit", "mean"),
        ("logit", "rms"),
    ]
    assert all(-1 <= row["spearman, all parameters"]["rms"]["mean"] <= 1 for row in mixed[1]["scores"])
    assert set(result["learners"]["ViT"]["steps"][0]["scores"][0]) == {
        "score",
        "per_example",
        "spearman, all parameters",
        "spearman, all but embeddings",
    }
    assert "ViT" in capsys.readouterr().out


def test_texts_come_from_a_folder_or_an_archive_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, content in {"b.txt": b"two", "a.txt": b"one", "c.md": b"no"}.items():
        (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "texts.tar.gz", "w:gz") as archive:
        for name, content in {"in/b.txt": b"two", "in/a.txt": b"one"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for source in (tmp_path, tmp_path / "texts.tar.gz"):
        assert bytes(read_texts(source).tolist()) == b"one\ntwo"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="--texts"):
        read_texts(empty)
