"""Distil under the Trainer of transformers: its arguments, evaluation and checkpoints.

Take your own networks, such as AutoModelForSequenceClassification.from_pretrained(...), and a tokenized data set.
Needs: pip install 'stillhouse[text]'.
"""

import random

from transformers import AutoModelForSequenceClassification, BertConfig, TrainingArguments, set_seed

from stillhouse.integrations.transformers import DistillationTrainer

set_seed(0)
draw = random.Random(0)


def row() -> dict[str, list[int] | int]:
    """Twelve words; the label is whether more than half of them are from the upper half of the vocabulary."""
    words = [draw.randrange(3, 63) for _ in range(12)]
    return {"input_ids": [1, *words, 2], "attention_mask": [1] * 14, "labels": int(sum(w > 32 for w in words) > 6)}


train_rows, test_rows = [row() for _ in range(1000)], [row() for _ in range(300)]


def bert(width: int) -> AutoModelForSequenceClassification:
    config = BertConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2
    )
    return AutoModelForSequenceClassification.from_config(config)


def fit(model, teachers, objectives, folder: str) -> float:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=3,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,  # leave this out where you have a GPU
    )
    trainer = DistillationTrainer(model, arguments, train_dataset=train_rows, teachers=teachers, objectives=objectives)
    trainer.train()
    trainer.save_model(folder)  # the student alone, for from_pretrained
    predicted = trainer.predict(test_rows)
    return float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())


teacher = bert(32)
alone = fit(teacher, None, ["ce"], "teacher")
distilled = fit(bert(8), teacher, ["ce", "kd"], "student")

print(f"accuracy: teacher {alone:.3f}, student {distilled:.3f}")
