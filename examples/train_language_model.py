"""Train a small Llama from nothing on texts of yours, byte by byte, with transformers' Trainer and a teacher.

    python examples/train_language_model.py                             # the standard library's docstrings; 2 minutes
    python examples/train_language_model.py --texts letters.txt         # or a folder, all of whose .txt files are read
    python examples/train_language_model.py --ratio 1 --out runs/full   # all rows in every epoch, to compare with
    attent report runs/language --compare runs/full

Texts are joined and cut into rows before training, so a row is an example: the teacher chooses rows, and packing is
done. Choosing is by the "head" score, the norm of each row's gradient in the output layer. No logits are made:
the loss and the scores come from the last hidden states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pretrained import docstrings, trainer_options, training_arguments


def read_texts(path: Path | None) -> bytes:
    """All texts as bytes, one after another."""
    if path is None:
        return "\n\n".join(text for text, _ in docstrings(200)).encode()
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise SystemExit(f"--texts: there is no .txt file in {path}")
    return b"\n\n".join(file.read_bytes() for file in files)


def rows(data: bytes, length: int) -> list[dict[str, Any]]:
    """The text cut into examples of ``length`` bytes; a token is a byte, and every token is a label."""
    table = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    table = table[: len(table) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in table]


def main() -> None:
    parser = trainer_options(__doc__, out="runs/language")
    parser.add_argument(
        "--texts", type=Path, metavar="FILE_OR_FOLDER", help="default: the standard library's docstrings"
    )
    parser.add_argument("--rows", type=int, default=1500, help="at most so many rows to train on")
    parser.add_argument("--length", type=int, default=128, help="bytes in a row")
    parser.add_argument("--width", type=int, default=96)
    args = parser.parse_args()

    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from attent.integrations.transformers import TeachingArguments, TeachingTrainer

    table = rows(read_texts(args.texts), args.length)
    held_out = min(len(table) // 8, 128)
    if held_out == 0:
        raise SystemExit(f"--texts: {len(table)} rows of {args.length} bytes are too few")
    test, train = table[:held_out], table[held_out : held_out + args.rows]
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=args.width,
            intermediate_size=3 * args.width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=args.length,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    trainer = TeachingTrainer(
        model,
        training_arguments(args, learning_rate=2e-3, prediction_loss_only=True),
        train_dataset=train,
        eval_dataset=test,
        teaching=TeachingArguments(ratio=args.ratio, score="head"),
    )
    trainer.train()
    print(trainer.teacher.summary())
    loss = trainer.evaluate()["eval_loss"]
    print(f"\non {len(test)} rows not trained on: {loss:.3f} nats, {loss / 0.6931:.3f} bits a byte")
    print(f"for the report: attent report {args.out}")


if __name__ == "__main__":
    main()
