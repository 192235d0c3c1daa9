"""A VAE under Accelerate, noise and loss from fastvae: ``accelerate launch examples/accelerate_vae.py``, on 8×8 digits.

``python examples/accelerate_vae.py`` runs it as one process.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

import fastvae
from fastvae.train import data


class VAE(nn.Module):
    """Two layers each way; ``forward`` gives logits, mean and log variance of uint8 data that mean x/255."""

    def __init__(self, pixels: int = 64, latent: int = 10, hidden: int = 128):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x / 255).chunk(2, -1)
        return self.decoder(fastvae.reparameterize(mu, logvar)), mu, logvar


accelerator, model = Accelerator(), VAE()
set_seed(0, device_specific=True)  # each process draws noise of its own
loader = torch.utils.data.DataLoader(data.load("digits").train.images.flatten(1), batch_size=64, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=3e-3), loader)
for epoch in range(5):
    for x in loader:
        logits, mu, logvar = model(x)
        loss = fastvae.elbo_loss(logits, x, mu, logvar).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    accelerator.print(f"epoch {epoch + 1}: {loss.item():.2f} nats")
