"""Training with our operators loses as training with eager PyTorch does, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_step_profile import tiny

from restore_kernels import backends
from restore_nets import list_models
from restore_nets.loss_curves import STEPS, LossCurves, loss_curves
from restore_nets.training import Trainer


@pytest.mark.parametrize("name", list_models())
def test_the_losses_of_all_steps_are_eagers(name):
    """As far as they are when rounding alone is added to eager's weights."""
    curves = loss_curves(tiny(name), first_steps=1)
    agreement = curves.agreement
    assert len(curves.ours) == len(curves.narrow) == len(agreement.eager) == STEPS
    assert agreement.passed, (agreement.differences, agreement.noise)
    assert curves.ours[-1] < curves.ours[0] and curves.narrow[-1] < curves.narrow[0]
    assert 0 < curves.largest_narrow_difference < 0.5
    assert LossCurves.of(curves.data()) == curves


@pytest.mark.parametrize("name", ["ddsa", "panet"])
def test_a_slightly_wrong_step_is_seen(name, monkeypatch):
    """A hundredth of the first weight, once, where eager PyTorch was not asked for."""
    step = Trainer.step

    def faulty(self, degraded, clean):
        if not backends._requested and len(self.losses) == 1:
            next(p for p in self.model.parameters() if p.requires_grad).data.mul_(1.01)
        return step(self, degraded, clean)

    monkeypatch.setattr(Trainer, "step", faulty)
    assert not loss_curves(replace(tiny(name), size=12), steps=4, first_steps=2).agreement.passed
