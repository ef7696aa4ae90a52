"""TeachingTrainer: the plain Trainer's loss, a schedule that fits the lessons, and exact resume."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attent

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from attent.integrations.transformers import TeachingArguments, TeachingMixin, TeachingTrainer  # noqa: E402
from tests.transformers_learners import TINY, B, Traced, arguments, batch_of, classifier, language_model, texts  # noqa: E402


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare_with_the_plain_trainer(
    tmp_path: Path, model: nn.Module, teaching: TeachingArguments, **options: Any
) -> None:
    """Loss and gradients of one batch in float64; transformers takes the softmax in float32, which is all that differs.

    That rounds each of the 30 or so token losses, and their sum at each step: 2·30·6e-8 = 4e-6 of the loss at most. A
    token's gradient p − q is off by some 6e-8·(V + 2) of itself, 3e-6; 1e-5 of a tensor's norm leaves room for
    cancellation between tokens.
    """
    model = model.double()
    data = texts(8)
    ours = TeachingTrainer(model, arguments(tmp_path, **options), train_dataset=data, teaching=teaching)
    plain = transformers.Trainer(model, arguments(tmp_path, **options), train_dataset=data)
    batch = batch_of(ours)
    without_id = {name: value for name, value in batch.items() if name != "example_id"}
    model.train()
    for items in (None, torch.tensor(37)):
        expected = plain.compute_loss(model, dict(without_id), num_items_in_batch=items)
        expected.backward()
        wanted = gradients(model)
        model.zero_grad(set_to_none=True)
        for _ in range(2):  # the first step checks the head, the later ones make no logits at all
            loss = ours.compute_loss(model, dict(batch), num_items_in_batch=items)
            loss.backward()
            assert abs(loss.item() - expected.item()) <= 4e-6 * expected.item()
            found = gradients(model)
            assert found.keys() == wanted.keys()
            for name, grad in found.items():
                assert (grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
            model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("GPT2", {}),
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 8.0}),
        (
            "Mixtral",
            {
                "output_router_logits": True,
                "router_aux_loss_coef": 0.5,
                "num_local_experts": 2,
                "experts_implementation": "eager",
            },
        ),
    ],
)
def test_a_language_models_loss_is_the_plain_trainers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    compare_with_the_plain_trainer(tmp_path, language_model(kind, **options), TeachingArguments(score="head"))


def test_label_smoothing_is_the_plain_trainers_too(tmp_path: Path) -> None:
    compare_with_the_plain_trainer(tmp_path, language_model(), TeachingArguments(), label_smoothing_factor=0.2)


def test_with_keep_logits_the_model_computes_its_own_loss(tmp_path: Path) -> None:
    compare_with_the_plain_trainer(tmp_path, language_model(), TeachingArguments(keep_logits=True))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Llama", "ViT"])
@pytest.mark.parametrize("score", ["logit", "head"])
def test_a_classifiers_head_is_found_and_its_score_is_the_gradients_norm(tmp_path: Path, kind: str, score: str) -> None:
    model, data = classifier(kind)
    model.eval()  # without dropout: two passes must agree; compute_loss is told otherwise below
    trainer = TeachingTrainer(
        model,
        arguments(tmp_path, remove_unused_columns=True),
        train_dataset=data,
        teaching=TeachingArguments(score=score),
    )
    batch = batch_of(trainer)
    model.training = True
    trainer.compute_loss(model, dict(batch))
    trainer.teacher.state_dict()
    recorded = trainer.teacher._harvest.store.score[batch["example_id"]]

    head = model.get_submodule(trainer._scored_loss.head.name)
    inputs = {name: value for name, value in batch.items() if name not in ("example_id", "labels")}
    for row, label in enumerate(batch["labels"]):
        logits = model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
        loss = nn.functional.cross_entropy(logits, label[None])
        wanted = [logits] if score == "logit" else list(head.parameters())
        norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)]).norm()
        torch.testing.assert_close(recorded[row], norm, rtol=1e-4, atol=1e-6)  # float32 through one layer


def test_weights_multiply_each_examples_loss_and_nothing_else(tmp_path: Path) -> None:
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0])
    language = (language_model(), texts(8))
    for keep, (model, data) in ((False, language), (True, language), (False, classifier("Bert"))):
        model = model.double().eval()
        trainer = TeachingTrainer(
            model,
            arguments(tmp_path),
            train_dataset=data,
            teaching=TeachingArguments(reweight="inverse", keep_logits=keep),
        )
        batch = batch_of(trainer)
        trainer.teacher.weights = lambda ids: weight  # type: ignore[method-assign]
        model.training = True
        loss = trainer.compute_loss(model, dict(batch))
        inputs = {name: value for name, value in batch.items() if name not in ("example_id", "labels")}
        logits, labels = model(**inputs).logits, batch["labels"]
        if labels.dim() == 2:
            logits, labels = logits[:, :-1].transpose(1, 2), labels[:, 1:]
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
        each = each.sum(1) if each.dim() == 2 else each
        torch.testing.assert_close(loss.double(), (each * weight).sum() / (labels != -100).sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
def test_weights_beside_the_models_own_loss_do_what_they_do_in_the_fused_one(tmp_path: Path, kind: str) -> None:
    """Of padding-free batches (Llama) and beside an auxiliary loss (Mixtral): same value, same gradients.

    The model takes its softmax in float32: bounds as in compare_with_the_plain_trainer.
    """
    experts = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "num_local_experts": 2}
    model = language_model(kind, **({**experts, "experts_implementation": "eager"} if kind == "Mixtral" else {}))
    model, data, collate = model.double(), texts(8), None
    if kind == "Llama":
        model.set_attn_implementation("eager")
        documents = [item["input_ids"][item["input_ids"] > 0].tolist() for item in data]
        data, collate = [{"input_ids": row, "documents": [row]} for row in documents], flattened
    found = []
    for keep in (False, True):
        trainer = TeachingTrainer(
            model,
            arguments(tmp_path, remove_unused_columns=False),
            train_dataset=[{name: value for name, value in item.items() if name != "remark"} for item in data],
            data_collator=collate,
            teaching=TeachingArguments(reweight="inverse", keep_logits=keep),
        )
        batch = batch_of(trainer)
        trainer.teacher.weights = lambda ids: torch.tensor([0.5, 2.0, 1.0, 0.0])  # type: ignore[method-assign]
        model.train()
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        found.append((loss.detach(), gradients(model)))
        model.zero_grad(set_to_none=True)
    (loss, wanted), (loss_beside, beside) = found
    torch.testing.assert_close(loss_beside.double(), loss, rtol=4e-6, atol=0)
    for name, grad in beside.items():
        assert (grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


# ------------------------------------------------------------------------------------------------- the run as planned


@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_learning_rate_and_epoch_follow_the_lessons(tmp_path: Path, drop_last: bool) -> None:
    args = arguments(
        tmp_path,
        gradient_accumulation_steps=3,
        logging_strategy="steps",
        logging_steps=1,
        dataloader_drop_last=drop_last,
    )
    trainer = Traced(language_model(), args, train_dataset=texts(30), teaching=TeachingArguments(ratio=0.45))
    trainer.train()
    assert trainer.teacher.epoch_sizes() == [30, 14, 14, 30]
    steps = [3, 1, 1, 3] if drop_last else [3, 2, 2, 3]  # 30 / 4 is 7 or 8 batches, 14 / 4 is 3 or 4; windows of 3
    assert trainer.state.global_step == trainer.state.max_steps == sum(steps)
    assert trainer.state.max_steps == trainer.teacher.total_steps(B, 3, drop_last=drop_last)
    assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["epoch"] for entry in logged if float(entry["epoch"]).is_integer()] == [1, 2, 3, 4]
    ends = [sum(steps[: epoch + 1]) for epoch in range(4)]
    assert [logged[end - 1]["epoch"] for end in ends] == [1, 2, 3, 4]
    assert {"teaching/score_mean", "teaching/keep_ratio", "teaching/seconds"} <= set(logged[0])
    assert all(len(set(ids)) == len(ids) for ids in trainer.seen.values())


def test_the_teachers_figures_reach_the_trainers_loggers_as_scalars_beside_the_loss(tmp_path: Path) -> None:
    """As TensorBoard's and Weights & Biases' callbacks get them: by ``on_log``, renamed by ``rewrite_logs``."""
    from transformers.integrations.integration_utils import rewrite_logs

    class Recording(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.logged: list[dict[str, Any]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.logged.append({"step": state.global_step, **rewrite_logs(logs)})

    recording = Recording()
    args = arguments(tmp_path, logging_strategy="epoch", eval_strategy="epoch")
    trainer = TeachingTrainer(
        language_model(), args, train_dataset=texts(16), eval_dataset=texts(4), callbacks=[recording]
    )
    trainer.train()
    losses = [logs for logs in recording.logged if "train/loss" in logs]
    ours = {name for logs in recording.logged for name in logs if "teaching" in name}
    assert ours == {f"train/teaching/{name}" for name in ("score_mean", "keep_ratio", "seconds", "turnover")}
    assert all(isinstance(logs[name], float) for logs in losses for name in ours & set(logs))
    assert all(set(logs).isdisjoint(ours) for logs in recording.logged if "train/loss" not in logs)
    assert [logs["step"] for logs in losses] == [4, 6, 8, 12]
    assert [logs["train/teaching/keep_ratio"] for logs in losses] == [1.0, 0.5, 0.5, 1.0]
    seconds = [logs["train/teaching/seconds"] for logs in losses]
    assert seconds == sorted(seconds) and seconds[0] > 0
    # The second reduced lesson is the first that may differ from one before.
    turnover = trainer.teacher.summary()["turnover"]
    assert [logs.get("train/teaching/turnover") for logs in losses] == [None, None, turnover[0], turnover[0]]


# ------------------------------------------------------------------------------------------- others' trainers and data


def test_the_mixin_serves_a_trainer_with_a_loss_of_its_own(tmp_path: Path) -> None:
    class Doubling(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    class Mine(TeachingMixin, Doubling):
        pass

    model = language_model().eval()
    ours, plain = (kind(model, arguments(tmp_path), train_dataset=texts(8)) for kind in (Mine, TeachingTrainer))
    batch = batch_of(ours)
    model.training = True
    torch.testing.assert_close(ours.compute_loss(model, dict(batch)), 2 * plain.compute_loss(model, dict(batch)))


def test_a_trainer_that_reads_logits_while_training_gets_them_with_keep_logits(tmp_path: Path) -> None:
    class Reading(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            self.accuracy = (outputs.logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:]).float().mean()
            return (loss, outputs) if return_outputs else loss

    class Mine(TeachingMixin, Reading):
        pass

    for keep in (True, False):
        teaching = TeachingArguments(keep_logits=keep)
        trainer = Mine(language_model(), arguments(tmp_path), train_dataset=texts(8), teaching=teaching)
        # Without, the logits are empty after the first step: an error, never a wrong number.
        with contextlib.nullcontext() if keep else pytest.raises(RuntimeError, match="size of tensor"):
            trainer.train()
            assert 0 <= float(trainer.accuracy) <= 1


def test_the_id_passes_a_users_collator_that_knows_nothing_of_it(tmp_path: Path) -> None:
    def strict(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all(set(item) == {"input_ids", "attention_mask", "labels"} for item in items)
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    data = texts(8)
    trainer = TeachingTrainer(language_model(), arguments(tmp_path), train_dataset=data, data_collator=strict)
    batch = batch_of(trainer)
    assert all(torch.equal(batch["input_ids"][row], data[i]["input_ids"]) for row, i in enumerate(batch["example_id"]))
    assert trainer.data_collator is strict


def flattened(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """All documents of all rows in one row, as TRL's packing does it: positions start at 0 with each document."""
    documents = [torch.tensor(document) for row in rows for document in row["documents"]]
    labels = [torch.cat([torch.tensor([-100]), document[1:]]) for document in documents]
    positions = [torch.arange(len(document)) for document in documents]
    parts = {"input_ids": documents, "labels": labels, "position_ids": positions}
    return {name: torch.cat(part)[None] for name, part in parts.items()}


@pytest.mark.parametrize("keep_logits", [False, True])
def test_padding_free_batches_are_scored_by_example_which_may_hold_several_documents(
    tmp_path: Path, keep_logits: bool
) -> None:
    model = language_model(attn_implementation="eager").eval()
    documents = [item["input_ids"][item["input_ids"] > 0].tolist() for item in texts(7)]
    rows = [documents[:2], documents[2:3], documents[3:6], documents[6:]]
    data = [{"input_ids": sum(row, []), "documents": row} for row in rows]  # noqa: RUF017
    teaching = TeachingArguments(score="loss", keep_logits=keep_logits)
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = TeachingTrainer(model, args, train_dataset=data, data_collator=flattened, teaching=teaching)
    batch = batch_of(trainer)
    assert batch["input_ids"].shape[0] == 1 and len(batch["example_id"]) == 4
    model.training = True
    trainer.compute_loss(model, dict(batch))
    trainer.teacher.state_dict()
    scores = trainer.teacher._harvest.store.score
    for number, row in enumerate(rows):
        tokens = [torch.tensor([document]) for document in row]
        losses = [model(input_ids=ids, labels=ids).loss.detach() * (ids.numel() - 1) for ids in tokens]
        expected = sum(losses) / sum(ids.numel() - 1 for ids in tokens)
        # float32: attention over 30 positions, most of them masked, against the document alone.
        torch.testing.assert_close(scores[number], expected, rtol=1e-4, atol=1e-5)


def test_a_collator_that_drops_tokens_of_a_padding_free_batch_is_refused(tmp_path: Path) -> None:
    data = [{"input_ids": [3, 4, 5, 6], "documents": [[3, 4, 5]]} for _ in range(4)]
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = TeachingTrainer(language_model(), args, train_dataset=data, data_collator=flattened)
    with pytest.raises(ValueError, match=r"^data_collator: got one that made 12 tokens in one row of 16"):
        batch_of(trainer)


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_mixed_precision_and_a_second_training_run_through(tmp_path: Path, kind: str) -> None:
    model, data = (language_model(), texts(8)) if kind == "Llama" else classifier(kind)
    args = arguments(tmp_path, num_train_epochs=2, bf16=True)
    trainer = TeachingTrainer(model, args, train_dataset=data, teaching=TeachingArguments(reweight="inverse"))
    for _ in range(2):
        trainer.train()
        assert trainer.state.global_step == trainer.state.max_steps == 3
        summary = trainer.teacher.summary()
        assert summary["never_seen_ids"].numel() == 0 and summary["nonfinite_scores"] == 0


def test_peft_serves_a_plain_head_and_refuses_an_adapter_in_it_by_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    body = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(language_model(), body)
    trainer = TeachingTrainer(model, arguments(tmp_path, num_train_epochs=2), train_dataset=texts(8))
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert trainer.teacher.summary()["never_seen_ids"].numel() == 0

    base, data = classifier("Bert")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    trainer = TeachingTrainer(model, arguments(tmp_path, num_train_epochs=1), train_dataset=data)
    trainer.train()
    assert trainer.teacher.summary()["never_seen_ids"].numel() == 0

    model = peft.get_peft_model(language_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"head: got 'lm_head', a peft\..*keep adapters out of the head"):
        TeachingTrainer(model, arguments(tmp_path), train_dataset=texts(8))


def test_a_model_of_another_kind_is_taught_by_a_score_func(tmp_path: Path) -> None:
    small = {name: value for name, value in TINY.items() if name != "num_key_value_heads"}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**small))
    with pytest.raises(ValueError, match=r"model: got BertForMaskedLM.*pass score_func"):
        TeachingTrainer(model, arguments(tmp_path), train_dataset=texts(8))
    trainer = TeachingTrainer(
        model,
        arguments(tmp_path, num_train_epochs=2),
        train_dataset=texts(8),
        score_func=lambda outputs, inputs: attent.example_scores(outputs.logits, inputs["labels"]),
    )
    trainer.train()
    assert trainer.teacher.summary()["never_seen_ids"].numel() == 0


def test_a_model_that_changes_its_logits_unseen_is_refused_in_the_first_step(tmp_path: Path) -> None:
    model = language_model("Cohere", logit_scale=0.5)
    trainer = TeachingTrainer(model, arguments(tmp_path), train_dataset=texts(8))
    model.logit_scale = 0.25  # what the trainer found is no longer what the model does
    with pytest.raises(ValueError, match=r"model: got one whose logits .* of 'lm_head' times 0\.5"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"max_steps": 5}, "max_steps"),
        ({"num_train_epochs": 1.5}, "num_train_epochs"),
        ({"ignore_data_skip": True}, "ignore_data_skip"),
    ],
)
def test_what_contradicts_the_plan_is_refused_at_construction(
    tmp_path: Path, options: dict[str, Any], argument: str
) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        TeachingTrainer(language_model(), arguments(tmp_path, **options), train_dataset=texts(8))


def test_the_options_parse_beside_the_trainers() -> None:
    parser = transformers.HfArgumentParser((transformers.TrainingArguments, TeachingArguments))
    args, teaching = parser.parse_args_into_dataclasses(["--output_dir", "x", "--ratio", "0.7", "--warmup", "2"])
    assert (args.output_dir, teaching.ratio, teaching.warmup, teaching.score) == ("x", 0.7, 2, "logit")
    assert attent.Teacher(10, total_epochs=4, **teaching.teacher_options(seed=5)).epoch_sizes() == [10, 10, 7, 10]


def test_a_run_leaves_a_log_for_the_report(tmp_path: Path) -> None:
    from attent.report.log import read_log

    model, data = classifier("Bert")
    args = arguments(tmp_path, eval_strategy="epoch", logging_strategy="epoch")
    trainer = TeachingTrainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    events = read_log(tmp_path)
    assert [event["asked"] for event in events if event["event"] == "lesson"] == [8, 4, 4, 8]
    coverage = [event for event in events if event["event"] == "lesson"][-1]["coverage"]
    assert coverage["group"]["examples"] == [3, 3, 2] and sum(coverage["length"]["examples"]) == 8
    assert {event["name"] for event in events if event["event"] == "metric"} >= {"loss", "eval_loss"}
