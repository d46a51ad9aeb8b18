"""USearch, loaded so that it can stand beside ONNX Runtime. Import it where rows are exported to it, nowhere else.

USearch's wheel carries a C++ library of its own and makes part of it visible to whatever is loaded later: ONNX Runtime
then mixes the two, and dies with SIGSEGV while it is imported (seen: USearch 2.26.6, ONNX Runtime 1.31.1). The system's
library, made visible first, is what both of them find.
"""

import ctypes

ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)

from usearch.index import Index  # noqa: E402

__all__ = ["Index"]
