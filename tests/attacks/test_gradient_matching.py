"""Images by matching updates: a tiny model, real second derivatives."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedpeft.attacks._images import blank_prior, prior_of
from fedpeft.attacks._simulated import SimulatedClient, labels_of
from fedpeft.attacks.attack import Knowledge, Observation, Secret, Seen
from fedpeft.attacks.gradient_matching import (
    GradientMatching,
    Match,
    noisy_distance,
    turned_away,
    wrong_signs,
)
from fedpeft.config import RunConfig
from fedpeft.data import Encoded
from fedpeft.model import TaskModel, trainable_state
from fedpeft.peft import Bias
from fedpeft.privacy import DpSgd, NonPrivate
from fedpeft.tasks import ImageClassification, ImageClassifier
from fedpeft.tensors import norm, subtract, zeros_like
from fedpeft.training import train_locally
from tests.helpers import tiny_vit

SCENARIO = """
[run]
rounds = 4
[data]
name = "fashion-mnist"
nominal_examples = 1
image_size = 32
[partition]
name = "iid"
num_clients = 2
[model]
backbone = "vit-s"
task = "image-classification"
[peft]
name = "bias"
[training]
optimizer = "sgd"
learning_rate = 0.1
batch_size = 1
[cohort]
size = 2
[privacy]
unit = "none"
target_epsilon = 8.0
target_delta = 1e-5
"""
HALF = (0.5, 0.5, 0.5)


def images(number: int, seed: int = 0) -> Encoded:
    """Grey images of one brightness each: black to white."""
    rng = torch.Generator().manual_seed(seed)
    brightness = torch.randint(0, 256, (number, 1, 1), generator=rng)
    pixels = brightness.expand(-1, 32, 32).to(torch.uint8)
    return Encoded([*pixels], torch.randint(0, 3, (number,), generator=rng))


def model() -> TaskModel:
    backbone = tiny_vit()
    operations = Bias().attach(backbone)
    module = ImageClassifier(backbone, 32, 3)
    assert isinstance(module.head, nn.Linear)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        module.head.weight.copy_(0.3 * torch.randn(3, 32, generator=rng))
    task = ImageClassification(32, HALF, HALF)
    return TaskModel(module, [*operations, *module.head_operations], task, "", {})


def observed(
    victim: Encoded, *overrides: str, steps: int = 1, blank_head: bool = False
) -> tuple[Observation, Secret]:
    """What a client that holds these images answers, by the code of a client."""
    config = RunConfig.from_toml(SCENARIO, overrides)
    network = model()
    clipping, size = config.privacy.clipping_norm, config.training.batch_size
    engine = DpSgd(clipping, 1.0, size) if config.is_private else NonPrivate()
    engine.bind(network.module, network.operations)
    state = trainable_state(network)
    if blank_head:
        state["head.weight"].zero_()
    update = train_locally(
        network,
        state,
        victim,
        steps * [[[index] for index in range(len(victim))]],
        engine=engine,
        noise=lambda total, deviation: total,
        section=config.training,
        rate_factor=1.0,
        mask_seed=0,
    )
    knowledge = Knowledge(model(), config, images(200, seed=1))
    decoys = images(20, seed=2)
    return Observation(knowledge, (Seen(1, state, update),)), Secret(victim, decoys)


def simulated(observation: Observation, secret: Secret) -> SimulatedClient:
    seen = observation.seen[0]
    return SimulatedClient(observation.knowledge, seen, secret.examples.labels)


def truth(secret: Secret) -> torch.Tensor:
    return torch.stack(secret.examples.inputs).unsqueeze(1).float() / 255


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("unit", ["none", "example"])
def test_the_simulated_client_answers_as_a_client_does(steps: int, unit: str) -> None:
    change = (
        f"training.local_epochs={steps}",
        "training.momentum=0.5",
        "training.head_learning_rate=0.3",
        f"privacy.unit='{unit}'",
        "privacy.clipping_norm=0.01",
    )
    observation, secret = observed(images(1), *change, steps=steps)
    client = simulated(observation, secret)
    answer = {n: t.detach() for n, t in client.update(truth(secret)).items()}
    update = client.seen.update
    assert norm(subtract(answer, update)) < 1e-4 * norm(update)


def test_an_image_is_found_by_what_its_update_was() -> None:
    observation, secret = observed(images(1, seed=3))
    rng = torch.Generator().manual_seed(0)
    attack = GradientMatching(iterations=40)
    assert attack.misfit(observation.knowledge) is None
    found = attack.score(attack.run(observation, rng), secret)
    baseline = attack.baseline(observation, secret, rng)
    assert found["psnr"].item() > baseline["psnr"].item() + 10
    other, _ = observed(images(1, seed=4))
    control = attack.score(attack.run(other, rng), secret)
    assert control["psnr"].item() < found["psnr"].item() - 10


def test_the_signs_of_adams_first_step_are_enough_to_do_better_than_the_mean() -> None:
    change = ("training.optimizer='adamw'", "training.learning_rate=1e-3")
    observation, secret = observed(images(1, seed=3), *change)
    rng = torch.Generator().manual_seed(0)
    attack = GradientMatching(iterations=40)
    found = attack.score(attack.run(observation, rng), secret)
    baseline = attack.baseline(observation, secret, rng)
    assert found["psnr"].item() > baseline["psnr"].item() + 3


def test_under_the_noise_of_privacy_the_mean_image_is_the_best_guess() -> None:
    observation, secret = observed(images(1, seed=3), "privacy.unit='example'")
    rng = torch.Generator().manual_seed(0)
    (seen,) = observation.seen
    noisy = {n: torch.randn(t.shape, generator=rng) for n, t in seen.update.items()}
    blurred = replace(observation, seen=(replace(seen, update=noisy),))
    attack = GradientMatching(iterations=40)
    found = attack.score(attack.run(blurred, rng), secret)
    baseline = attack.baseline(observation, secret, rng)
    assert abs(found["psnr"] - baseline["psnr"]).item() < 1.5


def test_the_labels_are_read_off_the_heads_bias() -> None:
    victim = Encoded(images(2).inputs, torch.tensor([2, 0]))
    observation, _ = observed(victim, "training.batch_size=2", blank_head=True)
    (seen,) = observation.seen
    labels = labels_of(observation.knowledge, seen, 2)
    assert labels is not None
    assert sorted(labels.tolist()) == [0, 2]
    headless = replace(seen, update={"backbone.bias": torch.zeros(1)})
    assert labels_of(observation.knowledge, headless, 2) is None


def test_what_was_not_sent_is_not_compared() -> None:
    sent = {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2)}
    mine = {"a": torch.tensor([2.0, 9.0]), "b": torch.ones(2)}
    assert turned_away(mine, sent).item() == 0
    assert wrong_signs(mine, sent).item() == 0
    # The update's mean square is 1 / 4; (2 - 1)^2 / (1 / 4).
    assert noisy_distance(mine, sent).item() == 4


def test_the_objective_is_least_at_the_truth() -> None:
    observation, secret = observed(images(1))
    prior = blank_prior((1, 32, 32))
    match = Match(simulated(observation, secret), prior, prior_weight=0)
    right = prior.white(truth(secret).double())
    assert match.objective(right).item() < 1e-6
    assert match.objective(right + 1).item() > 1e-3


def test_a_start_from_the_span_wants_a_span() -> None:
    observation, _ = observed(images(1))
    attack = GradientMatching(from_span=True)
    reason = "no trained matrix reads the first block's input"
    assert attack.misfit(observation.knowledge) == reason


def test_of_an_update_that_moves_nothing_the_mean_image_is_left() -> None:
    observation, _ = observed(images(1, seed=3))
    (seen,) = observation.seen
    still = replace(seen, update=zeros_like(seen.update))
    guess = GradientMatching().run(
        replace(observation, seen=(still,)), torch.Generator()
    )
    prior = prior_of(observation.knowledge)
    assert torch.equal(guess, prior.mean.view(1, *prior.shape))
