"""accelerate: prepared models in its precisions, accumulated gradients, saved states."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def fresh_state():
    """Forget the precision of the Accelerator before: it is kept for the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def steps(accelerator, model, optimizer, loader, epochs=6):
    losses = []
    for _ in range(epochs):
        for x, cond, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x, cond).float(), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_training(model, data, precision, accumulated):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulated)
    loader = DataLoader(TensorDataset(*data), 8)
    prepared = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 3e-2), loader)
    losses = steps(accelerator, *prepared)
    assert losses[-1] < 0.7 * losses[0]
    x, cond, _ = data
    unwrapped = accelerator.unwrap_model(prepared[0], keep_fp32_wrapper=False)
    assert type(unwrapped) is type(model)
    assert unwrapped(x, cond).dtype == torch.float32


def test_a_saved_state(model, data, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    loader = DataLoader(TensorDataset(*data), 8)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 3e-2), loader)
    steps(accelerator, model, optimizer, loader, 1)
    accelerator.save_state(tmp_path)
    x, cond, _ = data
    expected = model(x, cond).detach()
    steps(accelerator, model, optimizer, loader, 1)
    accelerator.load_state(tmp_path)
    torch.testing.assert_close(model(x, cond).detach(), expected)
