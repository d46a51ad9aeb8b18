"""Promise: an exported graph gives the vectors of the original model, or it is not written."""

from __future__ import annotations

import hashlib
import html
import io
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compare import SPREAD_ERROR_MAX, assert_same_vectors, spread_error
from PIL import Image
from tokenizers import Tokenizer
from torch.nn import functional

from engines.spec import Artifact, Precision, Tower
from export import golden, to_onnx, towers
from export.cpu_form import cpu_form
from export.random_model import ARCHS, byte_vocab, random_clip, read_vocab, write_random_model
from export.source import ExportError

# tower, and the arrays of golden.npz that it takes and gives
TOWERS: list[tuple[Tower, str, str]] = [("vision", "pixels", "image_vectors"), ("text", "ids", "text_vectors")]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "tiny", "tiny")


@pytest.fixture(scope="module")
def artifact(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return to_onnx.export_artifact(str(model_dir), tmp_path_factory.mktemp("artifacts"))


@pytest.fixture
def copied(model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path / "copy")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def pixels(n: int, side: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(n).normal(0, 1, (n, 3, side, side)).astype(np.float32))


def ids(context: int, start: int, end: int) -> torch.Tensor:
    """Texts of different lengths, one full; after the end token come pads, which repeat it."""
    tokens = np.random.default_rng(1).integers(0, start, (4, context)).astype(np.int32)
    tokens[:, 0] = start
    for row, length in enumerate((1, 3, context // 2, context - 1)):
        tokens[row, length:] = end
    return torch.from_numpy(tokens)


def hf_vectors(hf: Any, pixels_nchw: torch.Tensor, text_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        images, texts = hf.get_image_features(pixels_nchw), hf.get_text_features(text_ids)
    return functional.normalize(images.pooler_output, dim=-1), functional.normalize(texts.pooler_output, dim=-1)


@pytest.mark.parametrize(
    ("arch", "layers", "eos_in_config", "activation"),
    [
        ("ViT-B-32", None, "legacy 2", "quick_gelu"),
        ("ViT-B-16", 2, "the end token", "gelu"),
        ("ViT-L-14", 2, "the end token", "quick_gelu"),
        ("tiny", 2, "legacy 2", "gelu"),
    ],
)
def test_towers_give_the_vectors_of_the_model(
    arch: str, layers: int | None, eos_in_config: str, activation: str
) -> None:
    from transformers.activations import ACT2FN

    vocab, shape = byte_vocab([]), ARCHS[arch]
    end = len(vocab) - 1
    hf = random_clip(shape, vocab, layers=layers)
    hf.config.text_config.eos_token_id = hf.text_model.eos_token_id = 2 if eos_in_config == "legacy 2" else end
    for tower in (hf.vision_model, hf.text_model):
        tower.config.hidden_act = activation
        for layer in tower.encoder.layers:
            layer.mlp.activation_fn = ACT2FN[activation]
    pictures, texts = pixels(3, shape.image), ids(shape.context, end - 1, end)
    vision, text = towers.rewrite(hf)
    for_cpu = cpu_form(vision)
    want_images_nd, want_texts_nd = hf_vectors(hf, pictures, texts)
    with torch.inference_mode():
        got = [(vision(pictures), want_images_nd), (for_cpu(pictures), want_images_nd), (text(texts), want_texts_nd)]
    for got_nd, want_nd in got:
        assert got_nd.dtype == torch.float32
        torch.testing.assert_close(got_nd, want_nd, rtol=0, atol=1e-5)


def test_the_form_for_cpus_folds_the_slope_and_leaves_the_tower_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    vision, _ = towers.rewrite(random_clip(ARCHS["tiny"], byte_vocab([])))
    pictures, before = pixels(3, ARCHS["tiny"].image), {k: v.clone() for k, v in vision.state_dict().items()}
    with torch.inference_mode():
        want_nd = vision(pictures)
        assert cpu_form(vision).last.activation is functional.silu
        monkeypatch.setattr("export.cpu_form.QUICK_GELU_SLOPE", 1.0)
        assert (cpu_form(vision)(pictures) - want_nd).abs().max() > 1e-4
        torch.testing.assert_close(vision(pictures), want_nd, rtol=0, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in vision.state_dict().items())


def unfold_scale(vision: Any, text: Any) -> None:
    block = vision.blocks[0]
    block.qkv.weight[: block.width] *= (block.width // block.heads) ** 0.5


def forget_mask(vision: Any, text: Any) -> None:
    text.blocks[0].mask = torch.zeros_like(text.blocks[0].mask)


def swap_activation(vision: Any, text: Any) -> None:
    vision.last.activation = functional.gelu


def ask_for_the_wrong_token(vision: Any, text: Any) -> None:
    text.last.mask = text.last.mask.flip(0)  # the mask of another place


def forget_class_token(vision: Any, text: Any) -> None:
    vision.position[0] = 0


def pool_first_token(vision: Any, text: Any) -> None:
    text.eos = text.embedding.weight.shape[0] - 2  # the start token


@pytest.mark.parametrize(
    "break_it",
    [unfold_scale, forget_mask, swap_activation, ask_for_the_wrong_token, forget_class_token, pool_first_token],
)
def test_a_broken_layout_is_not_exported(
    break_it: Callable[[Any, Any], None], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(hf: Any) -> tuple[Any, Any]:
        pair = rewrite(hf)
        break_it(*pair)
        return pair

    rewrite = towers.rewrite
    monkeypatch.setattr(towers, "rewrite", broken)
    with pytest.raises(ExportError, match=r"does not give the vectors of the original model: .* is \d"):
        to_onnx.export_artifact(str(model_dir), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_trained_weights_give_the_same_vectors() -> None:
    found = sorted((Path(towers.__file__).parent / "demo").rglob("config.json"))
    if not found:
        pytest.skip("export/demo holds no trained model")
    loaded = towers.load_towers(str(found[0].parent))
    arrays = golden.make_golden(loaded)
    with torch.inference_mode():
        images, texts = loaded.vision(torch.from_numpy(arrays["pixels"])), loaded.text(torch.from_numpy(arrays["ids"]))
    np.testing.assert_allclose(images, arrays["image_vectors"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(texts, arrays["text_vectors"], rtol=0, atol=1e-5)


def test_flops_are_counted_from_the_shape() -> None:
    hf = random_clip(ARCHS["ViT-B-32"], byte_vocab([]), layers=1)
    for tower in (hf.config.vision_config, hf.config.text_config):
        tower.num_hidden_layers = 12
    vision, text = towers.tower_specs(hf.config)
    assert (vision.tokens, text.tokens) == (50, 77)
    assert 8.1 <= vision.gflop <= 8.3  # 2 x 4.4 GMAC as published for ViT-B/32, less most of the last block
    assert 5.4 <= text.gflop <= 5.6


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_graph_interface_and_layout(artifact: Artifact, tower: Tower, precision: Precision) -> None:
    model = onnx.load(artifact.onnx(tower, precision))
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    (given,), (made,) = model.graph.input, model.graph.output
    kinds = {"vision": onnx.TensorProto.FLOAT, "text": onnx.TensorProto.INT32}
    assert (given.name, given.type.tensor_type.elem_type) == ({"vision": "pixels", "text": "ids"}[tower], kinds[tower])
    assert (made.name, made.type.tensor_type.elem_type) == ("vectors", onnx.TensorProto.FLOAT)
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in (given, made)] == ["batch", "batch"]
    ops = Counter(node.op_type for node in model.graph.node)
    layers = 2
    assert ops["LayerNormalization"] == 2 * layers + (2 if tower == "vision" else 1)
    assert not {"ReduceMean", "Pow", "Sqrt", "Shape"} & set(ops)
    assert ops["Gemm"] == 4 * layers + 2  # QKV is one product; the last block asks with one token only
    assert ops["Softmax"] == layers
    floats = {tensor.data_type for tensor in model.graph.initializer} - {onnx.TensorProto.INT64, onnx.TensorProto.INT32}
    assert floats == {onnx.TensorProto.FLOAT if precision == "fp32" else onnx.TensorProto.FLOAT16}
    assert model.graph.node[-1].op_type == "Div"


@pytest.mark.parametrize("rows", [1, 5])
def test_batch_is_dynamic_and_rows_do_not_see_each_other(artifact: Artifact, rows: int) -> None:
    arrays = np.load(artifact.golden_npz)
    for tower, inputs, vectors in TOWERS:
        got = to_onnx.run_graph(artifact.onnx(tower, "fp32"), arrays[inputs][:rows])
        np.testing.assert_allclose(got, arrays[vectors][:rows], rtol=0, atol=1e-5)


def test_fp16_graphs_stay_within_their_bar(artifact: Artifact) -> None:
    arrays = np.load(artifact.golden_npz)
    for tower, inputs, vectors in TOWERS:
        got = to_onnx.run_graph(artifact.onnx(tower, "fp16"), arrays[inputs])
        assert_same_vectors(got, arrays[vectors], spread_error_max=SPREAD_ERROR_MAX["fp16"])
        assert spread_error(got, arrays[vectors]) > 1e-5  # it really is half precision
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_fp16_is_refused_when_it_overflows(copied: Path, tmp_path: Path) -> None:
    hf = towers.load_towers(str(copied)).hf
    hf.text_model.encoder.layers[0].mlp.fc1.bias[0] = -1e5  # silent in fp32, infinite in fp16
    hf.save_pretrained(copied)
    with pytest.raises(ExportError, match=r"the text tower in fp16 does not give the vectors"):
        to_onnx.export_artifact(str(copied), tmp_path / "artifacts")


def test_a_graph_above_the_protobuf_limit_keeps_its_weights_beside_it(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "PROTOBUF_BYTES_MAX", 1000)
    loaded = towers.load_towers(str(model_dir))
    to_onnx.save_graph(loaded.vision, "fp32", loaded.spec.dim, tmp_path / "vision.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vision.onnx", "vision.onnx.data"]
    with torch.inference_mode():
        want = loaded.vision(pixels(2, 32))
    got = to_onnx.run_graph(tmp_path / "vision.onnx", pixels(2, 32).numpy())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_golden_pictures_are_what_the_reference_makes_of_them(artifact: Artifact) -> None:
    arrays = np.load(artifact.golden_npz)  # allow_pickle is False
    size, offsets = artifact.spec.preprocess.size, arrays["image_offsets"]
    assert arrays["pixels"].shape == (36, 3, size, size)
    assert arrays["image_vectors"].shape == (36, artifact.spec.dim)
    encoded = [arrays["image_bytes"][a:b].tobytes() for a, b in itertools.pairwise(offsets)]
    opened = [golden.upright(data) for data in encoded]
    assert {Image.open(io.BytesIO(data)).format for data in encoded} == {"JPEG", "PNG"}
    turned = [Image.open(io.BytesIO(data)).getexif().get(golden.EXIF_ORIENTATION, 1) for data in encoded]
    assert sorted(turned)[-2:] == [6, 7]
    assert len({picture.size for picture in opened}) == 36
    # An independent reading of one picture: resize, crop and normalise by hand.
    picture = opened[0]
    wide = picture.resize((int(size * picture.width / picture.height), size), Image.Resampling.BICUBIC)
    left = (wide.width - size) // 2
    levels = np.asarray(wide.crop((left, 0, left + size, size)), np.float32).transpose(2, 0, 1)
    mean, std = (
        np.array(v, np.float32)[:, None, None] for v in (artifact.spec.preprocess.mean, artifact.spec.preprocess.std)
    )
    np.testing.assert_allclose(arrays["pixels"][0], (levels / 255 - mean) / std, atol=1e-5)
    cosines = arrays["image_vectors"] @ arrays["image_vectors"].T - 2 * np.eye(36)
    assert cosines.max() < 0.99  # no two pictures look the same to the model


def test_tokenizer_json_alone_gives_the_ids(artifact: Artifact) -> None:
    arrays, tokenizer = np.load(artifact.golden_npz), Tokenizer.from_file(str(artifact.tokenizer_json))
    encoded = [tokenizer.encode(str(text)).ids for text in arrays["texts"]]
    np.testing.assert_array_equal(np.array(encoded, np.int32), arrays["ids"])
    assert arrays["ids"].dtype == np.int32
    assert (arrays["ids"][:, -1] == artifact.spec.pad_id).all()
    assert artifact.spec.eos_id == tokenizer.token_to_id("<|endoftext|>")


def test_tokenizer_of_the_real_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    """Expected ids come from OpenAI's tokenizer, which also repairs text; Hugging Face's, our reference, does not."""
    import transformers

    folder = shared_data / "meta" / "clip"
    vocab, merges = read_vocab(folder)
    assert read_vocab(folder / "bpe_simple_vocab_16e6.txt.gz") == (vocab, merges)
    to_onnx.write_tokenizer(transformers.CLIPTokenizer(vocab=vocab, merges=merges), 77, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rows = [json.loads(line) for line in (folder / "golden_token_ids.jsonl").read_text().splitlines()]
    assert len(rows) > 200
    for row in rows:
        repaired = html.unescape(html.unescape(row["text"])).replace("，", ",").replace("cafÃ©", "café")
        assert tokenizer.encode(repaired).ids == row["ids77"] + [49407] * (77 - len(row["ids77"])), row["text"]


def test_export_of_the_same_weights_gives_the_same_bytes(model_dir: Path, artifact: Artifact, tmp_path: Path) -> None:
    again = to_onnx.export_artifact(str(model_dir), tmp_path)
    files = [path.relative_to(again.path) for path in again.path.rglob("*") if path.is_file()]
    assert len(files) == 9
    for name in files:
        digests = {hashlib.sha256((side.path / name).read_bytes()).hexdigest() for side in (again, artifact)}
        assert len(digests) == 1, name
