"""TrainConfig and the learning rate."""

import functools
import json

import numpy as np
import pytest
import torch

from microtome import TrainConfig
from microtome.errors import ArgumentError
from microtome.sae.schedule import lr_factor


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give steps or tokens, one of them; got steps=None, tokens=None"),
        ({"steps": 1, "tokens": 9}, "got steps=1, tokens=9"),
        ({"steps": 0}, "steps must be between 1 and"),
        ({"tokens": 10}, "tokens must be between 1024 and"),
        ({"steps": 1, "batch_size": 0}, "batch_size must be between 1"),
        ({"steps": 1, "lr": -1.0}, "lr must be at least 0 and below inf, got lr=-1.0"),
        ({"steps": 1, "lr": float("nan")}, "got lr=nan"),
        ({"steps": 1, "decay": "cosine"}, "decay must be one of 'linear', 'constant'"),
        ({"steps": 1, "decay_fraction": 1.5}, "decay_fraction must be at least 0 and at most 1.0"),
        ({"steps": 1, "beta2": 1.0}, "beta2 must be at least 0 and below 1.0"),
        ({"steps": 1, "optimizer": "lion"}, "optimizer must be one of 'adam', 'adamw'"),
        ({"steps": 1, "b_dec_init": "zero"}, "b_dec_init must be one of"),
        ({"steps": 1, "max_grad_norm": 1.0}, "max_grad_norm needs ordinary gradients"),
        (
            {"steps": 1, "optimizer": torch.optim.Adam, "rowsparse": True},
            "rowsparse is of the fused",
        ),
        ({"steps": 1, "k_aux": 0}, "k_aux must be between 1"),
        ({"steps": 2.5}, "TrainConfig: steps must be a whole number, got steps=2.5."),
        ({"steps": 1, "batch_size": "8"}, "batch_size must be a whole number, got batch_size='8'."),
        ({"steps": 1, "seed": "x"}, "seed must be a whole number, got seed='x'."),
        ({"steps": 1, "lr": "1e-3"}, "TrainConfig: lr must be a number, got lr='1e-3'."),
        ({"steps": 1, "wandb": 3}, "TrainConfig: wandb must be a string or None, got 3."),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ArgumentError) as caught:
        TrainConfig(**settings)
    assert message in str(caught.value)


def test_settings_survive_json():
    config = TrainConfig(tokens=4096, lr=3e-4, k_aux=7, wandb="project")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_numbers_of_numpy_survive_json_too():
    config = TrainConfig(steps=np.int64(3), seed=np.int32(5), lr=np.float32(0.5))
    assert (
        json.loads(json.dumps(config.to_dict())) == TrainConfig(steps=3, seed=5, lr=0.5).to_dict()
    )


def test_a_callable_optimizer_is_written_by_name_and_not_read_back():
    make = functools.partial(torch.optim.SGD, lr=0.5)
    values = TrainConfig(steps=1, optimizer=make).to_dict()
    assert values["optimizer"] == {"callable": "torch.optim.sgd:SGD(lr=0.5)"}
    json.dumps(values)
    with pytest.raises(ArgumentError, match=r"was the callable 'torch\.optim\.sgd:SGD"):
        TrainConfig.from_dict(values)


def test_an_unknown_setting_is_named():
    with pytest.raises(ArgumentError, match="no setting 'learning_rate'; there are steps, tokens"):
        TrainConfig.from_dict({"steps": 1, "learning_rate": 1.0})


def test_the_learning_rate_rises_stays_and_falls_as_worked_by_hand():
    config = TrainConfig(steps=10, warmup_steps=4, decay_fraction=0.4)
    factors = [lr_factor(config, s) for s in range(1, 11)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    constant = TrainConfig(steps=10, warmup_steps=0, decay="constant")
    assert {lr_factor(constant, s) for s in range(1, 11)} == {1.0}


def test_the_default_learning_rate_falls_with_the_root_of_the_width():
    config = TrainConfig(steps=1)
    assert config.base_lr(2**14) == 2e-4
    assert config.base_lr(2**16) == 1e-4
    assert TrainConfig(steps=1, optimizer=torch.optim.Adam).base_lr(2**14) is None
