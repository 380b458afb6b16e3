"""
Nothing of a training step is made on another device than the model's: tried without a GPU, by
letting `meta`, which holds no numbers, be the device of every tensor that does not name its own.
"""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from conftest import small

from model import generate
from train import Trainer, draw_plan, draw_tries, evaluate, hybrid_loss, rollout, wrong_tokens

KINDS = {
    "thinking": {},
    "window and observer": {"window": 4, "observer": "0", "max_run": 2},
    "recall": {"recall": True, "window": 4},
    "revise": {"n_bits": 0, "revise": 0.5},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def trainer(request, chains, tmp_path):
    return Trainer(small(chains, tmp_path, curriculum=False, **request.param))


@pytest.mark.parametrize("paid", [False, True])
def test_a_step_is_on_the_models_device(trainer, paid):
    config, trainer.paid = trainer.config, paid
    batch, plan, of = trainer.draw()
    thinking = trainer.thinking
    with torch.device("meta"):
        draw_plan(batch, thinking, config.forget, of >= 0)
        draw_tries(batch, thinking, 0.5)
        wrong = wrong_tokens(batch, config.revise, trainer.model.config.vocab_size)
        how = trainer.model, batch.real, batch.length, thinking
        grid, out = rollout(*how, wrong=wrong if config.revise else None, **plan)
        loss = sum(hybrid_loss(trainer.model, grid, out, batch, of, config, paid).values())
        loss.backward()
    assert loss.device.type == "cpu" and loss.isfinite()
    assert all(p.grad is None or p.grad.device == p.device for p in trainer.model.parameters())


@pytest.mark.parametrize("mode", ["policy", "random", "constant", "swapped", "never"])
def test_evaluation_and_generation_are_on_the_models_device(trainer, mode):
    batch = trainer.val_rows.first(8, 2)
    thinking = dataclasses.replace(trainer.thinking, greedy=True, mode=mode)
    with torch.device("meta"):
        _, right, loss = evaluate(trainer.model, batch, thinking)
        generate(trainer.model, batch.real[0, :3].tolist(), 2, thinking, temperature=1.0)
    assert right.device.type == loss.device.type == "cpu"


def test_a_tensor_that_names_no_device_is_noticed(chains, tmp_path):
    trainer = Trainer(small(chains, tmp_path))
    batch, _, of = trainer.draw()
    everywhere = patch("train.may_follow", side_effect=lambda real, _: torch.ones(real.shape) > 0)
    with torch.device("meta"), everywhere, pytest.raises((RuntimeError, NotImplementedError)):
        plan = draw_plan(batch, trainer.thinking, 0.5, of >= 0)
        rollout(trainer.model, batch.real, batch.length, trainer.thinking, **plan)
