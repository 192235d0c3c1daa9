"""A VAE's training loop, each step one CUDA graph: ``fastvae train --graph`` without the command line.

``python examples/graphed_training.py`` trains on 8×8 digits. Without a GPU the same loop makes its steps in parts.
"""

import torch

import fastvae
from fastvae.models import VAE
from fastvae.train import data
from fastvae.train.graph import GraphedStep

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
graphed = device.type == "cuda"
images = data.load("digits").train.images.to(device)  # uint8, meaning x/255: 1 byte a pixel, all of it on the GPU
model = VAE(data_shape=images.shape[1:], latent=10, hidden=128).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=graphed, fused=graphed or None)
losses = torch.zeros((), device=device)


def step(index: torch.Tensor) -> None:
    """All that happens for one batch. It reads and writes tensors that stay in place, and never waits for the GPU."""
    x = images[index].flatten(1)
    q = model.encode(x / 255)
    z = fastvae.reparameterize(q.mu, q.logvar)
    loss = fastvae.elbo_loss(model.decode(z), x, q.mu, q.logvar).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    losses.add_(loss.detach())


run = GraphedStep(step, 64, device) if graphed else step
for epoch in range(10):
    losses.zero_()
    batches = torch.randperm(len(images), device=device).split(64)
    for index in batches:
        run(index)
    print(f"epoch {epoch + 1}: {losses.item() / len(batches):.2f} nats")
