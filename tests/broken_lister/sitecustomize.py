"""On the path of a child process, this makes it die, hang or eat memory over tars of certain names."""

import os
import time

from pipeline.sources import tar_shards

members = tar_shards._members


def broken(file, shard):  # type: ignore[no-untyped-def]
    if shard.startswith("eat"):
        bytearray(1 << 40)
    for number, member in enumerate(members(file, shard)):
        if number == 2 and shard.startswith("abort"):
            os.write(2, b"Check failed: a broken statistic\n")
            os.abort()
        if number == 2 and shard.startswith("hang"):
            time.sleep(3600)
        yield member


tar_shards._members = broken
