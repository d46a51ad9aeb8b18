"""The parts of `python -m pipeline.gpu_check`: what each asks, the function that answers, and how long it may take.

The first run beside each other; then comes what decides by which decoders all else is measured, and one by one the
measurements and the tests that weigh the whole GPU's memory. What takes longest or matters most comes first: what no
longer fits into the time is left out.
"""

from __future__ import annotations

from typing import NamedTuple


class Check(NamedTuple):
    name: str
    question: str
    probe: str  # module:function
    limit_s: float = 60.0


TOGETHER_CHECKS = (
    Check("prepare ViT-L-14", "Random weights, and the engine on the CUDA provider", "prepare_gpu:l14", 190),
    Check("prepare ViT-B-32", "Random weights and every GPU engine of this host", "prepare_gpu:b32", 160),
    Check("tests", "Do the GPU tests pass, none skipped for want of a GPU?", "probes_gpu:gpu_tests", 165),
    Check("fused attention", "Is it one kernel a layer: B/32, B/16, L/14, texts?", "probes_gpu:fused_attention", 165),
    Check("prepare pictures", "Generated JPEGs, and a corpus of them", "prepare_gpu:pictures", 120),
    Check("a size order", "Is the size of an image (width, height), also after tvresize?", "probes_gpu:size_order"),
    Check("b float16 out", "Does the crop write float16, and the same as float32?", "probes_gpu:float16_out"),
    Check("c as_images", "Does CV-CUDA take decoded images with an explicit format?", "probes_gpu:as_images"),
    Check("d row pitch", "Are pixels right when a row is no multiple of the alignment?", "probes_gpu:row_pitch"),
    Check("e pixel levels", "How far are the pixels from the reference preprocessing?", "probes_gpu:pixel_levels"),
    Check("f refused", "Does a batch of broken files give None in each slot?", "probes_gpu:all_refused"),
    Check("f one", "Does a batch of one picture work?", "probes_gpu:one_picture"),
    Check("f thin", "Do 1 x N and N x 1 pictures work?", "probes_gpu:thin_pictures"),
    Check("f tiny", "Are pictures smaller than the target enlarged right?", "probes_gpu:tiny_pictures"),
    Check("g canary hybrid", "Does the CUDA decoder give true pixels, none all zero?", "probes_gpu:canary_hybrid"),
    Check("g canary engine", "Does the hardware engine give true pixels, none all zero?", "probes_gpu:canary_engine"),
    Check("g stream race", "Are pixels whole when the next batch is decoded at once?", "probes_gpu:stream_race"),
)
# Where the second alone fails, all that follows goes without that decoder. A cold start costs the first one's time.
CANARY_CHECKS = (
    Check("canary, no engine", "True pixels without the hardware decoder?", "measure_gpu:canary_without_engine", 25),
    Check("canary", "And with all decoders, as a lane has them?", "measure_gpu:canary", 20),
)
ALONE_CHECKS = (
    Check("index B/32", "`pipeline.index` from the page cache, images/s", "pipelines_gpu:index_b32", 65),
    Check("pipelines", "The three pipelines that Bing published, images/s", "pipelines_gpu:pipelines", 50),
    Check("image stage", "Decode and preprocess a batch of 32, ms", "measure_gpu:image_stage", 35),
    Check("rates B/32", "Model, decode, preprocess: each alone, rows/s", "measure_gpu:rates_b32", 45),
    Check("latency", "One picture, bytes to vector, batch 1, ms", "measure_gpu:latency", 30),
    Check("memory", "GPU memory of a B/32 lane; flat over 1,000 batches?", "measure_gpu:memory", 60),
    Check("compile ViT-L-14", "TensorRT, else AOTInductor", "prepare_gpu:compile_l14", 120),
    Check("index L/14", "`pipeline.index` from the page cache, images/s", "pipelines_gpu:index_l14", 75),
    Check("tests alone", "Do the GPU tests pass that weigh the whole GPU's memory?", "probes_gpu:gpu_tests_alone", 75),
    Check("rates CPU", "Decode, preprocess, model and texts on the CPU, rows/s", "measure_gpu:rates_cpu", 40),
    Check("rates L/14", "Model alone, images/s", "measure_gpu:rates_l14", 45),
    Check("index B/32 twice", "The same with two lanes on the GPU, images/s", "pipelines_gpu:index_b32_twice", 75),
    Check("replicas", "1, 2 and 4 engines on one GPU, images/s", "pipelines_gpu:replicas", 75),
    Check("decode mixes", "JPEG decode for each mix of decoders, images/s", "measure_gpu:decode_mixes", 45),
)
CHECKS = TOGETHER_CHECKS + CANARY_CHECKS + ALONE_CHECKS
