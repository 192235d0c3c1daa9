"""A VAE in Hugging Face's Trainer, noise and loss from fastvae: ``python examples/trainer_vae.py``, on 8×8 digits."""

import tempfile

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

import fastvae
from fastvae.train import data


class VAE(nn.Module):
    """Two layers each way. The Trainer takes ``"loss"`` of what ``forward`` gives; data are uint8, meaning x/255."""

    def __init__(self, pixels: int = 64, latent: int = 10, hidden: int = 128):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, x: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        """``return_loss`` is how the Trainer sees that data without labels have a loss when it evaluates."""
        mu, logvar = self.encoder(x / 255).chunk(2, -1)
        logits = self.decoder(fastvae.reparameterize(mu, logvar))
        return fastvae.elbo_loss(logits, x, mu, logvar)._asdict()


digits = data.load("digits")
train, test = ([{"x": x} for x in part.images.flatten(1)] for part in (digits.train, digits.test))
set_seed(0)
with tempfile.TemporaryDirectory() as folder:
    options = {"num_train_epochs": 5, "learning_rate": 3e-3, "save_strategy": "no", "report_to": "none"}
    arguments = TrainingArguments(folder, per_device_train_batch_size=64, disable_tqdm=True, **options)
    trainer = Trainer(VAE(), arguments, train_dataset=train, eval_dataset=test)
    trainer.train()
    print(f"{trainer.evaluate()['eval_loss']:.2f} nats")
