"""What others have published, to stand beside our figures. Their hardware is not ours: only shapes and ratios compare.

Study: "CLIP image retrieval" (IPC24), 500,000 pictures of iNaturalist 2021, ViT-B/32; seconds read from the vector
paths of its figures 4 to 10. UForm: the text encoder table of its release notes, and its BENCHMARKS.md.
"""

from __future__ import annotations

STUDY_IMAGES = 500_000
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SEED_THREADS = (1, 2, 4, 8)  # of 1 to 32 in the study

# Figure 4: seconds of preprocess and forward by OMP_NUM_THREADS (number of samples not stated).
STAGES_BY_THREADS_S = {
    "preprocess": {1: 56.65, 2: 64.91, 4: 57.9, 8: 57.38, 16: 61.44, 32: 60.4},
    "forward": {1: 29.72, 2: 20.17, 4: 11.07, 8: 7.22, 16: 6.01, 32: 6.06},
}
# Figure 5: one picture at a time.
ONE_BY_ONE_S = {"Taiwania 3 CPU": 29072.95, "cluster CPU": 23553.19, "V100": 13678.17}
# Figure 6: by batch size.
BY_BATCH_S: dict[str, dict[int, int]] = {
    "Taiwania 3 CPU": dict(
        zip(BATCHES, (29073, 17075, 11240, 8182, 6267, 6742, 5094, 5984, 4648, 4589, 4455, 4292), strict=True)
    ),
    "cluster CPU": dict(zip(BATCHES, (23553, 15487, 11092, 9043, 8627, 7649, 9785, 8167, 9206, 12116), strict=False)),
    "V100": dict(zip(BATCHES, (13678, 7870, 5049, 3550, 3460, 3113, 3208, 3401, 3297, 3134, 3223), strict=False)),
}
# Figure 7: batched, then with producers: before, after.
PRODUCERS_S = {
    "Taiwania 3 CPU, 3 producers x 27 threads": (4456.92, 1934.07),
    "cluster CPU, 5 producers x 30 threads": (9789.25, 5895.83),
}
# Figure 8: one CPU and one GPU model, 10 producers x 20 threads.
SHARING_S = {"static": 1018.87, "dynamic": 617.45}
# Figure 9: by number of models.
BY_REPLICAS_S = {
    "Taiwania 3 CPU": {1: 1934.07, 2: 1651.8, 3: 1642.29, 4: 1094.07, 5: 1734.3},
    "V100": {1: 617.45, 2: 513.44, 4: 507.09},
}
# Figure 10: the whole ladder, first and last rung. The text claims 23.68 x for the V100; its figure gives 26.97.
WHOLE_S = {
    "Taiwania 3 CPU": (29072.95, 1094.07), "cluster CPU": (23553.19, 2796.5), "V100": (13678.17, 507.09),
}  # fmt: skip

# UForm's release notes; batch and length are not stated.
TEXT_TOWERS_ON = "RTX 3090, batch and length not stated"
TEXT_SEQUENCES_PER_S = {
    "bert-base-uncased": 1612, "distilbert-base-uncased": 3174, "MiniLM-L12": 3604, "MiniLM-L6": 6107, "uform": 6809,
    "a SaaS product": 20787,
}  # fmt: skip
# UForm's BENCHMARKS.md.
ENCODERS_ON = "UForm's small model, torch, batches of 50, H100"
ENCODERS_PER_S = {
    "images preprocessed": 22.63, "images encoded": 2662.0, "texts preprocessed": 14731.0, "texts encoded": 14695.0,
}  # fmt: skip
