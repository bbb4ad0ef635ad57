"""Lightning: precisions, stochastic weight averaging, checkpoints."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture
def lightning():
    """Return the library; an import at the top would run before torchvision's ops are defined."""
    return pytest.importorskip("lightning.pytorch")


@pytest.fixture
def trained(lightning, model, data, tmp_path):
    """Return a function that trains the model, and returns the trainer, the module and its losses."""

    class Field(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses, self.dtypes = model, [], set()

        def training_step(self, batch, _):
            x, cond, y = batch
            out = self.model(x, cond)
            self.dtypes.add(out.dtype)
            loss = nn.functional.mse_loss(out.float(), y.float())
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 3e-2)

    def train(precision, callbacks=(), epochs=8):
        module = Field()
        dtype = torch.float64 if precision == "64-true" else torch.float32
        loader = DataLoader(TensorDataset(*(t.to(dtype) for t in data)), 16)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            precision=precision,
            callbacks=[*callbacks],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, loader)
        return trainer, module

    return train


PRECISIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.bfloat16,  # on a CPU Lightning takes bfloat16 in its place
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(trained, precision):
    _, module = trained(precision)
    assert module.dtypes == {PRECISIONS[precision]}
    assert module.losses[-1] < 0.7 * module.losses[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_averaged_weights(lightning, trained, data):
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=0.5)
    _, module = trained("32-true", [averaging])
    assert module.losses[-1] < 0.7 * module.losses[0]
    average = averaging._average_model.model
    for p, q in zip(average.parameters(), module.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)  # at the end of training the callback copies the average into the module
    x, cond, _ = data
    torch.testing.assert_close(average(x, cond), module.model(x, cond))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_on_disk(trained, data, tmp_path):
    trainer, module = trained("32-true", epochs=1)
    trainer.save_checkpoint(tmp_path / "field.ckpt")
    state = torch.load(tmp_path / "field.ckpt", weights_only=False)["state_dict"]
    x, cond, _ = data
    expected = module.model(x, cond)
    for p in module.parameters():
        nn.init.zeros_(p)
    module.load_state_dict(state)
    torch.testing.assert_close(module.model(x, cond), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_summary_counts_parameters(lightning, trained):
    from lightning.pytorch.utilities.model_summary import ModelSummary

    _, module = trained("32-true", epochs=1)
    assert ModelSummary(module).total_parameters == sum(p.numel() for p in module.parameters())
