"""Exit codes, the same for every command (docs/design.md, section 2)."""

DONE = 0
FAILED = 1
USAGE = 2  # usage, configuration, or something the user has to provide
MANY_QUARANTINED = 3  # done, but more newly quarantined than allowed
LOCKED = 4  # another run writes to the index
BUDGET_SPENT = 5  # what was done is published; the same command goes on
MANY_DELETED = 6  # the source lost so much that a person should look first
DAMAGED = 7  # verify found what is not as it was written
INTERRUPTED = 130  # the same command goes on
