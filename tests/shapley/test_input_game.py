"""The game of a model's inputs: what rows are formed, and what models they go to."""

import pytest
import torch
from torch import nn

from microtome.errors import ArgumentError
from microtome.shapley import InputGame, permutation
from microtome.shapley.coalitions import of_members


def test_a_call_as_long_as_the_list_of_coalitions_mixes_up_no_background_rows():
    x, background = torch.ones(1, 3), torch.tensor([[0.0] * 3, [0.5] * 3])
    inside = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 1]]).bool()
    game = InputGame(lambda rows: rows @ torch.tensor([1.0, 2.0, 4.0]), x, background, memory=48)
    assert game.per_call == len(inside)
    # 7 / 4 from the background's mean, 3 / 4 of a player's weight more when it is in.
    found = game.values(*of_members(inside), torch.arange(1))
    assert found.flatten().tolist() == [2.5, 3.25, 4.0, 6.25]


def test_a_sequential_with_a_forward_of_its_own_is_not_walked_inside_the_kernel():
    class Net(nn.Sequential):
        def forward(self, rows):
            return torch.sigmoid(super().forward(rows))

    torch.manual_seed(0)
    model = Net(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    found = permutation(model, torch.ones(1, 4), torch.zeros(2, 4))
    assert found.engine == "calls"
    found.check_additivity()
    with pytest.raises(ArgumentError, match="f computes its forward in its own way"):
        permutation(model, torch.ones(1, 4), torch.zeros(2, 4), precision="bf16")
