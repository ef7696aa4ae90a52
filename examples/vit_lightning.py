"""A small vision transformer in Lightning with a teacher, on part of Fashion-MNIST, and wrong labels to find.

    python examples/vit_lightning.py                             # under a minute
    python examples/vit_lightning.py --ratio 1 --out runs/full   # all images in every epoch, to compare with
    attent report runs/vit --compare runs/full                   # what was chosen, and what is suspected

What a teacher adds to a LightningModule: its callback, its sampler, scores in what ``training_step`` returns. The model
ends in ``attent.AttentiveClassifier``, whose one operation gives losses and scores. 2 % of the training labels are
replaced at random, and those that the report suspects are counted at the end.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attent
from attent.demo.data import CLASSES, Images, load
from attent.integrations.lightning import TeachingCallback
from attent.report import TeachingLog, read_log

PATCH, WIDTH, HEADS, DEPTH, BATCH = 7, 64, 4, 2, 64
WRONG_LABELS = 0.02


class VisionTransformer(nn.Module):
    """16 patches of an image, PyTorch's own encoder, and an attention pool with a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, DEPTH, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.classifier = attent.AttentiveClassifier(WIDTH, HEADS, len(CLASSES))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """Logits [B, classes] of images [B, 28, 28]; with labels [B], losses and scores of each."""
        tokens = self.embed(images[:, None]).flatten(2).transpose(1, 2) + self.position  # [B, 16, WIDTH]
        return self.classifier(self.encoder(tokens), labels)


class Learner(lightning.LightningModule):
    def __init__(self, images: Images, labels: Tensor, teacher: attent.Teacher, out: Path) -> None:
        super().__init__()
        self.model, self.teacher, self.teaching = VisionTransformer(), teacher, TeachingCallback(teacher)
        self.train_set = TensorDataset(images.train_images, labels)
        self.test_set = TensorDataset(images.test_images, images.test_labels)
        self.teaching_log = TeachingLog(
            out, teacher, group_names=list(CLASSES), picture=lambda i: images.pixels(torch.tensor([i]))
        )

    def train_dataloader(self) -> Any:
        return DataLoader(attent.indexed(self.train_set), batch_sampler=self.teaching.sampler(batch_size=BATCH))

    def val_dataloader(self) -> Any:
        return DataLoader(self.test_set, batch_size=500)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _, images, labels = batch
        out = self.model(images, labels)
        return {"loss": out.losses.mean(), "scores": out.scores}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.teaching_log.metric("accuracy", float(self.trainer.callback_metrics["accuracy"]), self.global_step)

    def on_train_epoch_end(self) -> None:
        self.teaching_log.lesson(self.global_step, groups=self.train_set.tensors[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)
        steps = self.teacher.total_steps(batch_size=BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000, help="train on so many")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--out", type=Path, default=Path("runs/vit"))
    args = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    images = load()
    labels = images.train_labels[: args.images].clone()
    wrong = torch.rand(len(labels)) < WRONG_LABELS
    labels[wrong] = (labels[wrong] + torch.randint(1, len(CLASSES), (int(wrong.sum()),))) % len(CLASSES)
    images = Images(images.name, images.train_images[: len(labels)], labels, images.test_images, images.test_labels)

    learner = Learner(images, labels, attent.Teacher(len(labels), total_epochs=args.epochs, ratio=args.ratio), args.out)
    warnings.filterwarnings("ignore", module="lightning")  # its advice about workers and loggers
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        callbacks=[learner.teaching],
        reload_dataloaders_every_n_epochs=1,  # epochs differ in length
        use_distributed_sampler=False,  # the teacher's sampler knows its ranks
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner)
    print(learner.teacher.summary())
    shown = [example["id"] for example in read_log(args.out)[-1]["suspected"]["first"]]
    if shown:
        found, usual = int(wrong[shown].sum()), float(wrong.float().mean())
        print(f"\nof {len(shown)} images shown as suspected, {found} have a wrong label; of all images, {usual:.1%}")
    print(f"\naccuracy on {len(images.test_labels)} images not trained on: {trainer.callback_metrics['accuracy']:.3f}")
    print(f"for the report: attent report {args.out}")


if __name__ == "__main__":
    main()
