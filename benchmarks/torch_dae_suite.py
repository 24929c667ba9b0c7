"""The downstream-agnostic attacks as one writes them in torch: a class each, with a `step`.

Every step does the arithmetic of the package's: the same objective, the same update, the same
number of gradients.  Attacks on layers run the encoder up to the layer that they need, no farther.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def activations(encoder, images, blocks: int = 8):
    """Returns the first `blocks` of a `torch_models.ResNet18`, from the pixels on."""
    x = encoder.pool(encoder.relu(encoder.stem(encoder.normalize(images))))
    found = []
    for stage in (encoder.stage1, encoder.stage2, encoder.stage3, encoder.stage4):
        for block in stage:
            if len(found) == blocks:
                return found
            x = block(x)
            found.append(x)
    return found


# ------------------------------------------------------------------- objectives, to be maximized


def energy(encoder, images, adversarial, weight=0.0):
    """L4A: the mean square of the first block, and of the second with a weight."""
    found = activations(encoder, adversarial, 2 if weight else 1)
    value = found[0].square().mean()
    return value + weight * found[1].square().mean() if weight else value


def ssp(encoder, images, adversarial):
    """The distance of the fourth block from its clean activation."""
    with torch.no_grad():
        clean = activations(encoder, images, 4)[3]
    change = activations(encoder, adversarial, 4)[3] - clean
    return change.flatten(1).norm(dim=1).mean()


def std(encoder, images, adversarial):
    """The fourth block's standard deviation, negative."""
    found = activations(encoder, adversarial, 4)[3]
    return -found.flatten(1).std(dim=1, correction=0).mean()


def log_norms(encoder, images, adversarial):
    """FFF: the sum over blocks of the logarithm of the norm."""
    norms = [a.flatten(1).norm(dim=1).clamp(min=1e-6) for a in activations(encoder, adversarial)]
    return torch.stack(norms).log().sum(0).mean()


def feature_l2(encoder, images, adversarial):
    """The distance of the features from the clean ones."""
    with torch.no_grad():
        clean = encoder(images)
    return (encoder(adversarial) - clean).norm(dim=1).mean()


# ---------------------------------------------------------------------------------- the attacks


class SignAscent:
    """Sign steps on one perturbation, with momentum where it is not 0."""

    def __init__(self, objective, encoder, images, epsilon, step_sizes, momentum=0.0, draw=None):
        self.objective, self.encoder, self.images = objective, encoder, images
        self.epsilon, self.step_sizes, self.momentum = epsilon, step_sizes, momentum
        self.draw = draw
        start = torch.empty_like(images[:1]).uniform_(-epsilon, epsilon)
        self.delta = start.requires_grad_()
        self.velocity = torch.zeros_like(start)

    def step(self):
        """Makes a step of each length on the batch."""
        images = self.images if self.draw is None else self.draw(self.images)
        for step_size in self.step_sizes:
            adversarial = (images + self.delta).clamp(0, 1)
            value = self.objective(self.encoder, images, adversarial)
            (gradient,) = torch.autograd.grad(value, self.delta)
            self.velocity = self.momentum * self.velocity + gradient / gradient.abs().mean()
            with torch.no_grad():
                self.delta += step_size * self.velocity.sign()
                self.delta.clamp_(-self.epsilon, self.epsilon)


def gaussian_images(images):
    """L4A-ugs: an image of noise for each of the batch."""
    shape = (len(images), 1, 1, 1)
    mean = torch.empty(shape, device=images.device).uniform_(0.4, 0.6)
    deviation = torch.empty(shape, device=images.device).uniform_(0.05, 0.10)
    return (mean + deviation * torch.randn_like(images)).clamp(0, 1)


class FFF:
    """Adam on one gray image; halves the perturbation when it is stuck at the budget."""

    def __init__(self, encoder, images, epsilon):
        self.encoder, self.epsilon = encoder, epsilon
        self.gray = torch.full_like(images[:1], 0.5)
        self.delta = torch.empty_like(self.gray).uniform_(-epsilon, epsilon).requires_grad_()
        self.adam = torch.optim.Adam([self.delta], lr=0.1 / 255)
        self.saturation = torch.zeros((), device=images.device)
        self.best, self.best_value = self.delta.detach().clone(), self.saturation - torch.inf

    def step(self):
        """Makes one step."""
        value = log_norms(self.encoder, None, (self.gray + self.delta).clamp(0, 1))
        self.adam.zero_grad(set_to_none=True)
        (-value).backward()
        with torch.no_grad():
            better = value > self.best_value
            self.best = torch.where(better, self.delta, self.best)
            self.best_value = torch.where(better, value, self.best_value)
            self.adam.step()
            allowed = self.delta.clamp(-self.epsilon, self.epsilon)
            saturation = ((allowed - self.delta).abs() > 1e-6).float().mean()
            stuck = (saturation > 0.5) & ((saturation - self.saturation).abs() < 1e-5)
            self.delta.copy_(torch.where(stuck, 0.5 * allowed, allowed))
            self.saturation = saturation


def cluster_directions(features, count):
    """Spherical k-means that starts at the first vector and goes on to the farthest."""
    vectors = functional.normalize(features, dim=1)
    centers, nearest = [vectors[0]], vectors @ vectors[0]
    for _ in range(1, min(count, len(vectors))):
        centers.append(vectors[nearest.argmin()])
        nearest = torch.maximum(nearest, vectors @ centers[-1])
    centers = torch.stack(centers)
    for _ in range(10):
        members = functional.one_hot((vectors @ centers.T).argmax(1), len(centers)).float()
        sums = functional.normalize(members.T @ vectors, dim=1)
        centers = torch.where(members.sum(0)[:, None] == 0, centers, sums)
    return centers


class UAP:
    """Adds up the DeepFool steps of groups of images, one group after the other."""

    def __init__(self, encoder, images, epsilon, clusters=10, at_once=8, overshoot=0.02):
        self.encoder, self.images, self.epsilon = encoder, images, epsilon
        self.clusters, self.overshoot = clusters, overshoot
        self.at_once = max(n for n in range(1, at_once + 1) if len(images) % n == 0)
        self.delta = torch.zeros_like(images[:1])

    def step(self):
        """Goes through the batch once."""
        with torch.no_grad():
            features = self.encoder(self.images)
            centers = cluster_directions(features, self.clusters)
            labels = (features @ centers.T).argmax(1)
            moved = self.encoder((self.images + self.delta).clamp(0, 1))
            self.value = ((moved @ centers.T).argmax(1) != labels).float().mean()
        groups = zip(self.images.split(self.at_once), labels.split(self.at_once), strict=True)
        for images, group in groups:
            total = self._changes(images, group, centers).sum(0, keepdim=True)
            moved = self.delta + (1 + self.overshoot) * total
            self.delta = moved.clamp(-self.epsilon, self.epsilon)

    def _changes(self, images, labels, centers):
        pixels = (images + self.delta).requires_grad_()
        scores = functional.normalize(self.encoder(pixels.clamp(0, 1)), dim=1) @ centers.T
        slopes = torch.stack(
            [
                torch.autograd.grad(column.sum(), pixels, retain_graph=True)[0]
                for column in scores.unbind(1)
            ],
            dim=1,
        )  # [images, clusters, 3, H, W]
        rows, scores = torch.arange(len(images), device=images.device), scores.detach()
        slopes = slopes - slopes[rows, labels][:, None]
        gaps = (scores - scores[rows, labels][:, None]).abs()
        squared = slopes.square().sum((2, 3, 4))
        distances = torch.where(squared > 0, gaps / squared.sqrt(), torch.inf)
        nearest = distances.argmin(1)
        length = gaps[rows, nearest] / squared[rows, nearest].clamp(min=1e-30)
        stays = scores.argmax(1) == labels
        return torch.where(stays, length, 0.0)[:, None, None, None] * slopes[rows, nearest]


class PerImage:
    """PGD on every image by itself: away from its own features, or towards a target's."""

    def __init__(self, encoder, images, epsilon, target=None, steps=20, step_size=2 / 255):
        self.encoder, self.images, self.epsilon = encoder, images, epsilon
        self.target, self.steps, self.step_size = target, steps, step_size

    def step(self):
        """Attacks the batch once, from a random start; keeps each image's best point."""
        images, epsilon = self.images, self.epsilon
        with torch.no_grad():
            goal = self.encoder(images if self.target is None else self.target)
        sign = 1.0 if self.target is None else -1.0
        current = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp(0, 1)
        best, best_values = images, torch.full((len(images),), -torch.inf, device=images.device)
        for step in range(self.steps + 1):
            last = step == self.steps
            current.requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                values = sign * (self.encoder(current) - goal).norm(dim=1)
            better = values.detach() > best_values
            best = torch.where(better[:, None, None, None], current.detach(), best)
            best_values = torch.where(better, values.detach(), best_values)
            if not last:
                (gradient,) = torch.autograd.grad(values.sum(), current)
                moved = current.detach() + self.step_size * gradient.sign()
                moved = torch.minimum(torch.maximum(moved, images - epsilon), images + epsilon)
                current = moved.clamp(0, 1)
        self.adversarial = best


def make(name: str, encoder, images, epsilon: float):
    """Builds an attack by the name that it has in the package."""
    if name in ("l4a_base", "l4a_fuse", "l4a_ugs"):
        weight = {"l4a_base": 0.0, "l4a_fuse": 1.0, "l4a_ugs": 0.01}[name]

        def lifted(encoder, images, adversarial):
            return energy(encoder, images, adversarial, weight)

        draw = gaussian_images if name == "l4a_ugs" else None
        return SignAscent(lifted, encoder, images, epsilon, (2e-4,), draw=draw)
    if name in ("ssp", "std"):
        objective = {"ssp": ssp, "std": std}[name]
        return SignAscent(objective, encoder, images, epsilon, (2e-4,))
    if name == "uap_pgd":
        steps = (2e-3,) * 10 + (2e-4,) * 10
        return SignAscent(feature_l2, encoder, images, epsilon, steps, 0.9)
    if name in ("fff", "uap"):
        return {"fff": FFF, "uap": UAP}[name](encoder, images, epsilon)
    return PerImage(encoder, images, epsilon, images[:1] if name == "tdaa" else None)
