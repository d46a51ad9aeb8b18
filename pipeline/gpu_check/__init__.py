"""make gpu-check: asks a GPU host what its libraries really do, and how fast."""
