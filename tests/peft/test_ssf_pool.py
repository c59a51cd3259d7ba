"""Pools of scales and shifts: the choice, its equality with plain loops, the keys."""

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.oracle import loop_gradients, relative_error
from fedpeft.peft import SSF, ScaleShift, SSFPool
from fedpeft.peft._pool_query import PoolQuery
from fedpeft.peft._pools import Choice, PooledHead, PooledScaleShift
from fedpeft.peft.pool_keys import Keys, fit_keys, write_keys
from fedpeft.privacy import DpSgd
from tests.helpers import (
    FAMILIES,
    assert_rows_close,
    tiny_bert,
    tiny_llama,
    toy,
    toy_inputs,
    toy_losses,
)

POOL = SSFPool(pool_size=5, top_k=2)


def _pool_of(entries: int, features: int = 3) -> PooledScaleShift:
    pool = PooledScaleShift(Choice(), entries, features)
    for parameter in pool.parameters():
        nn.init.normal_(parameter)
    return pool


def _query(backbone: nn.Module) -> PoolQuery:
    query = backbone.get_submodule("pool_query")
    assert isinstance(query, PoolQuery)
    return query


def _with_chosen_alone(backbone: nn.Module, indices: torch.Tensor) -> nn.Module:
    """Puts one example's mean entries behind the layers, as a plain SSF."""
    plain = copy.deepcopy(backbone)
    plain._forward_pre_hooks.clear()
    for name, module in list(plain.named_modules()):
        if isinstance(module, PooledScaleShift):
            single = ScaleShift(module.pool_scale.shape[1])
            single.scale.data = module.pool_scale[indices].mean(0)
            single.shift.data = module.pool_shift[indices].mean(0)
            plain.set_submodule(name, single)
    return plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first_layer", [0, 1])
def test_the_batch_equals_one_plain_model_an_example(
    family: str, first_layer: int
) -> None:
    method = SSFPool(pool_size=5, top_k=3, first_layer=first_layer)
    backbone = toy(method, family=family).plain.backbone.eval()
    inputs = toy_inputs(family, 6)
    query = _query(backbone)
    with torch.no_grad():
        computed = query.compute(backbone, inputs)
        queries = computed if computed.dim() == 2 else computed[:, 0]
        query.centre.copy_(queries.mean(0))  # else all choose the same
        together = backbone(**inputs).last_hidden_state
        chosen = query.choice.indices
        assert chosen is not None
        assert len({tuple(sorted(row)) for row in chosen.tolist()}) > 1
        for index, indices in enumerate(chosen):
            one = {name: value[index : index + 1] for name, value in inputs.items()}
            alone = _with_chosen_alone(backbone, indices)(**one).last_hidden_state
            assert relative_error(together[index : index + 1], alone) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pool_of_one_is_ssf_exactly(family: str) -> None:
    pool, ssf = (toy(m, family=family) for m in (SSFPool(1, 1), SSF()))
    losses = [toy_losses(case.plain, 4) for case in (pool, ssf)]
    assert torch.equal(*losses)
    gradients = [
        torch.autograd.grad(loss.sum(), case.plain_parameters)
        for loss, case in zip(losses, (pool, ssf), strict=True)
    ]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_single_entry_computes_what_one_pair_computes() -> None:
    torch.manual_seed(0)
    pool, pair = _pool_of(1), ScaleShift(3)
    pair.scale.data, pair.shift.data = pool.pool_scale.data[0], pool.pool_shift.data[0]
    pool.choice.indices = torch.zeros(4, 1, dtype=torch.int64)
    y = torch.randn(4, 5, 3)
    assert torch.equal(pool(y), pair(y))
    rows = []
    for module, operation in ((pool, pool.operation), (pair, pair.operation)):
        engine = DpSgd(1.0, 0.0, 1)
        engine.bind(module, [operation])
        losses = torch.tanh(module(y)).flatten(1).sum(1)
        rows.append(engine.per_sample_gradients(losses))
    assert torch.equal(*rows)


def test_an_example_gets_the_mean_of_its_entries() -> None:
    pool = PooledScaleShift(Choice(), 3, 2)
    pool.pool_scale.data = torch.tensor([[1.0, 1.0], [3.0, 5.0], [9.0, 9.0]])
    pool.pool_shift.data = torch.tensor([[0.0, 2.0], [4.0, 0.0], [9.0, 9.0]])
    pool.choice.indices = torch.tensor([[0, 1], [2, 2]])
    z = pool(torch.ones(2, 1, 2))
    assert z.tolist() == [[[4.0, 4.0]], [[18.0, 18.0]]]


@pytest.mark.parametrize("middle", [(), (5,), (2, 3)])
def test_per_sample_gradients_touch_the_chosen_entries_alone(middle) -> None:
    torch.manual_seed(1)
    pool = _pool_of(6)
    pool.choice.indices = torch.tensor([[0, 4], [4, 5], [2, 1], [0, 4]])
    plain = copy.deepcopy(pool)
    y = torch.randn(4, *middle, 3)
    engine = DpSgd(1.0, 0.0, 1)
    engine.bind(pool, [pool.operation])
    losses = torch.tanh(pool(y)).flatten(1).sum(1)
    rows = engine.per_sample_gradients(losses)
    parameters = list(plain.parameters())
    expected = loop_gradients(torch.tanh(plain(y)).flatten(1).sum(1), parameters)
    assert_rows_close(rows, expected, parameters)
    touched = rows.view(4, 2, 6, 3).ne(0).any(3)  # scale and shift, entry by entry
    for row, chosen in zip(touched, plain.indices, strict=True):
        for of_kind in row:
            assert of_kind.nonzero().flatten().tolist() == sorted(chosen.tolist())


def test_a_pooled_head_is_the_mean_of_the_chosen_entries_heads() -> None:
    head = PooledHead(Choice(), 3, 2, 1)
    weights = torch.tensor([[1.0, 2.0, 10.0], [3.0, 4.0, 20.0], [5.0, 6.0, 90.0]])
    head.entries.weight.data = weights.view(1, 9)  # two factors and a bias an entry
    head.choice.indices = torch.tensor([[0, 1]])
    assert head(torch.ones(1, 2)).item() == (1 + 2 + 10 + 3 + 4 + 20) / 2


def test_a_pooled_head_belongs_to_the_classifier_and_starts_at_zero() -> None:
    case = toy(SSFPool(pool_size=4, head="pooled"), noise=0.0)
    head = case.model.head
    assert isinstance(head, PooledHead)
    assert head.entries.weight.shape == (3, 4 * 33)
    assert not head.entries.weight.any()
    assert [op.module for op in case.model.head_operations] == [head.entries]
    assert isinstance(toy(POOL).model.head, nn.Linear)


def test_a_module_that_chooses_nothing_is_refused() -> None:
    pair = ScaleShift(3)
    operation = Operation(pair, "pool", dict(pair.named_parameters()))
    with pytest.raises(ValueError, match="a module with indices, got ScaleShift"):
        DpSgd(1.0, 0.0, 1).bind(pair, [operation])


def test_nothing_that_travels_or_is_kept_holds_a_choice() -> None:
    case = toy(POOL)
    before = {name: t.clone() for name, t in case.model.state_dict().items()}
    toy_losses(case.model, 4)
    after = case.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_copy_chooses_for_itself() -> None:
    backbone = tiny_bert()
    POOL.attach(backbone)
    twin = copy.deepcopy(backbone)
    twin(**toy_inputs("bert", 3))
    assert _query(backbone).choice.indices is None
    pools = [m for m in twin.modules() if isinstance(m, PooledScaleShift)]
    assert all(pool.choice is _query(twin).choice for pool in pools)


def test_the_choice_knows_neither_dropout_nor_precision_nor_training() -> None:
    backbone, inputs = toy(POOL, dropout=0.5).plain.backbone, toy_inputs("bert", 6)
    choices = []
    for training, precise in ((True, True), (False, True), (True, False)):
        backbone.train(training)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
            backbone(**inputs)
        assert backbone.training == training
        choices.append(_query(backbone).choice.indices)
    assert torch.equal(choices[0], choices[1])
    assert torch.equal(choices[0], choices[2])


def test_a_query_is_the_mean_the_class_token_or_the_last_token() -> None:
    with torch.no_grad():
        for family, build in FAMILIES.items():
            backbone, inputs = build(), toy_inputs(family, 3)
            hidden = backbone(**inputs).last_hidden_state
            POOL.attach(backbone)
            queries = _query(backbone).compute(backbone, inputs)
            for row, query in enumerate(queries):
                length = int(inputs.get("attention_mask", torch.zeros(3, 1))[row].sum())
                expected = {
                    "vit": hidden[row, 0],
                    "bert": hidden[row, :length].mean(0),
                    "llama": hidden[row, length - 1],
                }[family]
                assert torch.allclose(query, expected, atol=1e-6)


def test_an_unknown_architecture_does_not_tell_which_token_sees_all() -> None:
    backbone = tiny_bert()
    backbone.config.model_type = "new"
    with pytest.raises(ValueError, match=r"of type bert, .* got 'new': choose ssf"):
        POOL.attach(backbone)


def test_the_nearest_keys_after_the_centre_are_chosen() -> None:
    keys = Keys(torch.eye(3), torch.tensor([5.0, 5.0, 5.0]))
    query = PoolQuery(keys, Choice(), 2)
    query.choose(torch.tensor([[5.5, 6.0, 4.0], [9.0, 5.0, 10.0]]))
    assert query.choice.indices is not None
    assert query.choice.indices.tolist() == [[1, 0], [2, 0]]


def test_random_keys_are_orthonormal_and_the_same_for_the_same_seed() -> None:
    keys = []
    for _ in range(2):
        torch.manual_seed(3)
        backbone = tiny_bert()
        POOL.attach(backbone)
        keys.append(_query(backbone).keys)
    assert torch.equal(*keys)
    assert torch.allclose(keys[0] @ keys[0].t(), torch.eye(5), atol=1e-6)
    assert not keys[0].requires_grad


def test_keys_come_from_a_file_of_public_examples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    corners = 4 * torch.eye(32)[:5]
    queries = corners.repeat(10, 1) + 0.01 * torch.randn(50, 32)
    keys = fit_keys(queries, 5)
    sha256 = write_keys(keys, tmp_path / "keys.safetensors")
    backbone = tiny_bert()
    path = str(tmp_path / "keys.safetensors")
    SSFPool(5, 1, keys=path, sha256=sha256).attach(backbone)
    query = _query(backbone)
    assert torch.equal(query.keys, keys.keys)
    query.choose(corners)
    assert query.choice.indices is not None
    assert sorted(query.choice.indices.flatten().tolist()) == [0, 1, 2, 3, 4]


def test_other_keys_than_expected_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.safetensors"
    sha256 = write_keys(Keys(torch.eye(32)[:4], torch.zeros(32)), path)
    for method, message in (
        (SSFPool(4, 1, keys=str(path), sha256="0" * 64), "all clients need the same"),
        (SSFPool(5, 1, keys=str(path), sha256=sha256), r"shape \(5, 32\) and"),
        (SSFPool(4, 1, keys="none", sha256=sha256), "No such file"),
    ):
        with pytest.raises(ValueError, match=message):
            method.attach(tiny_bert())
    path.write_bytes(b"no tensors")
    junk = hashlib.sha256(b"no tensors").hexdigest()
    with pytest.raises(ValueError, match="a safetensors file at"):
        SSFPool(4, 1, keys=str(path), sha256=junk).attach(tiny_bert())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_size": 0}, "pool_size >= 1, got 0"),
        ({"pool_size": 2, "top_k": 3}, "top_k <= pool_size = 2, got 3"),
        ({"first_layer": -1}, "first_layer >= 0, got -1"),
        ({"keys": "keys.safetensors"}, "together, got one of them"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSFPool(**options)


def test_more_keys_than_features_are_refused() -> None:
    with pytest.raises(ValueError, match="pool_size <= 32, the features"):
        SSFPool(pool_size=33).attach(tiny_bert())


def test_a_growing_text_is_refused() -> None:
    backbone = tiny_llama()
    POOL.attach(backbone)
    inputs = toy_inputs("llama", 2)
    earlier = backbone(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="earlier keys and values"):
        backbone(**inputs, past_key_values=earlier)


COUNTING = SSFPool(pool_size=4, top_k=2, counts=True, count_scale=0.5)


def _counts_of(model: nn.Module) -> nn.Parameter:
    (found,) = [p for n, p in model.named_parameters() if n.endswith("pool_counts")]
    return found


def test_counts_change_nothing_that_is_computed() -> None:
    pools = [toy(method).plain for method in (COUNTING, SSFPool(4, 2))]
    state = {n: p for n, p in pools[0].named_parameters() if "pool_counts" not in n}
    pools[1].load_state_dict(state, strict=False)
    assert torch.equal(*(toy_losses(pool, 4) for pool in pools))


def test_a_step_of_sgd_counts_the_share_that_chose_an_entry() -> None:
    case = toy(COUNTING)
    counts, before = _counts_of(case.model), _counts_of(case.plain).clone()
    engine = DpSgd(float("inf"), 0.0, nominal_batch=5)
    engine.bind(case.model, case.operations)
    engine.accumulate(toy_losses(case.model, 5))
    engine.step(lambda total, _: total)
    torch.optim.SGD([counts], lr=2.0).step()
    indices = _query(case.model.backbone).choice.indices
    assert indices is not None
    times = torch.bincount(indices.flatten(), minlength=4)
    assert torch.allclose(counts - before, 2.0 * 0.5 * times / 5)


def test_counts_are_clipped_with_all_the_rest() -> None:
    case = toy(COUNTING)
    engine = DpSgd(1e-3, 0.0, nominal_batch=1)
    engine.bind(case.model, case.operations)
    engine.accumulate(toy_losses(case.model, 1))
    engine.step(lambda total, _: total)
    trainable = [p for p in case.model.parameters() if p.requires_grad]
    total = sum(float(p.grad.square().sum()) for p in trainable if p.grad is not None)
    assert total**0.5 == pytest.approx(1e-3, rel=1e-3)
    assert _counts_of(case.model).grad is not None


def test_an_example_without_a_gradient_is_not_counted() -> None:
    case = toy(COUNTING)
    engine = DpSgd(1.0, 0.0, nominal_batch=1)
    engine.bind(case.model, case.operations)
    weights = torch.tensor([1.0, 0.0, 1.0])
    rows = engine.per_sample_gradients(toy_losses(case.model, 3) * weights)
    assert rows.any(1).tolist() == [True, False, True]


def test_a_module_that_does_not_count_is_refused() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="a module with increments, got Linear"):
        DpSgd(1.0, 0.0, 1).bind(
            layer, [Operation(layer, "counts", {"counts": layer.weight})]
        )
