"""The transformers classes in training: the library's Trainer, accelerate, gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from models import draw_ids

transformers = pytest.importorskip("transformers")

from test_hf import SIZES, assert_same, make, pad  # noqa: E402
from transformers import DataCollatorWithFlattening  # noqa: E402

from nsa_compile.hf import NsaConfig, NsaForCausalLM  # noqa: E402


def overfit(tmp_path, collator, **arguments) -> list[float]:
    """Losses of a few steps of the library's Trainer on a few rows of different lengths."""
    torch.manual_seed(0)
    model = NsaForCausalLM(NsaConfig(**SIZES, pad_token_id=0))
    rows = [{"input_ids": draw_ids(n, seed=n).tolist()} for n in (30, 12, 25, 18)]
    for row in rows:
        row["labels"] = list(row["input_ids"])
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=6, learning_rate=1e-2, logging_steps=1,
        save_steps=3, report_to="none", use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        remove_unused_columns=False, **arguments,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows, data_collator=collator)
    trainer.train()
    assert trainer.evaluate(rows[:2])["eval_loss"] > 0
    assert NsaForCausalLM.from_pretrained(tmp_path / "checkpoint-6").config == model.config
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def collate_padded(features: list[dict]) -> dict[str, torch.Tensor]:
    t = max(len(row["input_ids"]) for row in features)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in features]
    return {k: torch.tensor([[v] * (t - len(row[k])) + row[k] for row in rows]) for k, v in fill.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_trainer_trains(tmp_path, layout, checkpointing):
    pytest.importorskip("accelerate")
    collator = collate_padded if layout == "padded" else DataCollatorWithFlattening(return_tensors="pt")
    losses = overfit(tmp_path, collator, gradient_checkpointing=checkpointing)
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.2


def test_accelerate_trains():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = NsaForCausalLM(NsaConfig(**SIZES))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    ids, losses = draw_ids(4, 30).to(accelerator.device), []
    for step in range(12):
        with accelerator.accumulate(model):
            part = ids[step % 2 * 2 :][:2]
            loss = model(part, labels=part).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing_gives_the_same_gradients(reentrant):
    model, (padded, mask, _) = make(phi="mlp").train(), pad(draw_ids(3, 40), "left")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model(padded, attention_mask=mask, labels=padded).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for plain, again in zip(*gradients, strict=True):
        assert_same(plain, again)
