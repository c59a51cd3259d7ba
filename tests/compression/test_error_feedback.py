"""Error feedback by hand; the contract test covers it over the menu."""

import pytest
import torch

from fedpeft.compression import Dense, ErrorFeedback, TopK
from fedpeft.seeds import generator
from fedpeft.tensors import norm, zeros_like


def test_what_is_lost_comes_in_the_next_round() -> None:
    feedback = ErrorFeedback(TopK(density=0.5))
    update = {"a": torch.tensor([3.0, 2.0])}
    rng, residual, received = generator(0), zeros_like(update), []
    for _ in range(3):
        payload, residual = feedback.compress(update, residual, rng)
        received.append(feedback.compressor.decompress(payload, update)["a"].tolist())
    # Inputs: [3, 2], then [3, 2] + [0, 2], then [3, 2] + [3, 0].
    assert received == [[3.0, 0.0], [0.0, 4.0], [6.0, 0.0]]
    assert residual["a"].tolist() == [0.0, 2.0]


def test_an_exact_compressor_leaves_nothing() -> None:
    update = {"a": torch.randn(50, generator=generator(0))}
    _, residual = ErrorFeedback(Dense()).compress(
        update, zeros_like(update), generator(0)
    )
    assert norm(residual) == 0


def test_clamping_is_carried_over() -> None:
    update = {"a": torch.tensor([70000.0])}
    _, residual = ErrorFeedback(Dense("fp16")).compress(
        update, zeros_like(update), generator(0)
    )
    assert residual["a"].item() == 70000 - 65504


@pytest.mark.parametrize(
    "residual", [{}, {"b": torch.zeros(2)}, {"a": torch.zeros(1)}], ids=str
)
def test_a_residual_of_another_method_is_refused(
    residual: dict[str, torch.Tensor],
) -> None:
    feedback = ErrorFeedback(Dense())
    with pytest.raises(ValueError, match="start from zeros"):
        feedback.compress({"a": torch.ones(2)}, residual, generator(0))
