"""The contract of every compressor, over the menu with a few settings each."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.compression import COMPRESSORS, ErrorFeedback
from fedpeft.config import build
from fedpeft.errors import ConfigError, InvalidPayload
from fedpeft.interfaces import Compressor, Payload
from fedpeft.sections import Component
from fedpeft.seeds import generator
from fedpeft.tensors import Tensors, add, norm, scale, subtract, zeros_like

SETTINGS: list[tuple[str, dict[str, object]]] = [
    ("dense", {}),
    ("dense", {"dtype": "fp16"}),
    ("dense", {"dtype": "bf16"}),
    ("topk", {"density": 0.1}),
    ("topk", {"density": 0.5, "dtype": "bf16"}),
    ("topk", {"density": 1.0, "dtype": "fp16"}),
    ("ternary", {"density": 0.05}),
    ("ternary", {"density": 0.2}),
    ("ternary", {"density": 1.0}),
]

COMPRESSOR = [COMPRESSORS[name](**options) for name, options in SETTINGS]

every_compressor = pytest.mark.parametrize("compressor", COMPRESSOR, ids=str)


def template() -> Tensors:
    """Three layers of two roles, a head, a scalar, and nothing at all."""
    layers = {
        f"layer.{depth}.{role}": torch.zeros(shape)
        for depth in range(3)
        for role, shape in (("lora_A", (2, 8)), ("bias", (5,)))
    }
    return layers | {
        "head.weight": torch.zeros(2, 4),
        "scalar": torch.zeros(()),
        "nothing": torch.zeros(0, 3),
    }


def random_update(like: Tensors, seed: int = 0) -> Tensors:
    rng = generator(seed, "update")
    return {
        name: torch.randn(tensor.shape, generator=rng).to(tensor.dtype)
        for name, tensor in like.items()
    }


def compressed(compressor: Compressor, update: Tensors) -> Payload:
    return compressor.compress(update, generator(0, "compress"))


def assert_same_template(tensors: Tensors, like: Tensors) -> None:
    assert list(tensors) == list(like)
    for name, tensor in tensors.items():
        assert tensor.shape == like[name].shape
        assert tensor.dtype == like[name].dtype
        assert torch.isfinite(tensor).all()


def test_every_variant_of_the_menu_has_settings() -> None:
    assert {name for name, _ in SETTINGS} == set(COMPRESSORS)


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_config_builds_the_variant(name: str, options: dict[str, object]) -> None:
    section = Component(name=name, **options)
    built = build(COMPRESSORS, section, "compression")
    assert built == COMPRESSORS[name](**options)


@every_compressor
def test_names_shapes_and_dtypes_come_back(compressor: Compressor) -> None:
    like = template()
    payload = compressed(compressor, random_update(like))
    assert_same_template(compressor.decompress(payload, like), like)


@every_compressor
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_template_decides_the_dtype(
    compressor: Compressor, dtype: torch.dtype
) -> None:
    like = {name: tensor.to(dtype) for name, tensor in template().items()}
    payload = compressed(compressor, random_update(like))
    assert_same_template(compressor.decompress(payload, like), like)


@every_compressor
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6),
    seed=st.integers(0, 2**32),
)
def test_any_shapes_come_back(
    compressor: Compressor, shapes: list[list[int]], seed: int
) -> None:
    like = {f"tensor.{i}.{'ab'[i % 2]}": torch.zeros(s) for i, s in enumerate(shapes)}
    update = random_update(like, seed)
    payload = Payload.from_bytes(compressed(compressor, update).to_bytes())
    decoded = compressor.decompress(payload, like)
    assert_same_template(decoded, like)
    # No compressor makes the error larger than the update itself.
    assert norm(subtract(update, decoded)) <= norm(update) * (1 + 1e-6)


@every_compressor
def test_zeros_stay_zeros(compressor: Compressor) -> None:
    like = template()
    payload = compressed(compressor, like)
    assert norm(compressor.decompress(payload, like)) == 0

    update = random_update(like)
    update["layer.1.lora_A"][:, ::2] = 0
    decoded = compressor.decompress(compressed(compressor, update), like)
    assert not decoded["layer.1.lora_A"][:, ::2].any()


@every_compressor
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(
    compressor: Compressor, value: float
) -> None:
    update = random_update(template())
    update["head.weight"][1, 2] = value
    with pytest.raises(ValueError, match="finite values, got NaN or infinity"):
        compressed(compressor, update)


@every_compressor
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_and_smallest_numbers_survive(
    compressor: Compressor, dtype: torch.dtype
) -> None:
    limits = torch.finfo(dtype)
    values = [limits.max, limits.min, limits.tiny, -limits.tiny, 1e-45, 0.0, -0.0, 1.0]
    like = {"a": torch.zeros(8, dtype=dtype)}
    update = {"a": torch.tensor(values, dtype=dtype)}
    payload = compressed(compressor, update)
    assert_same_template(compressor.decompress(payload, like), like)


@every_compressor
def test_same_rng_gives_same_bytes(compressor: Compressor) -> None:
    update = random_update(template())
    first, second = (compressed(compressor, update) for _ in range(2))
    assert first.to_bytes() == second.to_bytes()


@every_compressor
def test_order_of_names_does_not_matter(compressor: Compressor) -> None:
    update = random_update(template())
    turned = dict(reversed(update.items()))
    payload = compressed(compressor, turned)
    assert payload == compressed(compressor, update)
    decoded = compressor.decompress(payload, turned)
    for name, tensor in compressor.decompress(payload, update).items():
        assert torch.equal(decoded[name], tensor)


@every_compressor
def test_the_update_is_left_alone(compressor: Compressor) -> None:
    update = {n: t.requires_grad_() for n, t in random_update(template()).items()}
    before = {name: tensor.detach().clone() for name, tensor in update.items()}
    decoded = compressor.decompress(compressed(compressor, update), template())
    assert all(torch.equal(update[name], before[name]) for name in update)
    assert not any(tensor.requires_grad for tensor in decoded.values())


@every_compressor
def test_entropy_bounds_the_body(compressor: Compressor) -> None:
    like = template()
    payload = compressed(compressor, random_update(like))
    bits = compressor.entropy_bits(payload, like)
    # The coder starts from nothing, so its first symbols may cost a little less.
    assert bits / 8 - 1 <= len(payload.body) <= bits / 8 + 4


# Bad payloads.


@every_compressor
def test_every_changed_byte_and_every_cut_is_refused(compressor: Compressor) -> None:
    like = template()
    data = compressed(compressor, random_update(like)).to_bytes()
    for position in range(len(data)):
        mutated = bytearray(data)
        mutated[position] ^= 1 + position % 255
        for broken in (bytes(mutated), data[:position]):
            with pytest.raises(InvalidPayload):
                compressor.decompress(Payload.from_bytes(broken), like)


def decode_or_refuse(compressor: Compressor, payload: Payload, like: Tensors) -> bool:
    """Returns whether it decoded; anything but a good result or a refusal raises."""
    try:
        payload = Payload.from_bytes(payload.to_bytes())
        decoded = compressor.decompress(payload, like)
    except InvalidPayload:
        return False
    assert_same_template(decoded, like)
    return True


@every_compressor
@pytest.mark.parametrize("part", ["header", "body"])
def test_a_changed_byte_with_a_right_checksum_never_crashes(
    compressor: Compressor, part: str
) -> None:
    like = template()
    payload = compressed(compressor, random_update(like))
    content = getattr(payload, part)
    for position in range(len(content)):
        for change in (1, 0x80, 0xFF):
            mutated = bytearray(content)
            mutated[position] ^= change
            changed = dataclasses.replace(payload, **{part: bytes(mutated)})
            decode_or_refuse(compressor, changed, like)
        for cut in (content[:position], content + bytes(position + 1)):
            changed = dataclasses.replace(payload, **{part: cut})
            assert not decode_or_refuse(compressor, changed, like)


def mutate(payload: Payload, rng: torch.Generator) -> Payload:
    """Changes, drops, doubles or adds a few bytes of the header or the body."""

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=rng))

    part = ("header", "body")[draw(2)]
    content = bytearray(getattr(payload, part))
    for _ in range(1 + draw(4)):
        start = draw(len(content) + 1)
        stop = start + draw(3)
        content[start:stop] = bytes(draw(256) for _ in range(draw(4)))
    return dataclasses.replace(payload, **{part: bytes(content)})


@every_compressor
def test_random_mutations_never_crash(compressor: Compressor) -> None:
    like = template()
    payload = compressed(compressor, random_update(like))
    rng = generator(0, "mutations")
    for _ in range(2000):
        decode_or_refuse(compressor, mutate(payload, rng), like)


@given(data=st.binary(max_size=80))
def test_junk_is_no_payload(data: bytes) -> None:
    with pytest.raises(InvalidPayload):
        Payload.from_bytes(data)


@every_compressor
@given(header=st.binary(max_size=24), body=st.binary(max_size=40))
def test_junk_behind_a_right_template_check_never_crashes(
    compressor: Compressor, header: bytes, body: bytes
) -> None:
    like = {"a": torch.zeros(7), "b": torch.zeros(2, 2)}
    honest = compressed(compressor, like)
    junk = dataclasses.replace(honest, header=honest.header[:4] + header, body=body)
    decode_or_refuse(compressor, junk, like)


@every_compressor
def test_another_codec_or_version_is_refused(compressor: Compressor) -> None:
    payload = compressed(compressor, random_update(template()))
    for change in ({"codec": "other"}, {"version": 2}):
        with pytest.raises(InvalidPayload, match="version"):
            compressor.decompress(dataclasses.replace(payload, **change), template())


@every_compressor
@pytest.mark.parametrize(
    "change",
    [
        {"head.weight": torch.zeros(4, 2)},
        {"scalar": torch.zeros(2)},
        {"one.more": torch.zeros(1)},
    ],
)
def test_another_template_is_refused(compressor: Compressor, change: Tensors) -> None:
    payload = compressed(compressor, random_update(template()))
    with pytest.raises(InvalidPayload, match="same method and model"):
        compressor.decompress(payload, template() | change)
    with pytest.raises(InvalidPayload, match="same method and model"):
        compressor.entropy_bits(payload, template() | change)


@pytest.mark.parametrize("receiver", COMPRESSOR, ids=str)
@every_compressor
def test_another_setting_never_crashes(
    compressor: Compressor, receiver: Compressor
) -> None:
    like = template()
    payload = compressed(compressor, random_update(like))
    assert decode_or_refuse(receiver, payload, like) or receiver != compressor


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("topk", {"density": 0.0}, "Expected 0 < density <= 1, got 0.0."),
        ("ternary", {"density": 1.5}, "Expected 0 < density <= 1, got 1.5."),
        ("ternary", {"density": float("nan")}, "Expected 0 < density <= 1, got nan."),
        ("dense", {"dtype": "fp8"}, "Expected dtype in fp32, fp16, bf16, got 'fp8'."),
    ],
)
def test_bad_hyperparameters_are_refused(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        COMPRESSORS[name](**options)


def test_a_bad_hyperparameter_is_one_line_of_the_configuration() -> None:
    section = Component(name="ternary", density=0)
    with pytest.raises(ConfigError, match="expected 0 < density <= 1, got 0"):
        build(COMPRESSORS, section, "compression")


# Error feedback.


@every_compressor
def test_error_feedback_telescopes(compressor: Compressor) -> None:
    feedback, rng = ErrorFeedback(compressor), generator(0, "feedback")
    like = template()
    residual = sent = decoded = zeros_like(like)
    for server_round in range(20):
        update = random_update(like, server_round)
        payload, residual = feedback.compress(update, residual, rng)
        sent = add(sent, update)
        decoded = add(decoded, compressor.decompress(payload, like))
    gap = subtract(subtract(sent, residual), decoded)
    assert norm(gap) <= 1e-5 * norm(sent)


@every_compressor
def test_error_feedback_removes_the_bias(compressor: Compressor) -> None:
    feedback, rng = ErrorFeedback(compressor), generator(0, "feedback")
    like, update = template(), random_update(template())
    residual = decoded = zeros_like(like)
    rounds = 300
    for _ in range(rounds):
        payload, residual = feedback.compress(update, residual, rng)
        decoded = add(decoded, compressor.decompress(payload, like))
    mean = scale(decoded, 1 / rounds)
    assert norm(subtract(mean, update)) <= 0.12 * norm(update)
