"""Images out of the first block's adapters: exact if it fits, blind under noise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTModel

from fedpeft.attacks._image_scores import identified, image_scores, psnr, ssim
from fedpeft.attacks._images import blank_prior, learned_prior, pixels_of
from fedpeft.attacks._likely_images import LikelyImages
from fedpeft.attacks._patches import Patches, find_patches
from fedpeft.attacks._signal import signal_rows
from fedpeft.attacks._span import span_of
from fedpeft.attacks.attack import Case, Knowledge, Observation, Secret, Seen
from fedpeft.attacks.gradient_matching import GradientMatching
from fedpeft.attacks.span_image import SpanImage, closed_form
from fedpeft.config import RunConfig
from fedpeft.data import Encoded, load
from fedpeft.model import TaskModel, build_model, trainable_state
from fedpeft.peft import Lora
from fedpeft.privacy import NonPrivate
from fedpeft.tasks import ImageClassification, ImageClassifier
from fedpeft.tensors import Tensors, add, scale
from fedpeft.training import train_locally
from tests.attacks.federation import small_config, small_model

SCENARIO = """
[run]
rounds = 4
[data]
name = "fashion-mnist"
max_examples = 600
image_size = 28
[partition]
name = "iid"
num_clients = 3
[model]
backbone = "vit-s"
task = "image-classification"
[peft]
name = "lora"
rank = 8
[training]
optimizer = "sgd"
learning_rate = 0.02
batch_size = 1
[cohort]
size = 3
[privacy]
unit = "none"
"""
Mangle = Callable[[Tensors], Tensors]
HALF = (0.5, 0.5, 0.5)


def federation(*overrides: str, mangle: Mangle = dict) -> list[Case]:
    """Three clients of one real image each, seen in all of four rounds."""
    config = RunConfig.from_toml(SCENARIO, overrides)
    model = build_model(config, 10)
    examples = model.task.encode(load(config.data))
    surrogate = examples.subset(range(200, 600))
    knowledge = Knowledge(model, config, surrogate)
    engine = NonPrivate()
    engine.bind(model.module, model.operations)
    state = trainable_state(model)
    seen: list[list[Seen]] = [[], [], []]
    for server_round in range(1, config.run.rounds + 1):
        for client in range(3):
            update = train_locally(
                model,
                state,
                examples.subset([client]),
                [[[0]]],
                engine=engine,
                noise=lambda total, deviation: total,
                section=config.training,
                rate_factor=1.0,
                mask_seed=0,
            )
            seen[client].append(Seen(server_round, state, mangle(update)))
        for client in range(3):
            state = add(state, scale(seen[client][-1].update, 1 / 3))
    decoys = examples.subset(range(100, 200))
    return [
        Case(
            Observation(knowledge, tuple(seen[client])),
            Secret(examples.subset([client]), decoys),
        )
        for client in range(3)
    ]


@pytest.fixture(scope="module")
def cases(vit_s: Path, fashion_mnist: Path) -> list[Case]:
    return federation()


def test_a_real_image_comes_back_from_a_real_backbone(
    cases: list[Case], rng: torch.Generator
) -> None:
    attack, case = SpanImage(), cases[0]
    assert attack.misfit(case.observation.knowledge) is None
    scores = attack.score(attack.run(case.observation, rng), case.secret)
    assert scores["psnr"].item() > 25
    assert scores["identification_top1"].tolist() == [1]
    assert attack.baseline(case.observation, case.secret, rng)["psnr"].item() < 15


def test_another_clients_updates_tell_nothing_of_an_image(
    cases: list[Case], rng: torch.Generator
) -> None:
    attack = SpanImage()
    control = attack.score(attack.run(cases[1].observation, rng), cases[0].secret)
    assert control["psnr"].item() < 12
    assert control["identification_top1"].tolist() == [0]


def test_under_noise_as_large_as_privacy_wants_it_guesses_the_mean_image(
    cases: list[Case], rng: torch.Generator
) -> None:
    def noisy(part: Seen) -> Seen:
        noise = {n: torch.randn(t.shape, generator=rng) for n, t in part.update.items()}
        return replace(part, update=add(part.update, noise))

    attack, case = SpanImage(), cases[0]
    observation = replace(
        case.observation, seen=tuple(noisy(part) for part in case.observation.seen)
    )
    scores = attack.score(attack.run(observation, rng), case.secret)
    baseline = attack.baseline(case.observation, case.secret, rng)
    assert scores["psnr"].item() == baseline["psnr"].item()


@pytest.mark.parametrize(
    ("unit", "directions"), [("none", 4), ("client", 4), ("example", 0)]
)
def test_only_noise_that_the_client_adds_itself_hides_directions(
    unit: str, directions: int
) -> None:
    # Each of four directions is 8 times the root mean square; noise would give 9.
    update = {"a": 1e-2 * torch.eye(4, 32).repeat(2, 1)}
    seen = Seen(1, {"a": torch.ones(8, 32)}, update)
    knowledge = replace(
        small_model("lora"), config=small_config(f"privacy.unit={unit}")
    )
    rows = signal_rows(Observation(knowledge, (seen,)), ["a"], most=4)
    assert len(rows) == directions


def test_the_first_round_of_lora_shows_nothing(
    cases: list[Case], rng: torch.Generator
) -> None:
    attack, case = SpanImage(), cases[0]
    first = replace(case.observation, seen=case.observation.seen[:1])
    guess = attack.run(first, rng)
    surrogate = case.observation.knowledge.surrogate
    assert surrogate is not None
    assert torch.equal(guess.flatten(), learned_prior(surrogate).mean)


@pytest.mark.parametrize("change", ["first_layer=1", "freeze_a=true"])
def test_adapters_above_or_behind_a_frozen_factor_are_a_misfit(
    change: str, vit_s: Path
) -> None:
    config = RunConfig.from_toml(SCENARIO, [f"peft.{change}"])
    reason = SpanImage().misfit(Knowledge(build_model(config, 10), config))
    assert reason == "what the first trained block reads is not a normalised patch each"


def test_bias_and_head_have_no_matrix_that_reads_patches(vit_s: Path) -> None:
    for method in ("bias", "head"):
        config = RunConfig.from_toml(SCENARIO, [f"peft={{name='{method}'}}"])
        knowledge = Knowledge(build_model(config, 10), config)
        reason = SpanImage().misfit(knowledge)
        assert reason == "no trained matrix reads the first block's input"


def vision_model(width: int, side: int, patch: int) -> TaskModel:
    """A random ViT of one block, its positions and shifts as large as trained ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=side,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=width,
        )
        backbone = ViTModel(config, add_pooling_layer=False)
        with torch.no_grad():
            for name, parameter in backbone.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2 if "position" in name else 0.1)
                elif "layernorm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        operations = Lora(rank=4).attach(backbone)
        module = ImageClassifier(backbone, width, 3)
    task = ImageClassification(side, HALF, HALF)
    return TaskModel(module, [*operations, *module.head_operations], task, "", {})


def solved(model: TaskModel, images: torch.Tensor) -> tuple[Patches, torch.Tensor]:
    """The closed form from exact combinations of an image's tokens."""
    patches = find_patches(model, 3)
    assert isinstance(patches, Patches)
    tokens = patches.tokens(images.flatten(1))
    mix = torch.randn(2 * len(tokens), len(tokens)).double()
    prior = blank_prior((3, *images.shape[2:]))
    return patches, closed_form(span_of(1e12 * mix @ tokens), patches, prior, 1e12)


@pytest.mark.parametrize(("width", "is_exact"), [(64, True), (52, False)])
def test_an_image_is_unique_if_span_patch_and_scale_fit_the_width(
    width: int, is_exact: bool
) -> None:
    # Four patches of 3 * 4 * 4 = 48 pixels and a class token: 5 + 48 + 1 = 54.
    torch.manual_seed(0)
    image = torch.rand(1, 3, 8, 8).double()
    patches, found = solved(vision_model(width, 8, 4), image)
    assert patches.is_unique() == is_exact
    quality = psnr(found.view_as(image), image).item()
    assert quality > 60 if is_exact else quality < 30


def test_the_map_to_tokens_is_the_models_own() -> None:
    patches = find_patches(vision_model(64, 8, 4), 3)
    assert isinstance(patches, Patches)
    assert (patches.places.shape, patches.fixed.shape) == ((4, 48), (1, 64))
    assert len(patches.readers) == 2  # A of query and of value


def test_the_search_ends_where_the_likelihood_is_flat() -> None:
    torch.manual_seed(0)
    patches = find_patches(vision_model(64, 8, 4), 3)
    assert isinstance(patches, Patches)
    image = torch.rand(1, 192).double()
    tokens = patches.tokens(image)
    rows = 1e3 * torch.randn(10, 5).double() @ tokens
    likelihood = LikelyImages(rows, patches, blank_prior((3, 8, 8)))
    start = (image + 0.05 * torch.randn(1, 192)).clamp(0, 1)
    found = likelihood.maximum(start, 30)
    assert likelihood.distance(found) < 1e-3 * likelihood.distance(start)
    assert psnr(found.view(1, 3, 8, 8), image.view(1, 3, 8, 8)).item() > 35


def test_a_prior_has_the_spread_of_the_images_it_was_learned_from() -> None:
    rng = torch.Generator().manual_seed(0)
    brightness = torch.randint(0, 256, (400, 1, 1), generator=rng)
    pixels = brightness.expand(-1, 4, 4).to(torch.uint8)
    surrogate = Encoded([*pixels], torch.zeros(400))
    prior = learned_prior(surrogate)
    assert prior.shape == (1, 4, 4)
    drawn = prior.image(torch.randn(500, 16, generator=rng).double())
    # One number an image, of deviation 1 / sqrt(12); else the least of 0.02.
    assert drawn.mean((1, 2, 3)).std().item() == pytest.approx(0.289, rel=0.1)
    assert (drawn[:, 0, 0, 0] - drawn[:, 0, 0, 1]).std().item() == pytest.approx(
        0.02 * 2**0.5, rel=0.2
    )
    assert torch.allclose(prior.white(prior.image(prior.mean[None])), prior.mean[None])
    whole = prior.covariance(torch.arange(16)) @ prior.precision
    assert torch.allclose(whole, torch.eye(16).double())


def test_several_guesses_are_matched_to_the_nearest_truths() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1).expand(2, 8, 8)
    secret = Secret(Encoded([*pixels], torch.zeros(2)))
    truth = pixels_of(secret.examples)
    assert image_scores(truth.flip(0), secret)["psnr"].tolist() == [100, 100]
    # One guess for both: half way to each, 10 log10(1 / 0.25) = 6.02.
    grey = torch.full((1, 1, 8, 8), 0.5)
    assert image_scores(grey, secret)["psnr"].tolist() == pytest.approx(
        [6.02] * 2, 1e-3
    )


@pytest.mark.parametrize("attack", [SpanImage(), GradientMatching()])
def test_the_first_image_is_shown_beside_the_guess_it_is_compared_with(attack) -> None:
    inputs = [torch.full((8, 8), level, dtype=torch.uint8) for level in (0, 255)]
    secret = Secret(Encoded(inputs, torch.zeros(2)))
    case = Case(Observation(Knowledge(None, None)), secret)  # type: ignore[arg-type]
    guess = torch.stack([torch.full((3, 8, 8), level) for level in (0.9, 0.2)])
    truth, shown = attack.shown(guess, case)
    assert truth.shape == shown.shape == (1, 8, 8)
    assert truth.max() == 0
    assert shown.mean().item() == pytest.approx(0.2)


def test_similarity_is_one_for_equals_and_about_nothing_for_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    one, two = torch.rand(2, 1, 1, 32, 32, generator=rng).double()
    assert ssim(one, one).item() == pytest.approx(1)
    assert abs(ssim(one, two).item()) < 0.1
    assert ssim(one, 1 - one).item() < 0


def test_a_record_is_identified_if_no_decoy_is_nearer() -> None:
    rng = torch.Generator().manual_seed(0)
    truth, decoys = torch.rand(1, 1, 4, 4), torch.rand(9, 1, 4, 4, generator=rng)
    dim_and_flat = 0.2 + 0.5 * truth
    assert identified(dim_and_flat, truth, decoys).tolist() == [1]
    assert identified(decoys[:1], truth, decoys).tolist() == [0]
