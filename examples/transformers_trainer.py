"""The Hugging Face Trainer on a tiny language model: pass the class and its options.

    python -m examples.transformers_trainer

`optimizers=(optimizer, scheduler)` works too. Trainer's default schedule fades `lr` to 0 at the end of training; the learned
rule needs none, so this run holds it constant.
"""

import tempfile

import torch
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from learned_optim import LearnedOptimizer

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
)
model = LlamaForCausalLM(config)
sentences = (
    torch.randint(16, (256, 1)) + torch.randint(1, 4, (256, 1)) * torch.arange(16)
) % 16  # Count on, in threes, say.


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Make a batch as language models take it."""
    tokens = torch.stack([row[0] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=32,
            max_steps=60,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_first_step=True,
            log_level="error",
        ),
        train_dataset=TensorDataset(sentences),
        data_collator=collate,
        optimizer_cls_and_kwargs=(LearnedOptimizer, {"lr": 1.0}),
    )
    trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
