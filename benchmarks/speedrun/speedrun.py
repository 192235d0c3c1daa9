"""VAE-106: the tutorial's VAE on MNIST to a test loss of 106.0 nats, as fast as it goes. Rules: README.md beside this.

``python benchmarks/speedrun/speedrun.py --data-root FOLDER`` runs seeds 0 to 4 and prints each; ``--tutorial`` the
tutorial's own loop instead.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvae
from fastvae.train import data
from fastvae.train.graph import GraphedStep

GOAL = 106.0  # nats per test image
BATCH, PEAK, EPOCHS = 224, 8e-3, 4
WARM_UP = 0.15  # of all steps


class VAE(nn.Module):
    """784–400–(20, 20), 20–400–784, as in pytorch/examples."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.posterior = nn.Linear(784, 400), nn.Linear(400, 40)
        self.decoder, self.output = nn.Linear(20, 400), nn.Linear(400, 784)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.posterior(F.relu(self.encoder(x))).chunk(2, dim=1)

    def hidden(self, z: Tensor) -> Tensor:
        return F.relu(self.decoder(z))


def images(split: data.Split, device: torch.device) -> Tensor:
    return split.images.flatten(1).to(device)


@torch.inference_mode()
def evaluate(model: VAE, test: Tensor) -> float:
    """The negative ELBO of the test set, nats an image, one sample of z each."""
    total = 0.0
    for x in test.split(2000):
        mu, logvar = model.encode(x / 255)
        z = fastvae.reparameterize(mu, logvar)
        logits = model.output(model.hidden(z))
        total += float(fastvae.elbo_loss(logits, x, mu, logvar, reduction="sum").loss)
    return total / len(test)


def rate(part: float) -> float:
    """The learning rate when ``part`` of all steps are made: up in a line, down along a cosine."""
    if part < WARM_UP:
        return PEAK * part / WARM_UP
    return PEAK * 0.5 * (1 + math.cos(math.pi * (part - WARM_UP) / (1 - WARM_UP)))


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ours(train: Tensor, test: Tensor, device: torch.device, bf16: bool) -> tuple[float, float]:
    """Seconds of training, and the test loss it ended with; ``bf16`` is for the matrix products of training."""
    start = time.perf_counter()
    model = VAE().to(device)
    graphed = device.type == "cuda"
    lr = torch.zeros((), device=device) if graphed else 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True, capturable=graphed)

    def step(index: Tensor) -> None:
        x = train[index]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            mu, logvar = model.encode(x / 255)
            z = fastvae.reparameterize(mu, logvar)
            nll = fastvae.linear_bce(model.hidden(z), model.output.weight, model.output.bias, x)
            loss = nll + fastvae.gaussian_kl(mu, logvar)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    run = GraphedStep(step, BATCH, device) if graphed else step
    steps, done = EPOCHS * (len(train) // BATCH), 0
    for _ in range(EPOCHS):
        order = torch.randperm(len(train), device=device)
        for index in order[: len(train) // BATCH * BATCH].split(BATCH):
            new = rate(done / steps)
            if graphed:
                lr.fill_(new)
            else:
                optimizer.param_groups[0]["lr"] = new
            run(index)
            done += 1
    sync(device)
    return time.perf_counter() - start, evaluate(model, test)


def tutorial(train: Tensor, test: Tensor, device: torch.device) -> tuple[float, float]:
    """The same network in pytorch/examples' own loop: batch 128, Adam 1e-3, 10 epochs, its loss."""
    start = time.perf_counter()
    model, floats = VAE().to(device), train.float() / 255
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(10):
        for index in torch.randperm(len(train), device=device).split(128):
            x = floats[index]
            optimizer.zero_grad()
            mu, logvar = model.encode(x)
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
            recon = torch.sigmoid(model.output(model.hidden(z)))
            bce = F.binary_cross_entropy(recon, x, reduction="sum")
            loss = bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
            loss.backward()
            optimizer.step()
    sync(device)
    return time.perf_counter() - start, evaluate(model, test)


def main() -> None:
    """Run the seeds; the record is their mean, if every one reached the goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", required=True, type=Path, help="MNIST's four IDX files, gzipped or not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16: where the processor has them")
    parser.add_argument("--tutorial", action="store_true", help="the loop of pytorch/examples instead")
    options = parser.parse_args()
    device, mnist = torch.device(options.device), data.load(root=options.data_root)
    train, test = images(mnist.train, device), images(mnist.test, device)
    runs = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        seconds, loss = tutorial(train, test, device) if options.tutorial else ours(train, test, device, options.bf16)
        runs.append((seconds, loss))
        print(json.dumps({"seed": seed, "seconds": round(seconds, 3), "test_loss": round(loss, 3)}), flush=True)
    times, losses = zip(*runs, strict=True)
    met = "all at most" if max(losses) <= GOAL else "NOT all at most"
    print(f"mean {statistics.mean(times):.2f} s, losses {met} {GOAL}")


if __name__ == "__main__":
    main()
