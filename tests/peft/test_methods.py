"""Each method alone: how many parameters, what they do, what is refused.

Counts by closed formula: all families have 2 layers, 32 features, 64 inside.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, DynamicCache

from fedpeft.interfaces import PeftMethod
from fedpeft.peft import (
    IA3,
    SSF,
    Bias,
    Bottleneck,
    Film,
    Full,
    Head,
    Lora,
    Nola,
    Prefix,
    Prompt,
    SSFPool,
    TokenRows,
    Vera,
)
from fedpeft.peft._layers import ROLES
from tests.helpers import FAMILIES, tiny_bert, tiny_llama, tiny_vit, toy_inputs

LINEAR = 4 * 32 + 64 + 32  # outputs of query, key, value, output; up; down
LLAMA_BIAS = 2 * 32 + 2 * 16  # of the attention block alone
LAYER = 4 * 32 * 32 + 2 * 32 * 64 + LINEAR + 4 * 32
LLAMA_LAYER = 2 * 32 * (32 + 16) + 3 * 32 * 64 + LLAMA_BIAS + 2 * 32
LLAMA_LINEAR = 2 * 32 + 2 * 16 + 2 * 64 + 32  # keys and values have half the heads


@pytest.mark.parametrize(
    ("method", "bert", "vit", "llama"),
    [
        (Head(), 0, 0, 0),
        (Bias(), 2 * (LINEAR + 64) + 32, 2 * (LINEAR + 64) + 32, 2 * LLAMA_BIAS),
        (Bias(first_layer=1), LINEAR + 64, LINEAR + 64, LLAMA_BIAS),
        (Film(), 2 * 5 * 32, 2 * 5 * 32, 5 * 32),
        (Film(first_layer=1), 2 * 2 * 32, 2 * 2 * 32, 2 * 32),
        (
            SSF(),
            2 * (2 * (LINEAR + 64) + 32),
            2 * (2 * (LINEAR + 64) + 32),
            2 * (2 * (LLAMA_LINEAR + 64) + 32),
        ),
        (IA3(), 2 * (32 + 32 + 64), 2 * (32 + 32 + 64), 2 * (16 + 16 + 64)),
        (IA3(first_layer=1), 128, 128, 96),
        (Lora(rank=4), 2 * 2 * 4 * 64, 2 * 2 * 4 * 64, 2 * 4 * (64 + 48)),
        (Lora(rank=4, freeze_a=True), 2 * 2 * 4 * 32, 2 * 2 * 4 * 32, 2 * 4 * 48),
        (Lora(rank=4, first_layer=1), 2 * 4 * 64, 2 * 4 * 64, 4 * (64 + 48)),
        (Bottleneck(width=4), *3 * (2 * (2 * 4 * 32 + 4 + 32),)),
        (Bottleneck(width=4, placement="both"), *3 * (4 * (2 * 4 * 32 + 4 + 32),)),
        (Bottleneck(width=4, first_layer=1), *3 * (2 * 4 * 32 + 4 + 32,)),
        (Prompt(length=5), 5 * 32, 5 * 32, 5 * 32),
        (Prompt(length=5, deep=True), 2 * 5 * 32, 2 * 5 * 32, 2 * 5 * 32),
        (Full(), 2 * LAYER, 2 * LAYER + 64, 2 * LLAMA_LAYER + 32),
        (Full(first_layer=1), LAYER, LAYER + 64, LLAMA_LAYER + 32),
        (Prefix(length=5), 2 * 2 * 5 * 32, 2 * 2 * 5 * 32, 2 * 2 * 5 * 16),
        (Prefix(length=5, first_layer=1), 2 * 5 * 32, 2 * 5 * 32, 2 * 5 * 16),
    ],
)
def test_number_of_trainable_parameters(method, bert, vit, llama) -> None:
    for family, count in (("bert", bert), ("vit", vit), ("llama", llama)):
        backbone = FAMILIES[family]()
        method.attach(backbone)
        trainable = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        assert trainable == count, family


@pytest.mark.parametrize("name", ROLES)
def test_every_architecture_of_the_table_has_its_roles(name: str) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    if name == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    if ROLES[name] is ROLES["llama"]:
        sizes["num_key_value_heads"] = 2
    config = AutoConfig.for_model(name, **sizes)
    inputs = toy_inputs("bert", 2)
    if name in ("vit", "dinov2"):
        inputs = {"pixel_values": torch.zeros(2, 3, 224, 224)}
    for method, count in (
        (IA3(), 2 * 3),
        (Bottleneck(placement="both"), 2 * 2 * 2),
        (Prefix(), 2),
        (Lora(), 2 * 2 * 2),
        (Prompt(), 1),
        (Prompt(deep=True), 2),
    ):
        backbone = AutoModel.from_config(config)
        assert len(method.attach(backbone)) == count
        with torch.no_grad():
            assert backbone(**inputs).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(("stabilized", "factor"), [(False, 6 / 4), (True, 6 / 2)])
def test_lora_adds_the_scaled_product(stabilized: bool, factor: float) -> None:
    backbone = tiny_bert()
    method = Lora(rank=4, lora_alpha=6, rank_stabilized=stabilized, freeze_a=True)
    up, *_ = method.attach(backbone)
    query = backbone.encoder.layer[0].attention.self.query
    nn.init.ones_(up.module.weight)
    x = torch.ones(1, 32)
    down = query.lora_A["default"].weight
    expected = query.base_layer(x) + factor * down.sum()
    assert (query(x) - expected).abs().max() < 1e-5


def test_ssf_scales_then_shifts() -> None:
    backbone = tiny_bert()
    first, *_ = SSF(first_layer=1).attach(backbone)
    nn.init.constant_(first.parameters["scale"], 2.0)
    nn.init.constant_(first.parameters["shift"], 3.0)
    frozen, _ = query = backbone.encoder.layer[1].attention.self.query
    x = torch.ones(1, 32)
    assert (query(x) - (2 * frozen(x) + 3)).abs().max() < 1e-6


def test_ssf_leaves_the_patch_embedding_alone() -> None:
    backbone = tiny_vit()
    SSF().attach(backbone)
    assert isinstance(backbone.embeddings.patch_embeddings.projection, nn.Conv2d)


def test_ia3_scales_keys_values_and_the_inner_activations() -> None:
    backbone = tiny_llama()
    for operation in IA3().attach(backbone):
        nn.init.constant_(operation.parameters["scale"], 2.0)
    layer, plain = backbone.layers[0], tiny_llama().layers[0]
    x = torch.linspace(-1, 1, 32).expand(1, 32)
    for name in ("k_proj", "v_proj"):
        scaled = layer.self_attn.get_submodule(name)(x)
        assert torch.equal(scaled, 2 * plain.self_attn.get_submodule(name)(x))
    assert torch.equal(layer.self_attn.q_proj(x), plain.self_attn.q_proj(x))
    assert (layer.mlp(x) - 2 * plain.mlp(x)).abs().max() < 1e-6


def test_bottleneck_adds_gelu_of_the_narrow_features() -> None:
    backbone = tiny_bert()
    down, up = Bottleneck(width=1, first_layer=1).attach(backbone)
    nn.init.ones_(down.module.weight)
    nn.init.constant_(down.module.bias, 1.0)
    nn.init.ones_(up.module.weight)
    frozen, adapter = backbone.encoder.layer[1].output.dense
    assert isinstance(frozen, nn.Linear)
    y = torch.ones(1, 32)
    assert torch.allclose(adapter(y), 1 + F.gelu(torch.tensor(33.0)))


def test_a_prompt_is_as_if_its_embeddings_came_first() -> None:
    inputs = toy_inputs("llama", 3)
    plain, backbone = tiny_llama(), tiny_llama()
    (prompt,) = Prompt(length=4).attach(backbone)
    tokens = prompt.parameters["tokens"].expand(3, 4, 32)
    embedded = torch.cat((tokens, plain.embed_tokens(inputs["input_ids"])), 1)
    mask = torch.cat((torch.ones(3, 4), inputs["attention_mask"]), 1)
    expected = plain(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
    actual = backbone(*inputs.values()).last_hidden_state
    assert torch.equal(actual, expected[:, 4:])


def test_a_text_prompt_starts_from_rows_of_the_vocabulary() -> None:
    backbone = tiny_bert()
    table = backbone.embeddings.word_embeddings.weight
    (prompt,) = Prompt(length=6).attach(backbone)
    for token in prompt.parameters["tokens"]:
        assert (token == table).all(1).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_prompt_takes_the_place_of_what_came_out_below(family: str) -> None:
    inputs = toy_inputs(family, 1)
    shallow, deep = FAMILIES[family](), FAMILIES[family]()
    (first,) = Prompt(length=4).attach(shallow)
    below, above = Prompt(length=4, deep=True).attach(deep)
    below.module.load_state_dict(first.module.state_dict())
    at = 1 if family == "vit" else 0
    seen = []

    def note(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0][0, at : at + 4].detach())

    layers = shallow.get_submodule(ROLES[shallow.config.model_type].layers)
    layers[1].register_forward_pre_hook(note)
    expected = shallow(**inputs).last_hidden_state
    other = deep(**inputs).last_hidden_state
    assert (other - expected).abs().max() > 1e-4
    above.module.tokens.data.copy_(*seen)
    assert torch.equal(deep(**inputs).last_hidden_state, expected)


def test_a_prompt_refuses_what_it_cannot_move() -> None:
    backbone = tiny_bert()
    Prompt(length=500).attach(backbone)
    inputs = toy_inputs("bert", 2)
    with pytest.raises(ValueError, match="whole texts"):
        backbone(**inputs, position_ids=torch.arange(7)[None])
    with pytest.raises(ValueError, match="without a name"):
        backbone(*inputs.values(), None)
    with pytest.raises(ValueError, match="at most 12 tokens behind a prompt of 500"):
        backbone(input_ids=torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("is_padded", [True, False])
def test_a_prefix_is_as_if_its_keys_and_values_were_cached(
    implementation, is_padded
) -> None:
    plain, backbone = tiny_llama(), tiny_llama()
    for model in (plain, backbone):
        model.set_attn_implementation(implementation)
    operations = Prefix(length=4).attach(backbone)
    cache = DynamicCache(config=plain.config)
    for layer, operation in enumerate(operations):
        tokens = nn.init.normal_(operation.parameters["tokens"])
        heads = tokens.detach().view(2, 4, 2, 8).transpose(1, 2)
        cache.update(*heads.unsqueeze(1).expand(2, 3, 2, 4, 8), layer)
    inputs = toy_inputs("llama", 3)
    if not is_padded:  # the case in which sdpa would make no mask of its own accord
        inputs["attention_mask"] = torch.ones(3, 7)
    mask = torch.cat((torch.ones(3, 4), inputs["attention_mask"]), 1)
    expected = plain(
        input_ids=inputs["input_ids"],
        attention_mask=mask,
        position_ids=torch.arange(7)[None],
        past_key_values=cache,
    ).last_hidden_state
    actual = backbone(**inputs).last_hidden_state
    seen = inputs["attention_mask"].bool()
    assert (actual - expected)[seen].abs().max() < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_both_attentions_read_the_prefix_alike(family: str) -> None:
    outputs = []
    for implementation in ("eager", "sdpa"):
        backbone = FAMILIES[family]().eval()
        backbone.set_attn_implementation(implementation)
        for operation in Prefix(length=4, first_layer=1).attach(backbone):
            nn.init.constant_(operation.parameters["tokens"], 0.5)
        inputs = toy_inputs(family, 3)
        hidden = backbone(**inputs).last_hidden_state
        seen = inputs.get("attention_mask", torch.ones(hidden.shape[:2])).bool()
        outputs.append(hidden[seen])
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_a_prefix_needs_an_attention_that_it_knows() -> None:
    backbone = tiny_bert()
    Prefix().attach(backbone)
    with pytest.raises(ValueError, match="eager or sdpa, got prefix_sdpa"):
        Prefix().attach(backbone)


@pytest.mark.parametrize("method", [Prompt(length=3), Prefix(length=3)])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_stays_unseen_behind_virtual_tokens(method, family: str) -> None:
    backbone = FAMILIES[family]().eval()
    method.attach(backbone)
    ids, mask = toy_inputs(family, 4).values()
    other = ids.where(mask.bool(), 1 + ids % 2)
    first, second = (
        backbone(input_ids=x, attention_mask=mask).last_hidden_state[mask.bool()]
        for x in (ids, other)
    )
    assert torch.equal(first, second)


def test_token_rows_change_their_tokens_alone() -> None:
    backbone = tiny_bert()
    (operation,) = TokenRows(token_ids=(9, 4)).attach(backbone)
    nn.init.constant_(operation.parameters["weight"][0], 5.0)
    table = backbone.get_input_embeddings()
    ids = torch.tensor([[4, 9, 8]])
    added = (table(ids) - table.table(ids))[0]
    assert (added[0] == 0).all()
    assert (added[1] - 5).abs().max() < 1e-5
    assert (added[2] == 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lora(rank=0),
        lambda: SSF(first_layer=-1),
        lambda: Film(first_layer=-1),
        lambda: Bottleneck(width=0),
        lambda: Prompt(length=0),
        lambda: Full(first_layer=-1),
        lambda: Prefix(length=0),
        lambda: TokenRows(token_ids=()),
        lambda: TokenRows(token_ids=(1, 1)),
        lambda: TokenRows(token_ids=(-1,)),
    ],
)
def test_impossible_hyperparameters_are_refused(make) -> None:
    with pytest.raises(ValueError, match="Expected"):
        make()


@pytest.mark.parametrize(
    "method",
    [
        each(first_layer=2)
        for each in (Bias, Film, Full, SSF, IA3, Lora, Vera, Bottleneck, Prefix)
    ],
)
def test_a_layer_beyond_the_last_is_refused(method) -> None:
    for build in FAMILIES.values():
        with pytest.raises(ValueError, match="first_layer <= 1"):
            method.attach(build())


@pytest.mark.parametrize("method", [Lora, Bottleneck])
def test_target_modules_are_linear_layers_that_exist(method) -> None:
    with pytest.raises(ValueError, match=r"linear layer.* got Embedding"):
        method(target_modules=("word_embeddings",)).attach(tiny_bert())
    with pytest.raises(ValueError, match="end the name of a layer, got nothing"):
        method(target_modules=("nothing",)).attach(tiny_bert())


def test_target_modules_are_ends_of_whole_names() -> None:
    operations = Bottleneck(target_modules=("output.dense",)).attach(tiny_bert())
    assert len(operations) == 2 * 2 * 2  # attention's and the feed-forward's
    with pytest.raises(ValueError, match="there is none such"):
        Lora(target_modules=("put.dense",)).attach(tiny_bert())


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        (Lora(), "set target_modules"),
        (Bottleneck(), "set target_modules"),
        (IA3(), "choose ssf"),
        (Prefix(), "choose lora"),
    ],
)
def test_an_unknown_architecture_is_refused_with_advice(method, advice: str) -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=f"bert, .* got 'Sequential': {advice}"):
        method.attach(backbone)


def test_a_backbone_without_what_a_method_trains_is_refused() -> None:
    with pytest.raises(ValueError, match="with biases"):
        Bias().attach(tiny_llama(attention_bias=False))
    with pytest.raises(ValueError, match="trainable norms"):
        Film().attach(nn.Linear(4, 4))
    for method in (Prompt(), TokenRows(token_ids=(1,))):
        with pytest.raises(ValueError, match="token embedding, got Linear"):
            method.attach(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="token_ids < 64"):
        TokenRows(token_ids=(64,)).attach(tiny_bert())


@pytest.mark.parametrize(
    ("method", "size"),
    [
        (Vera, "rank"),
        (Nola, "num_bases"),
        (SSFPool, "pool_size"),
        (Bottleneck, "width"),
        (Prompt, "length"),
        (Prefix, "length"),
    ],
)
def test_a_size_that_would_fill_the_memory_is_refused(
    method: type[PeftMethod], size: str
) -> None:
    with pytest.raises(ValueError, match=f"Expected {size} <= 65536, got 65537"):
        method(**{size: 65_537})
