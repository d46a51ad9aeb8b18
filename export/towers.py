"""A Hugging Face CLIP, rewritten into two towers that compile well and give the same vectors.

    towers = load_towers("openai/clip-vit-base-patch32")    # or a directory
    towers.vision(pixels)   # (b, 3, s, s) float32, normalised -> (b, d) float32, unit norm
    towers.text(ids)        # (b, context) int32               -> (b, d) float32, unit norm

The layout is made for GEMM fusion: one QKV product with the softmax scale folded into its weights, the residual stream
2-D, four dimensions only inside attention, projection and L2 norm in the graph. On TensorRT's compiler that makes 8
kernels of a block where the original gives 12, on a CPU it reaches 0.89 instead of 0.83 of the bf16 peak; in fp32 it
differs from the original by 1e-7. The last block computes one row per picture or text, the only one that is pooled:
7 % of B/32 saved, same vectors. The text tower sees whole contexts only, so its causal mask is a constant.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.nn import functional

from engines.spec import ModelSpec, TowerSpec, canonical_model
from export.source import ExportError, quiet_transformers, read_json, read_preprocess, source_dir

__all__ = ["FAMILIES", "ExportError", "Towers", "load_towers", "rewrite"]

# `model_type` of config.json -> how to load it.
FAMILIES = {"clip": "export.towers:load_clip"}
# Added to scores that must not count. Not -inf: fp16 would make NaN of it; exp(-30000) is 0 in every precision.
MASKED = -30000.0
# CLIP configurations from before 2023 say so; the pooled token is then the largest id, not the one named here.
EOS_IS_LARGEST_ID = 2
QUICK_GELU_SLOPE = 1.702


@dataclass(frozen=True)
class Towers:
    spec: ModelSpec
    vision: nn.Module
    text: nn.Module
    tokenizer: Any  # of transformers
    hf: Any  # the CLIPModel itself, for proofs
    source: Path  # the directory everything was read from


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(QUICK_GELU_SLOPE * x)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q, k, v (b, heads, tokens, head), the scale already inside q. In parts, which compilers for CPUs run faster."""
    scores = q @ k.transpose(-1, -2)
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same as one operation: on a GPU torch has one kernel for it, and its compiler finds it in no other way."""
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": functional.gelu}


def plain_attend(block: Block, qkv: Tensor) -> Tensor:
    """Rows of q, k and v (b * tokens, 3 * width) -> what they see, (b * tokens, width)."""
    split = qkv.view(-1, block.tokens, 3 * block.heads, block.width // block.heads)
    q, k, v = split.transpose(1, 2).chunk(3, 1)
    seen: Tensor = block.attention(q, k, v, block.mask).transpose(1, 2).reshape(-1, block.width)
    return seen


def plain_hidden(block: Block, x: Tensor) -> Tensor:
    """The activations between the two products of an MLP."""
    hidden: Tensor = block.activation(block.fc1(x))
    return hidden


def plain_add(layer: nn.Module, x: Tensor, stream: Tensor) -> Tensor:
    """The residual stream and what `layer` makes of x."""
    added: Tensor = stream + layer(x)
    return added


class Block(nn.Module):
    """One pre-norm transformer block over the residual stream x: (b * tokens, width)."""

    mask: Tensor | None
    attention = staticmethod(plain_attention)
    attend = staticmethod(plain_attend)
    hidden = staticmethod(plain_hidden)
    add = staticmethod(plain_add)

    def __init__(self, layer: Any, config: Any, tokens: int, mask: Tensor | None) -> None:
        super().__init__()
        self.tokens, self.width, self.heads = tokens, config.hidden_size, config.num_attention_heads
        attention = layer.self_attn
        self.norm1, self.norm2 = layer.layer_norm1, layer.layer_norm2
        self.qkv = _fused_qkv(attention, (self.width // self.heads) ** -0.5)
        self.out, self.fc1, self.fc2 = attention.out_proj, layer.mlp.fc1, layer.mlp.fc2
        self.activation = ACTIVATIONS[config.hidden_act]
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(self.out, self.attend(self, self.qkv(self.norm1(x))), x)
        return self.add(self.fc2, self.hidden(self, self.norm2(x)), x)


class LastBlock(Block):
    """The last block: x (b * tokens, width) and the place of the pooled token in each row -> (b, width).

    All tokens give keys and values, only the pooled one asks: 2 of the block's 12 GEMM units for all, 10 for one.
    """

    def __init__(self, layer: Any, config: Any, tokens: int, mask: Tensor | None) -> None:
        super().__init__(layer, config, tokens, mask)
        self.q, self.kv = _cut(self.qkv, 0, self.width), _cut(self.qkv, self.width, 3 * self.width)
        del self.qkv

    def forward(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        """`place`: (b,) or None for the first token, which needs no gather."""
        normed = self.norm1(x)
        asked, pooled = self._pooled(normed, place), self._pooled(x, place)
        split = self.kv(normed).view(-1, self.tokens, 2 * self.heads, self.width // self.heads)
        k, v = split.transpose(1, 2).chunk(2, 1)
        q = self.q(asked).view(-1, self.heads, 1, self.width // self.heads)
        mask = None if self.mask is None else self.mask[place][:, None, None]
        seen = self.attention(q, k, v, mask)
        rest = self.add(self.out, seen.view(-1, self.width), pooled)
        return self.add(self.fc2, self.hidden(self, self.norm2(rest)), rest)

    def _pooled(self, x: Tensor, place: Tensor | None) -> Tensor:
        by_row = x.view(-1, self.tokens, self.width)
        return by_row[:, 0] if place is None else by_row[torch.arange(len(by_row), device=x.device), place]


class VisionTower(nn.Module):
    def __init__(self, model: Any, projection: nn.Linear, tokens: int) -> None:
        super().__init__()
        embeddings = model.embeddings
        self.tokens, self.width = tokens, model.config.hidden_size
        self.patch = embeddings.patch_embedding
        position = embeddings.position_embedding.weight.detach().clone()
        position[0] += embeddings.class_embedding.detach()  # the class token: a row of zeros plus its position
        self.position = nn.Parameter(position, requires_grad=False)
        self.norm_in, self.norm_out, self.projection = model.pre_layrnorm, model.post_layernorm, projection
        self.blocks, self.last = _blocks(model, tokens, None)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch(pixels.to(self.position.dtype)).flatten(2).transpose(1, 2)
        x = functional.pad(patches, (0, 0, 1, 0)) + self.position
        pooled = self.last(self.blocks(self.norm_in(x.reshape(-1, self.width))))
        return _unit(self.projection(self.norm_out(pooled)))


class TextTower(nn.Module):
    def __init__(self, model: Any, projection: nn.Linear, tokens: int) -> None:
        super().__init__()
        embeddings, config = model.embeddings, model.config
        self.tokens, self.width, self.eos = tokens, config.hidden_size, config.eos_token_id
        self.embedding, self.position = embeddings.token_embedding, embeddings.position_embedding.weight
        self.norm_out, self.projection = model.final_layer_norm, projection
        self.blocks, self.last = _blocks(model, tokens, torch.full((tokens, tokens), MASKED).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks((self.embedding(ids) + self.position).view(-1, self.width))
        end = (ids if self.eos == EOS_IS_LARGEST_ID else (ids == self.eos).int()).argmax(-1)
        return _unit(self.projection(self.norm_out(self.last(x, end))))


def load_towers(model: str) -> Towers:
    """Load, rewrite and describe the model in a directory or under a hub id.

    Raises:
        ExportError: it cannot be had, or it is not a model whose vectors we can reproduce exactly.
    """
    directory = source_dir(model)
    config = read_json(directory / "config.json")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ExportError(
            f"{model} is not a CLIP: model_type in its config.json is {family!r}, expected one of {sorted(FAMILIES)}"
        )
    for name in ("auto_map", "quantization_config"):
        if name in config:
            raise ExportError(
                f"{model}: its config.json has {name}, so code of its own or quantised weights give its vectors. Only "
                "a plain CLIPModel with weights in floating point can be exported"
            )
    module, attribute = FAMILIES[family].split(":")
    towers: Towers = getattr(importlib.import_module(module), attribute)(model, directory)
    return towers


def load_clip(model: str, directory: Path) -> Towers:
    transformers = quiet_transformers()
    with _reading(directory, "the configuration"):
        config = transformers.CLIPConfig.from_pretrained(directory)
    preprocess = read_preprocess(directory, _check_config(model, config))
    with _reading(directory, "the weights"):
        hf, loading = transformers.CLIPModel.from_pretrained(
            directory, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in words
        )  # fmt: skip
    if loading["mismatched_keys"]:
        name, found, expected = sorted(loading["mismatched_keys"])[0]
        raise ExportError(
            f"{directory}: {name} has the shape {tuple(found)} in the weights, config.json asks for {tuple(expected)}. "
            "The two do not belong together: take the config.json the model was saved with"
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ExportError(
            f"{directory}: the weights lack {len(missing)} tensors of a CLIPModel, the first is {missing[0]}. "
            "Both towers and both projections are needed; a classifier or a single tower cannot be exported"
        )
    if unknown := sorted(name for name in loading["unexpected_keys"] if _of_a_tower(name)):
        raise ExportError(
            f"{directory}: a CLIPModel has no place for {len(unknown)} tensors of the weights, the first is "
            f"{unknown[0]}. Without them the towers give other vectors: save it as a CLIPModel whose config.json fits"
        )
    hf.eval().requires_grad_(False)
    vision, text = rewrite(hf)
    tokenizer = _load_tokenizer(directory, config.text_config)
    vision_spec, text_spec = tower_specs(config)
    spec = ModelSpec(
        model=canonical_model(model),
        family="clip",
        weights_digest=weights_digest(hf),
        dim=config.projection_dim,
        preprocess=preprocess,
        context_length=text_spec.tokens,
        logit_scale=float(hf.logit_scale.exp()),
        vision=vision_spec,
        text=text_spec,
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    return Towers(spec, vision, text, tokenizer, hf, directory)


def _of_a_tower(name: str) -> bool:
    """Heads beside the towers reach no vector; checkpoints from before 2023 store their position_ids, 0 to n."""
    return name.startswith(("vision_model.", "text_model.", "visual_", "text_")) and not name.endswith("position_ids")


def rewrite(hf: Any) -> tuple[VisionTower, TextTower]:
    """The two towers of a `CLIPModel`. They share its weights, all but the fused QKV ones, and leave it intact."""
    vision_spec, text_spec = tower_specs(hf.config)
    vision = VisionTower(hf.vision_model, hf.visual_projection, vision_spec.tokens)
    text = TextTower(hf.text_model, hf.text_projection, text_spec.tokens)
    return vision.eval(), text.eval()


def _blocks(model: Any, tokens: int, mask: Tensor | None) -> tuple[nn.Sequential, LastBlock]:
    *inner, last = model.encoder.layers
    blocks = nn.Sequential(*(Block(layer, model.config, tokens, mask) for layer in inner))
    return blocks, LastBlock(last, model.config, tokens, mask)


def _fused_qkv(attention: Any, scale: float) -> nn.Linear:
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    fused = nn.Linear(q.in_features, 3 * q.out_features, device="meta")  # no memory, no draw from the random state
    fused.weight = nn.Parameter(torch.cat([q.weight * scale, k.weight, v.weight]).detach(), requires_grad=False)
    fused.bias = nn.Parameter(torch.cat([q.bias * scale, k.bias, v.bias]).detach(), requires_grad=False)
    return fused


def _cut(linear: nn.Linear, start: int, stop: int) -> nn.Linear:
    """Outputs [start, stop) of `linear`, over the same memory."""
    part = nn.Linear(linear.in_features, stop - start, device="meta")
    part.weight = nn.Parameter(linear.weight[start:stop], requires_grad=False)
    part.bias = nn.Parameter(linear.bias[start:stop], requires_grad=False)
    return part


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors.float()  # squares of half precision overflow at 256
    return torch.div(vectors, torch.linalg.vector_norm(vectors, dim=-1, keepdim=True))


@contextlib.contextmanager
def _reading(directory: Path, what: str) -> Iterator[None]:
    """Each file format raises its own kinds of errors when a file is damaged; here they become one line."""
    try:
        yield
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"{directory}: {what} cannot be read ({words[0]}). Download the model again") from error


def _check_config(model: str, config: Any) -> int:
    """Refuse what the towers do not cover; gives the side of the input picture."""
    vision, text = config.vision_config, config.text_config
    for tower in (vision, text):
        if tower.hidden_act not in ACTIVATIONS:
            raise ExportError(f"{model}: hidden_act is {tower.hidden_act!r}, expected one of {sorted(ACTIVATIONS)}")
    size, patch = vision.image_size, vision.patch_size
    square = isinstance(size, int) and isinstance(patch, int) and size % patch == 0
    if not square or vision.num_channels != 3:
        raise ExportError(
            f"{model}: image_size {size!r}, patch_size {patch!r}, num_channels {vision.num_channels!r}; "
            "expected a square picture of 3 channels that square patches fill"
        )
    return int(size)


def _load_tokenizer(directory: Path, config: Any) -> Any:
    with _reading(directory, "the tokenizer"):
        tokenizer = quiet_transformers().AutoTokenizer.from_pretrained(directory)
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise ExportError(
            f"{directory}: the tokenizer {type(tokenizer).__name__} has no tokenizer.json form with a pad token. "
            "Save it with a fast tokenizer of transformers"
        )
    if len(tokenizer) > config.vocab_size:
        raise ExportError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model embeds {config.vocab_size}. "
            "The two do not belong together: take the tokenizer the model was trained with"
        )
    if config.eos_token_id not in (EOS_IS_LARGEST_ID, tokenizer.eos_token_id):
        raise ExportError(
            f"{directory}: text_config.eos_token_id is {config.eos_token_id}, the tokenizer ends a text with "
            f"{tokenizer.eos_token_id}, so the text tower would pool the wrong token. Make config.json agree"
        )
    return tokenizer


def tower_specs(config: Any) -> tuple[TowerSpec, TowerSpec]:
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    patch_macs = patches * vision.hidden_size * vision.num_channels * vision.patch_size**2
    return (
        _tower_spec(vision, patches + 1, patch_macs, config.projection_dim),
        _tower_spec(text, text.max_position_embeddings, 0, config.projection_dim),
    )


def _tower_spec(config: Any, tokens: int, stem_macs: int, dim: int) -> TowerSpec:
    width, layers = config.hidden_size, config.num_hidden_layers
    rest = 2 * width * width + 2 * width * config.intermediate_size  # q, out, MLP: of one token
    inner = tokens * (2 * width * width + rest + 2 * tokens * width)
    last = tokens * 2 * width * width + rest + 2 * tokens * width  # the pooled token alone
    macs = (layers - 1) * inner + last + stem_macs + width * dim
    return TowerSpec(layers, width, config.num_attention_heads, tokens, round(2 * macs / 1e9, 6))


def weights_digest(hf: Any) -> str:
    """Over what reaches a vector: the parameters as float32, and the few settings that change it without a weight."""
    config = hf.config
    settings = [
        [c.num_attention_heads, c.hidden_act, c.layer_norm_eps] for c in (config.vision_config, config.text_config)
    ]
    digest = blake3(json.dumps([settings, config.text_config.eos_token_id]).encode())
    for name, parameter in sorted(hf.named_parameters()):
        if name != "logit_scale":  # what a cosine is multiplied with, never part of a vector
            digest.update(f"{name} {tuple(parameter.shape)} float32\n".encode())
            digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())
