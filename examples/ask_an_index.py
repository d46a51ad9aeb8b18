"""What a program can ask an index, step by step. Run it on any index; with the one that `make demo` leaves:

    python examples/ask_an_index.py demo-out/index "a blue star"

Each step prints what it found. `docs/search.md` explains queries, filters and relevance.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from pipeline.search import Index, Query, Term, Where
from pipeline.search.export_rows import batches, to_parquet, to_usearch

folder, text = Path(sys.argv[1]), sys.argv[2]

# %% Open it once. It answers from the generation that was shown now, also while newer ones are published.
index = Index.open(folder)
print(f"generation {index.generation.number}: {index.generation.rows} pictures, vectors of {index.generation.dim}")

# %% A text. Rows, cosines and relevance are numpy arrays, best first; what describes them is read when asked for.
found = index.search(text, k=9)
print(f"\n{text!r}:", np.round(found.scores, 3), np.round(found.relevance, 2))
for hit in found.hits[:3]:
    print(f"  {hit.relevance:4.0%}  {hit.score:.3f}  {hit.key}  {hit.metadata}")

# %% The same text in several sentences, averaged.
ensemble = index.search(index.parse(text, ["a photo of {}", "a drawing of {}", "{}"]))
print("\nprompt ensemble:", ensemble.keys[:3])

# %% More like the best answer, but away from the text: as people write it, and the same from its parts.
best = found.keys[0]
print("\nlike it, less so:", index.search(f'key:"{best}" - 0.5 * "{text}"', k=3).keys)
query = Query((Term(key=best), Term(text=text, weight=-0.5)))
print("the same again:  ", index.search(query, k=3).keys)

# %% Pages, without near-duplicates, and with more variety.
first, second = (index.search(text, k=5, offset=offset, group=True) for offset in (0, 5))
assert first.groups is not None
print("\npages:", first.rows, second.rows, "copies of the best:", len(first.groups[0]) - 1)
print("variety:", index.search(text, k=9, mmr=0.5).keys)

# %% Filters, and what there is to choose from.
facets = index.facets()
for name, counts in facets.items():
    print(f"\n{name}:", counts[:5])
if "label" in facets:
    label = facets["label"][0][0]
    only = index.search(text, where=Where(label=label))
    print(f"only {label!r}: {only.total} pictures, the best is {only.keys[0]}")

# %% All rows as Arrow batches: here, the mean vector. Memory stays flat, whatever the size of the index.
total = np.zeros(index.generation.dim)
for batch in batches(index):
    total += np.stack(batch["embedding"].to_numpy(zero_copy_only=False)).astype(np.float64).sum(axis=0)
print("\nlength of the mean vector:", round(float(np.linalg.norm(total / index.generation.rows)), 3))

# %% For other tools.
with tempfile.TemporaryDirectory() as out:
    print("rows in Parquet:", to_parquet(index, Path(out) / "rows.parquet"))
    print("rows in USearch:", to_usearch(index, Path(out) / "rows.usearch"))

index.close()
