"""TeachingTrainer's checkpoints: a run that ends like a crash goes on as if it had not."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import attent.checkpoint

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from attent.integrations.transformers import TeachingTrainer
from tests.transformers_learners import Trace, Traced, arguments, language_model, texts


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


@pytest.mark.parametrize("torn", ["trainer_state.json", "teacher.pt", "model.safetensors"])
def test_a_newest_checkpoint_that_was_cut_off_costs_its_steps_only(tmp_path: Path, whole: Traced, torn: str) -> None:
    killed = saving_trainer(tmp_path, Trace(8))
    with contextlib.suppress(KeyboardInterrupt):
        killed.train()
    newest = tmp_path / "checkpoint-7"
    file = newest / torn
    file.write_bytes(file.read_bytes()[: random.randrange(file.stat().st_size)])
    if torn == "model.safetensors":  # whatever the trainer was writing, its own state was yet to come
        (newest / "trainer_state.json").unlink()
    resumed = saving_trainer(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"checkpoint-7 is not whole"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.seen == {step: ids for step, ids in whole.seen.items() if step >= 6}
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
