"""What the README shows of the operators and modules runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from patching_models import Restorer
from torch import Tensor, nn

import restore_nets
from restore_nets.recipe import load_recipe

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
RECIPE = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
OTHER = (
    "create_model",
    "train_one_epoch",
)  # of networks, which have their own tests, and of one's own script


class TheirNorm(nn.Module):
    """With other names."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.eps = dim, 1e-6
        self.gamma, self.beta = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.layer_norm(x.movedim(1, -1), (self.dim,), self.gamma, self.beta, self.eps)
        return x.movedim(-1, 1)


def given() -> dict[str, Any]:
    """What the examples take for granted."""
    image = torch.randn(1, 8, 9, 10)
    q = torch.randn(1, 1, 48, 16)
    return {
        "q": q, "k": q.clone(), "v": q.clone(), "w": torch.ones(4), "t": torch.ones(1, 1, 1),
        "mask": torch.rand(16), "query": image, "keys": [image], "values": [image], "x": image,
        "weight": torch.ones(8, 1, 3, 3), "bias": None, "y": image, "weight_of_both": torch.ones(4, 16, 1, 1),
        "weight_of_all": torch.ones(4, 8, 3, 3),
        "down": torch.ones(2, 8, 1, 1), "up": torch.ones(8, 2, 1, 1), "residual": image,
        "down_bias": torch.ones(2), "up_bias": torch.ones(8),
        "gamma": torch.ones(8), "beta": torch.zeros(8),
        "model": nn.Sequential(Restorer(), TheirNorm(3)), "TheirNorm": TheirNorm,
    }  # fmt: skip


@pytest.mark.parametrize("example", [x for x in EXAMPLES if not any(word in x for word in OTHER)])
def test_examples_run(example):
    names = given()
    exec("import restore_kernels\n" + example, names)
    if "TheirNorm" in example:
        assert type(names["model"][1]) is names["FastNorm"]


def test_recipe_is_one(tmp_path):
    assert RECIPE is not None
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE[1])
    recipe = load_recipe(path)
    assert recipe.weights == "published.pth" and recipe.learning_rate == 1e-4
    assert (
        recipe.training_config().precision == "bfloat16"
        and recipe.validation is not None
        and recipe.ema_decay == 0.999
    )
    assert recipe.stages is not None and recipe.stages[-1].until == recipe.steps
    with torch.device("meta"):
        restore_nets.create_model(**recipe.model)
