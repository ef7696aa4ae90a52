"""TRL's SFTTrainer with the mixin: its own loss, one forward pass a step, a score for each example, packed or not."""

from __future__ import annotations

import contextlib
import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from attent.integrations.transformers import TeachingArguments, TeachingMixin
from tests.ranks import on_ranks
from tests.test_transformers_trainer_distributed import as_rank
from tests.transformers_learners import Trace, V, language_model

# Importing TRL and what it needs takes seconds, so it is imported where it is used.
pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "to a multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    "packed, best fit": {"packing": True, "max_length": 12},
    "packed, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 12},
}


@functools.cache
def sft() -> Any:
    trl = pytest.importorskip("trl")

    class Taught(TeachingMixin, trl.SFTTrainer):  # type: ignore[misc]
        pass

    return Taught


def tokenizer() -> Any:
    import tokenizers
    import transformers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, V)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **named)


def corpus(count: int = 24) -> Any:
    datasets = pytest.importorskip("datasets")
    generator = torch.Generator().manual_seed(0)
    lengths = [3 + number % 7 for number in range(count)]
    words = [torch.randint(3, V, (length,), generator=generator).tolist() for length in lengths]
    return datasets.Dataset.from_list([{"text": " ".join(f"w{i}" for i in each)} for each in words])


def trainer(model: nn.Module, folder: Path, teaching: TeachingArguments | None = None, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    callbacks = options.pop("callbacks", [])
    usual = {"num_train_epochs": 4, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "bf16": False,
             "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no",
             "logging_strategy": "no"}  # fmt: skip
    args = trl.SFTConfig(str(folder), **{**usual, **options})
    return sft()(
        model, args, train_dataset=corpus(), processing_class=tokenizer(), callbacks=callbacks, teaching=teaching
    )


def plain_batch(taught: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch of the taught trainer, and the same without what the mixin put into it."""
    batch = next(iter(taught.get_train_dataloader()))
    return batch, {name: value for name, value in batch.items() if not name.startswith("example_")}


def rows_of(taught: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The batch's examples one by one, each as the trainer's own collator makes a batch of it."""
    dataset = taught._remove_unused_columns(taught.train_dataset)
    return [taught.data_collator([dataset[int(i)]]) for i in batch["example_id"]]


def example_loss(model: nn.Module, row: dict[str, Any]) -> Tensor:
    """The mean loss of a row by the model's own logits; its documents do not see each other."""
    labels = row.pop("labels")
    logits = model(**row).logits
    return nn.functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_trls_and_each_example_has_its_score(tmp_path: Path, layout: str) -> None:
    # In training mode all the while, which TRL logs by; the model has no dropout.
    model = language_model(attn_implementation="eager").double().train()
    teaching = TeachingArguments(score="head", per_example="mean")
    taught = trainer(model, tmp_path, teaching, **LAYOUTS[layout])
    batch, plain = plain_batch(taught)
    if "packing" in LAYOUTS[layout] and "wrapped" not in layout:
        packed = taught.train_dataset["seq_lengths"]
        assert len(packed) == len(taught.train_dataset) and max(len(lengths) for lengths in packed) > 1
    calls = 0

    def count(*anything: Any) -> None:
        nonlocal calls
        calls += 1

    model.model.register_forward_hook(count)
    for items in (None, torch.tensor(37)):
        expected = super(TeachingMixin, taught).compute_loss(model, dict(plain), num_items_in_batch=items)
        expected.backward()
        wanted = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        for first in (items is None, False):  # the first step of a run checks the head, with a pass of its own
            calls = 0
            loss = taught.compute_loss(model, dict(batch), num_items_in_batch=items)
            assert calls == 1 + first
            assert torch.equal(loss, expected)
            loss.backward()
            assert all(torch.equal(p.grad, wanted[name]) for name, p in model.named_parameters())
            model.zero_grad(set_to_none=True)
    taught.teacher.state_dict()
    recorded = taught.teacher._harvest.store.score[batch["example_id"]]
    for found, row in zip(recorded, rows_of(taught, batch), strict=True):
        (grad,) = torch.autograd.grad(example_loss(model, row), model.lm_head.weight)
        # float64 throughout; recorded in float32: one rounding, and attention over a padded row sums in another order.
        torch.testing.assert_close(found.double(), grad.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["padded", "packed, best fit"])
def test_weights_multiply_each_examples_loss_and_nothing_else(tmp_path: Path, layout: str) -> None:
    model = language_model(attn_implementation="eager").double().train()
    taught = trainer(model, tmp_path, TeachingArguments(reweight="inverse"), **LAYOUTS[layout])
    batch, _ = plain_batch(taught)
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0])
    taught.teacher.weights = lambda ids: weight
    loss = taught.compute_loss(model, dict(batch))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    rows = rows_of(taught, batch)
    counts = [(row["labels"][:, 1:] != -100).sum() for row in rows]
    each = [example_loss(model, row) * count for row, count in zip(rows, counts, strict=True)]
    expected = sum(w * one for w, one in zip(weight, each, strict=True)) / sum(counts)
    expected.backward()
    # TRL takes log-probabilities in float32: bounds as derived in test_transformers_trainer.py.
    torch.testing.assert_close(loss.double(), expected, rtol=4e-6, atol=0)
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("Cohere", {"logit_scale": 0.25}),
        (
            "Mixtral",
            {"output_router_logits": True, "router_aux_loss_coef": 0.5, "num_local_experts": 2,
             "experts_implementation": "eager"},
        ),
    ],
)  # fmt: skip
def test_softcap_scale_and_auxiliary_losses_are_trls(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = language_model(kind, **options).double().train()
    taught = trainer(model, tmp_path, TeachingArguments(score="loss", per_example="mean"))
    batch, plain = plain_batch(taught)
    expected = super(TeachingMixin, taught).compute_loss(model, dict(plain))
    assert torch.equal(taught.compute_loss(model, dict(batch)), expected)
    taught.teacher.state_dict()
    recorded = taught.teacher._harvest.store.score[batch["example_id"]]
    for found, row in zip(recorded, rows_of(taught, batch), strict=True):
        torch.testing.assert_close(found.double(), example_loss(model, row).detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_with_checkpoints_goes_on_after_a_crash_with_trls_figures(tmp_path: Path, packing: bool) -> None:
    def run(folder: Path, crash_after: int | None, resume: bool) -> Any:
        torch.manual_seed(3)
        options = {"packing": True, "max_length": 12} if packing else {}
        taught = trainer(
            language_model(attn_implementation="eager"), folder, TeachingArguments(score="head"),
            save_strategy="steps", save_steps=1, save_total_limit=2, logging_strategy="steps", logging_steps=1,
            callbacks=[Trace(crash_after)], **options,
        )  # fmt: skip
        with contextlib.suppress(KeyboardInterrupt):
            taught.train(resume_from_checkpoint=resume or None)
        return taught

    whole = run(tmp_path / "whole", None, False)
    run(tmp_path / "killed", 8, False)
    resumed = run(tmp_path / "killed", None, True)
    assert resumed.state.global_step == whole.state.max_steps == len(whole.state.log_history) - 1
    last, last_resumed = whole.state.log_history[-2], resumed.state.log_history[-2]
    for name in ("loss", "entropy", "mean_token_accuracy", "teaching/score_mean", "teaching/keep_ratio"):
        assert last[name] == last_resumed[name], name
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert whole.teacher.summary()["never_seen_ids"].numel() == 0


def test_lora_in_the_body_is_taught_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(language_model(attn_implementation="eager"), config)
    taught = trainer(model, tmp_path, packing=True, max_length=12)
    taught.train()
    assert taught.teacher.summary()["never_seen_ids"].numel() == 0


def sharded(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    as_rank(rank, 2)
    torch.manual_seed(3)
    model = language_model(attn_implementation="eager").double().train()
    whole = copy.deepcopy(model)
    teaching = TeachingArguments(score="head", reweight="inverse")
    taught, alone = (
        trainer(each, folder, teaching, average_tokens_across_devices=False, **LAYOUTS["packed, best fit"])
        for each in (model, whole)
    )
    batch, _ = plain_batch(alone)
    for each in (taught, alone):
        each.teacher.weights = lambda ids: torch.tensor([0.5, 2.0, 1.0, 0.25])[: len(ids)]
    for module in (*model.model.layers, model.lm_head):
        fully_shard(module)
    fully_shard(model, reshard_after_forward=True)
    for _ in range(2):
        loss, expected = (each.compute_loss(each.model, dict(batch)) for each in (taught, alone))
        assert torch.equal(loss, expected)
        loss.backward()
    for each in (taught, alone):
        each.teacher.state_dict()
    found, wanted = (each.teacher._harvest.store.score for each in (taught, alone))
    assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1)) and bool(found.isfinite().any())


def test_a_head_sharded_by_fsdp2_is_gathered_for_the_scores(tmp_path: Path) -> None:
    sft()  # imported before forking
    on_ranks(2, sharded, tmp_path / "meet", tmp_path / "run")


@pytest.mark.parametrize(
    ("option", "argument"), [({"loss_type": "dft"}, "loss_type"), ({"label_smoothing_factor": 0.1}, "label_smoothing")]
)
@pytest.mark.filterwarnings("ignore:.*label_smoothing:FutureWarning")
def test_a_loss_that_trl_computes_otherwise_is_refused(tmp_path: Path, option: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}.*: got .*score_func"):
        trainer(language_model(), tmp_path, **option)
