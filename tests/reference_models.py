"""Whole-model references: eager ToMe forwards of HuggingFace transformers (5.x) models.

Each takes a model in eval mode, calls its submodules and weights directly and writes the encoder
out with merging, by `tomepass.reference` alone. A block merges after the attention's residual and
before the MLP's norm; its attention sees the sizes from before that merge.

`*_forward(model, pixel_values, r, prop_attn)` returns a `Result`, `*_logits` (for `ViTModel`
`vit_hidden`) just its first field. `pixel_values` is `[B, 3, height, width]`; `r` is anything
`tomepass.reference.schedule` takes.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from module_names import Attention, Module, attention_of, blocks_of, mlp_of
from torch import Tensor

from tomepass import reference

Rate = int | list[int] | tuple[int, float]
Rotate = Callable[..., Tensor]  # of [B, H, N, D], given places=[B, N]


class Result(NamedTuple):
    """`output` is the logits `[B, classes]`, or for a headless model the hidden states."""

    output: Tensor
    hidden: Tensor  # [B, N', C], after the final norm
    size: Tensor  # [B, N'], original tokens held by each
    source: Tensor  # [B, N], the place in `hidden` of each original token
    counts: list[int]  # tokens after each block
    margin: Tensor  # [B], smallest `match_margin` of all blocks; infinite unless asked for


class Block(NamedTuple):
    """The parts of one pre-norm block; `scale*` are LayerScale or nothing."""

    norm1: Module
    attention: Attention
    scale1: Module
    norm2: Module
    mlp: Module
    scale2: Module


def vit_logits(model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True) -> Tensor:
    """`ViTForImageClassification`: `[B, classes]`."""
    return vit_forward(model, pixel_values, r, prop_attn).output


def vit_hidden(model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True) -> Tensor:
    """`ViTModel`: last hidden states, merged, `[B, N', C]`."""
    return vit_model_forward(model, pixel_values, r, prop_attn).output


def deit_logits(model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True) -> Tensor:
    """`DeiTForImageClassificationWithTeacher`: `[B, classes]`."""
    return deit_forward(model, pixel_values, r, prop_attn).output


def ijepa_logits(model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True) -> Tensor:
    """`IJepaForImageClassification`: `[B, classes]`."""
    return ijepa_forward(model, pixel_values, r, prop_attn).output


def dinov2_with_registers_logits(
    model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True
) -> Tensor:
    """`Dinov2WithRegistersForImageClassification`: `[B, classes]`."""
    return dinov2_with_registers_forward(model, pixel_values, r, prop_attn).output


def vit_forward(
    model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True, **options: Any
) -> Result:
    """`ViTForImageClassification`: the head reads the class token. Options: see `encode`."""
    encoded = vit_model_forward(model.vit, pixel_values, r, prop_attn, **options)
    return encoded._replace(output=model.classifier(encoded.hidden[:, 0]))


def vit_model_forward(
    model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True, **options: Any
) -> Result:
    """`ViTModel`: a class token, no head. Options: see `encode`."""
    return _forward_of_vit_family(model, pixel_values, r, prop_attn, protected=1, **options)


def deit_forward(
    model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True, **options: Any
) -> Result:
    """`DeiTForImageClassificationWithTeacher`: class and distillation token, a head each.

    Options: see `encode`.
    """
    encoded = _forward_of_vit_family(model.deit, pixel_values, r, prop_attn, protected=2, **options)
    of_class = model.cls_classifier(encoded.hidden[:, 0])
    of_distillation = model.distillation_classifier(encoded.hidden[:, 1])
    return encoded._replace(output=(of_class + of_distillation) / 2)


def ijepa_forward(
    model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True, **options: Any
) -> Result:
    """`IJepaForImageClassification`: nothing protected, the head reads the mean of the tokens.

    Options: see `encode`.
    """
    encoded = _forward_of_vit_family(
        model.ijepa, pixel_values, r, prop_attn, protected=0, **options
    )
    return encoded._replace(output=model.classifier(weighted_mean(encoded.hidden, encoded.size)))


def dinov2_with_registers_forward(
    model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True, **options: Any
) -> Result:
    """`Dinov2WithRegistersForImageClassification`: class token and registers protected.

    The head reads the class token and the mean of the patch tokens. Options: see `encode`.
    """
    base = model.dinov2_with_registers
    blocks = [
        Block(b.norm1, attention_of(b), b.layer_scale1, b.norm2, mlp_of(b), b.layer_scale2)
        for b in blocks_of(base)
    ]
    protected = 1 + model.config.num_register_tokens
    embedded = base.embeddings(pixel_values)
    encoded = encode(embedded, blocks, base.layernorm, r, protected, prop_attn, **options)
    patches = weighted_mean(encoded.hidden[:, protected:], encoded.size[:, protected:])
    read = torch.cat([encoded.hidden[:, 0], patches], dim=-1)
    return encoded._replace(output=model.classifier(read))


def siglip_vision_forward(
    model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True, **options: Any
) -> Result:
    """`SiglipVisionModel`: a learned query attends to the merged tokens, by their sizes.

    Options: see `encode`.
    """
    base = getattr(model, "vision_model", model)  # transformers 5.0 keeps it one level down
    blocks = [
        Block(b.layer_norm1, siglip_attention(b.self_attn), _same, b.layer_norm2, b.mlp, _same)
        for b in base.encoder.layers
    ]
    embedded = base.embeddings(pixel_values)
    encoded = encode(embedded, blocks, base.post_layernorm, r, 0, prop_attn, **options)
    head = base.head
    size = encoded.size if prop_attn else None
    read = pooled(head.attention, head.probe, encoded.hidden, size)
    return encoded._replace(output=(read + head.mlp(head.layernorm(read)))[:, 0])


def vit_for_masked_images_forward(
    model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True, **options: Any
) -> Result:
    """`ViTForMaskedImageModeling`: the decoder reads the grid of unmerged patches.

    Options: see `encode`.
    """
    encoded = vit_model_forward(model.vit, pixel_values, r, prop_attn, **options)
    patches = reference.unmerge(encoded.hidden, encoded.source)[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    return encoded._replace(output=model.decoder(patches.mT.unflatten(2, (side, side))))


def dinov3_forward(
    model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True, **options: Any
) -> Result:
    """`DINOv3ViTModel`: patches are rotated, the class token and registers are not."""
    protected = 1 + model.config.num_register_tokens
    tables = [_after_nothing(t, protected, neutral) for t, neutral in _tables(model, pixel_values)]

    def rotate(x: Tensor, places: Tensor) -> Tensor:
        cos, sin = (table[places][:, None] for table in tables)
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    blocks = [
        Block(b.norm1, attention_of(b), b.layer_scale1, b.norm2, mlp_of(b), b.layer_scale2)
        for b in getattr(model, "model", model).layer  # transformers 5.0 has no such level
    ]
    embedded = model.embeddings(pixel_values)
    return encode(embedded, blocks, model.norm, r, protected, prop_attn, rotate=rotate, **options)


def vjepa2_forward(
    model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True, **options: Any
) -> Result:
    """`VJEPA2Model` without its predictor: rotated by frame, row and column."""
    encoder = model.encoder

    def rotate(x: Tensor, places: Tensor) -> Tensor:
        attention = encoder.layer[0].attention
        turned: Tensor = attention.apply_rotary_embeddings(
            x, attention.get_position_ids(x, masks=places)
        )
        return turned

    blocks = [
        Block(b.norm1, _vjepa2_attention(b.attention), _same, b.norm2, b.mlp, _same)
        for b in encoder.layer
    ]
    embedded = encoder.embeddings(pixel_values)
    return encode(embedded, blocks, encoder.layernorm, r, 0, prop_attn, rotate=rotate, **options)


def vjepa2_classifier_forward(
    model: Any, pixel_values: Tensor, r: Rate, prop_attn: bool = True, **options: Any
) -> Result:
    """`VJEPA2ForVideoClassification`: blocks without rotation, then a learned query, read the
    tokens that the encoder's blocks merged, by their sizes; `r` is of those alone."""
    encoded = vjepa2_forward(model.vjepa2, pixel_values, r, prop_attn, **options)
    x, size = encoded.hidden, encoded.size if prop_attn else None
    pooler = model.pooler
    for layer in pooler.self_attention_layers:
        x = x + attend(_pooler_attention(layer.self_attn), layer.layer_norm1(x), size)[0]
        x = x + layer.mlp(layer.layer_norm2(x))
    layer = pooler.cross_attention_layer
    query = pooler.query_tokens.expand(x.shape[0], -1, -1)
    a, x = layer.cross_attn, layer.layer_norm1(x)
    q, k, v = (
        projection(y).unflatten(2, (-1, a.head_dim)).transpose(1, 2)
        for projection, y in ((a.q_proj, query), (a.k_proj, x), (a.v_proj, x))
    )
    read = reference.proportional_attention(q, k, v, size, a.scale)
    y = query + read.transpose(1, 2).flatten(2)
    y = y + layer.mlp(layer.layer_norm2(y))
    return encoded._replace(output=model.classifier(y[:, 0]))


def encode(
    x: Tensor,
    blocks: Iterable[Block],
    norm: Module,
    r: Rate,
    protected: int,
    prop_attn: bool = True,
    with_margin: bool = False,
    match_dtype: torch.dtype = torch.float64,
    rotate: Rotate | None = None,
) -> Result:
    """Blocks and final norm over embedded tokens x `[B, N, C]`, of which the first `protected`
    are never merged. `with_margin`: work out `Result.margin` too. `match_dtype`: the arithmetic
    of the matching. `rotate`: turns queries and keys by their tokens' positions; a merged token
    has the position of the destination."""
    blocks = list(blocks)
    images, tokens, _ = x.shape
    size = torch.ones(images, tokens, device=x.device)
    source = torch.arange(tokens, device=x.device).repeat(images, 1)
    places = source
    margin = torch.full((images,), float("inf"), dtype=torch.float64, device=x.device)
    first = tuple(range(protected))
    counts = []
    for block, wanted in zip(blocks, reference.schedule(r, len(blocks)), strict=True):
        turned = None if rotate is None else functools.partial(rotate, places=places)
        sizes = size if prop_attn else None
        update, _, keys, _ = attend(block.attention, block.norm1(x), sizes, turned)
        x = x + block.scale1(update)
        if with_margin:
            here = reference.match_margin(keys, wanted, first, match_dtype)
            margin = torch.minimum(margin, here)
        assign = reference.match(keys, wanted, first, match_dtype)
        left = x.shape[1] - reference.merge_count(wanted, x.shape[1], first)
        x, size = reference.merge(x, size, assign, left)
        source = reference.compose(assign, source)
        if left < assign.shape[1]:
            places = places.gather(1, reference.kept(assign, first, left))
        x = x + block.scale2(block.mlp(block.norm2(x)))
        counts.append(left)
    hidden = norm(x)
    return Result(hidden, hidden, size, source, counts, margin)


def weighted_mean(x: Tensor, size: Tensor) -> Tensor:
    """Mean over the original tokens: x `[B, N, C]`, size `[B, N]` -> `[B, C]`."""
    weight = size.double() / size.double().sum(dim=1, keepdim=True)
    return (x.double() * weight[..., None]).sum(dim=1).to(x.dtype)


def vit_blocks(base: Any) -> list[Block]:
    """The blocks of ViT, DeiT and I-JEPA, which name their norms alike."""
    return [
        Block(b.layernorm_before, attention_of(b), _same, b.layernorm_after, mlp_of(b), _same)
        for b in blocks_of(base)
    ]


def _forward_of_vit_family(
    base: Any, pixel_values: Tensor, r: Rate, prop_attn: bool, protected: int, **options: Any
) -> Result:
    embedded, blocks = base.embeddings(pixel_values), vit_blocks(base)
    return encode(embedded, blocks, base.layernorm, r, protected, prop_attn, **options)


def attend(
    attention: Attention,
    x: Tensor,
    size: Tensor | None,
    turn: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Update of the residual stream `[B, N, C]`; queries, keys, values `[B, H, N, D]`."""
    images, tokens, _ = x.shape

    def heads(projection: Module) -> Tensor:
        return projection(x).reshape(images, tokens, -1, attention.head_dim).transpose(1, 2)

    q, k, v = heads(attention.query), heads(attention.key), heads(attention.value)
    if turn is not None:
        q, k = turn(q), turn(k)
    out = reference.proportional_attention(q, k, v, size, attention.scale)
    return attention.out(out.transpose(1, 2).reshape(images, tokens, -1)), q, k, v


def _same(x: Tensor) -> Tensor:
    return x


def pooled(attention: Any, probe: Tensor, x: Tensor, size: Tensor | None) -> Tensor:
    """`nn.MultiheadAttention` of a learned query over tokens that count by their sizes."""
    weights = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    inputs = (probe.expand(x.shape[0], -1, -1), x, x)
    q, k, v = (
        torch.nn.functional.linear(*each).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for each in zip(inputs, weights, biases, strict=True)
    )
    out = reference.proportional_attention(q, k, v, size)
    result: Tensor = attention.out_proj(out.transpose(1, 2).flatten(2))
    return result


def _tables(model: Any, pixel_values: Tensor) -> list[tuple[Tensor, float]]:
    """DINOv3's cosines and sines `[patches, D]`, each with what leaves a token as it is."""
    cos, sin = model.rope_embeddings(pixel_values)
    return [(cos, 1.0), (sin, 0.0)]


def _after_nothing(table: Tensor, protected: int, neutral: float) -> Tensor:
    return torch.cat([table.new_full((protected, table.shape[-1]), neutral), table])


def siglip_attention(a: Any) -> Attention:
    """The attention of a SigLIP block."""
    return Attention(a.q_proj, a.k_proj, a.v_proj, a.out_proj, a.head_dim, a.scale)


def _vjepa2_attention(a: Any) -> Attention:
    return Attention(a.query, a.key, a.value, a.proj, a.attention_head_size, a.scaling)


def _pooler_attention(a: Any) -> Attention:
    return Attention(a.q_proj, a.k_proj, a.v_proj, a.out_proj, a.head_dim, a.scale)
