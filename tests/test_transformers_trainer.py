"""TeachingTrainer: the plain Trainer's loss, a schedule that fits the lessons, and exact resume."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attent
import attent.checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from attent.integrations.transformers import TeachingArguments, TeachingMixin, TeachingTrainer  # noqa: E402

V, T, B = 48, 10, 4
TINY = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def language_model(kind: str = "Llama", **options: Any) -> nn.Module:
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=V,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **options,
        )
        return transformers.GPT2LMHeadModel(config)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**TINY, **options))
    with torch.no_grad():  # a head large enough for softcaps to bend logits, and for examples to differ
        model.lm_head.weight.normal_(0, 1)
    return model


def texts(count: int) -> list[dict[str, Tensor]]:
    items = []
    for number in range(count):
        length = 4 + number % (T - 4)
        ids = torch.randint(3, V, (T,)).where(torch.arange(T) < length, 0)
        items.append({
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": ids.masked_fill(ids == 0, -100),
            "remark": torch.tensor(number),  # a column that no model takes
        })  # fmt: skip
    return items


def arguments(folder: Path, **options: Any) -> Any:
    usual = {"num_train_epochs": 4, "per_device_train_batch_size": B, "report_to": [], "use_cpu": True,
             "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**usual, **options})


def batch_of(trainer: Any) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


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


def classifier(kind: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    labels = {"num_labels": 3}
    if kind == "ViT":
        config = transformers.ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1,
                                        num_attention_heads=2, intermediate_size=16, **labels)  # fmt: skip
        data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(8)]
        return transformers.ViTForImageClassification(config), data
    data = [{**item, "labels": i % 3} for i, item in enumerate(texts(8))]
    if kind == "Llama":
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TINY, **labels)), data
    small = {name: value for name, value in TINY.items() if name != "num_key_value_heads"}
    config = getattr(transformers, f"{kind}Config")(**small, **labels)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config), data


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


# ------------------------------------------------------------------------------------------------- the run as planned


class Trace(transformers.TrainerCallback):  # type: ignore[misc]
    """What each step was trained on; may end the run like a crash, after a given step."""

    def __init__(self, crash_after: int | None = None) -> None:
        self.crash_after = crash_after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.crash_after:
            raise KeyboardInterrupt


class Traced(TeachingTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[int, list[int]] = {}

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.setdefault(self.state.global_step, []).extend(inputs["example_id"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


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


def saving_trainer(folder: Path, *callbacks: Any) -> Traced:
    torch.manual_seed(3)
    data = texts(20)
    args = arguments(folder, save_strategy="steps", save_steps=1, save_total_limit=2)
    return Traced(language_model(attention_dropout=0.2), args, train_dataset=data, callbacks=list(callbacks))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    trainer = saving_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


# Steps: 5, 3, 3, 5. The checkpoint before step 3 lies within the warm-up, 6: between two epochs, 7: in a reduced one.
@pytest.mark.parametrize("crash_after", [7, 6, pytest.param(3, marks=pytest.mark.slow)])
def test_after_a_crash_the_lesson_goes_on_bit_identically(tmp_path: Path, whole: Traced, crash_after: int) -> None:
    killed = saving_trainer(tmp_path, Trace(crash_after))
    with contextlib.suppress(KeyboardInterrupt):
        killed.train()
    resumed = saving_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    begun = min(resumed.seen)
    assert begun == crash_after - 1  # step `crash_after` was trained, not saved
    assert resumed.seen == {step: ids for step, ids in whole.seen.items() if step >= begun}
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert resumed.lr_scheduler.get_last_lr() == [0.0, 0.0]


def test_a_torn_state_is_never_left_and_a_checkpoint_without_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=3, num_train_epochs=2)
    trainer = TeachingTrainer(language_model(), args, train_dataset=texts(12))
    trainer.train()
    assert not list(tmp_path.rglob(".teacher*"))
    state = tmp_path / "checkpoint-3" / "teacher.pt"
    saved = state.read_bytes()

    def torn(state: object, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        attent.checkpoint.write_state({}, state)
    assert state.read_bytes() == saved and not list(tmp_path.rglob(".teacher*"))
    state.unlink()
    with pytest.raises(ValueError, match=r"^checkpoint: got no .*teacher\.pt"):
        trainer.train(resume_from_checkpoint=str(state.parent))


def test_resuming_with_another_global_batch_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trainer = TeachingTrainer(language_model(), args, train_dataset=texts(20), callbacks=[Trace(crash_after=4)])
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    args = arguments(tmp_path, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="same global batch"):
        TeachingTrainer(language_model(), args, train_dataset=texts(20)).train(resume_from_checkpoint=True)


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


def test_the_id_passes_a_users_collator_that_knows_nothing_of_it(tmp_path: Path) -> None:
    def strict(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all(set(item) == {"input_ids", "attention_mask", "labels"} for item in items)
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    data = texts(8)
    trainer = TeachingTrainer(language_model(), arguments(tmp_path), train_dataset=data, data_collator=strict)
    batch = batch_of(trainer)
    assert all(torch.equal(batch["input_ids"][row], data[i]["input_ids"]) for row, i in enumerate(batch["example_id"]))
    assert trainer.data_collator is strict


def test_padding_free_batches_are_scored_by_example(tmp_path: Path) -> None:
    model = language_model(attn_implementation="eager").eval()
    data = [{"input_ids": item["input_ids"][item["input_ids"] > 0].tolist()} for item in texts(4)]
    collator = transformers.DataCollatorWithFlattening(return_tensors="pt")
    trainer = TeachingTrainer(
        model, arguments(tmp_path), train_dataset=data, data_collator=collator, teaching=TeachingArguments(score="loss")
    )
    batch = batch_of(trainer)
    assert batch["input_ids"].shape[0] == 1 and len(batch["example_id"]) == 4
    model.training = True
    trainer.compute_loss(model, dict(batch))
    trainer.teacher.state_dict()
    scores = trainer.teacher._harvest.store.score
    for number, item in enumerate(data):
        ids = torch.tensor([item["input_ids"]])
        torch.testing.assert_close(scores[number], model(input_ids=ids, labels=ids).loss.detach(), rtol=1e-4, atol=1e-5)


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
