"""MART's two terms agree with torch's own operations, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ssl import losses
from robust_ssl.types import LossInputs, Outputs

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

BATCH, CLASSES = 64, 10
GUARDS = {"paper": (0.0, 0.0), "released": (1e-4, 1e-12)}  # added to 1 - p, and inside a logarithm


def _data(scale):
    random = np.random.default_rng(0)
    clean, adversarial = scale * random.normal(size=(2, BATCH, CLASSES))
    return random.integers(0, CLASSES, BATCH), clean, adversarial


def _mart_in_torch(labels, clean, adversarial, guards):
    """Returns each term with its gradients for both logits; float64."""
    below_one, inside = guards
    labels = torch.tensor(labels)
    clean, adversarial = (torch.tensor(x, requires_grad=True) for x in (clean, adversarial))
    probabilities = torch.softmax(adversarial, dim=1)
    # The likeliest class, or the next one where that is the right class.
    first, second = probabilities.topk(2, dim=1).indices.T
    rival = torch.where(first == labels, second, first)
    boosted = torch.nn.functional.cross_entropy(
        adversarial, labels, reduction="none"
    ) + torch.nn.functional.nll_loss(
        torch.log(1 + below_one - probabilities + inside), rival, reduction="none"
    )
    natural = torch.softmax(clean, dim=1)
    right = natural.gather(1, labels.reshape(-1, 1)).squeeze(1)
    divergence = torch.nn.functional.kl_div(
        torch.log(probabilities + inside), natural, reduction="none"
    ).sum(1)
    results = []
    for values in (boosted, divergence * (1 - right)):
        gradients = torch.autograd.grad(
            values.sum(), (clean, adversarial), retain_graph=True, allow_unused=True
        )
        gradients = [np.zeros((BATCH, CLASSES)) if g is None else g.numpy() for g in gradients]
        results.append((values.detach().numpy(), *gradients))
    return results


def _mart_here(labels, clean, adversarial):
    def outputs(logits):
        return Outputs(jnp.zeros((BATCH, 1)), logits=jnp.asarray(logits, jnp.float32))

    inputs = LossInputs(jnp.asarray(labels, jnp.int32), outputs(clean), outputs(adversarial))
    results = []
    for loss in (losses.boosted_cross_entropy, losses.misclassification_kl):
        gradient = jax.grad(lambda x, loss=loss: loss(x).sum(), allow_int=True)(inputs)
        results.append((loss(inputs), gradient.clean.logits, gradient.adversarial.logits))
    return results


@pytest.mark.parametrize(
    ("form", "scale", "tolerance"),
    [("paper", 1.0, 1e-5), ("paper", 4.0, 3e-5), ("released", 1.0, 2e-3)],
)
def test_mart_agrees_with_torch(form, scale, tolerance):
    data = _data(scale)
    expected = _mart_in_torch(*data, GUARDS[form])
    for ours, theirs in zip(_mart_here(*data), expected, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance)


def test_only_the_guard_tells_the_released_term_from_the_papers_where_a_model_is_surely_wrong():
    labels, clean, adversarial = _data(1.0)
    adversarial[np.arange(BATCH), (labels + 1) % CLASSES] += 30
    guarded = _mart_in_torch(labels, clean, adversarial, GUARDS["released"])[0]
    exact = _mart_in_torch(labels, clean, adversarial, GUARDS["paper"])[0]
    ours = _mart_here(labels, clean, adversarial)[0]
    np.testing.assert_allclose(ours[0], exact[0], rtol=1e-3)
    # What the docstring says: the guard holds the second logarithm at -log(1e-4) = 9.2.
    cross_entropy = np.log(np.exp(adversarial).sum(1)) - adversarial[np.arange(BATCH), labels]
    np.testing.assert_allclose(guarded[0] - cross_entropy, -np.log(1e-4), rtol=1e-3)
    assert (ours[0] - guarded[0] > 10).all()
