"""The Hugging Face Trainer on a tiny transformer made from a config: both ways in, and resume."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from learned_optim import LearnedOptimizer
from tests.cases import assert_identical, small_rule
from tests.integrations.training import Run, averages_of, end_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, BATCH = 4, 2


class Sentences(IterableDataset):
    """The same random tokens each time, in order."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(3)
        for _ in range(STEPS * BATCH):
            tokens = torch.randint(16, (8,), generator=generator)
            yield {"input_ids": tokens, "labels": tokens}


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(config).to(dtype)


def make_trainer(model: nn.Module, folder: Path, by_class: bool, average: bool = False, **arguments: Any) -> Any:
    if by_class:
        way_in = {"optimizer_cls_and_kwargs": (LearnedOptimizer, {"weights": small_rule(), "average": average})}
    else:
        optimizer = LearnedOptimizer(model.parameters(), weights=small_rule(), average=average)
        way_in = {"optimizers": (optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS))}
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **{"save_strategy": "no", **arguments},
    )
    return transformers.Trainer(model, settings, train_dataset=Sentences(), **way_in)


def run_of(trainer: Any) -> Run:
    return end_of(trainer.model, trainer.optimizer.optimizer)  # Accelerate wraps it.


@pytest.mark.parametrize("by_class", [False, True])
def test_both_ways_in_equal_a_plain_loop(by_class: bool, tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), tmp_path, by_class)
    trainer.train()
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), weights=small_rule())
    rows = list(Sentences())
    for step in range(STEPS):
        tokens = torch.stack([row["input_ids"] for row in rows[step * BATCH : (step + 1) * BATCH]])
        optimizer.param_groups[0]["lr"] = 1 - step / STEPS
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # Trainer divides the sum of the losses by the number of tokens itself, which may round otherwise than their mean.
    torch.testing.assert_close(run_of(trainer).params, end_of(model, optimizer).params, rtol=1e-4, atol=1e-6)


def test_weight_decay_reaches_the_groups(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), tmp_path, by_class=True, weight_decay=0.5)
    trainer.create_optimizer()
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.5, 0.0]
    assert all(group["lr"] == 1.0 for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_class", [False, True])
def test_a_checkpoint_resumes_to_the_last_bit(by_class: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = make_trainer(make_model(dtype), tmp_path, by_class, save_strategy="steps", save_steps=STEPS // 2)
    whole.train()
    expected = run_of(whole)
    assert expected.memory[0]["step"] == STEPS
    model = make_model(dtype)
    nn.init.zeros_(model.lm_head.weight)
    resumed = make_trainer(model, tmp_path, by_class)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_identical(run_of(resumed), expected)


@pytest.mark.parametrize("by_class", [False, True])
def test_averaged_weights_survive_a_checkpoint(by_class: bool, tmp_path: Path) -> None:
    def averages(trainer: Any) -> list[Tensor]:
        return averages_of(trainer.model, trainer.optimizer.optimizer)

    whole = make_trainer(make_model(), tmp_path, by_class, average=True, save_strategy="steps", save_steps=STEPS // 2)
    whole.train()
    resumed = make_trainer(make_model(), tmp_path, by_class, average=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_identical(averages(resumed), averages(whole))
