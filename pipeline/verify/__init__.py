"""Names what is wrong in an index, and repairs it."""
