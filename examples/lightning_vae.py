"""A VAE in Lightning, noise and loss from fastvae: ``python examples/lightning_vae.py`` trains on 8×8 digits."""

import lightning
import torch
from torch import Tensor, nn

import fastvae
from fastvae.train import data


class LightningVAE(lightning.LightningModule):
    """Two layers each way; the batches are uint8, meaning x/255."""

    def __init__(self, pixels: int = 64, latent: int = 10, hidden: int = 128):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def on_fit_start(self) -> None:
        """Let each process draw noise of its own, where there are several."""
        torch.manual_seed(torch.initial_seed() + self.global_rank)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        (x,) = batch
        mu, logvar = self.encoder(x / 255).chunk(2, -1)
        logits = self.decoder(fastvae.reparameterize(mu, logvar))
        loss, reconstruction, kl = fastvae.elbo_loss(logits, x, mu, logvar)
        self.log_dict({"loss": loss, "reconstruction": reconstruction, "kl": kl}, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


lightning.seed_everything(0)
images = torch.utils.data.TensorDataset(data.load("digits").train.images.flatten(1))
trainer = lightning.Trainer(max_epochs=5, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(LightningVAE(), torch.utils.data.DataLoader(images, batch_size=64, shuffle=True, drop_last=True))
print(f"{trainer.callback_metrics['loss_epoch']:.2f} nats")
