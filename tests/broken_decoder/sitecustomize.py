"""On the path of a child process, this makes its JPEG decoder crash on one mark in the bytes and hang on another."""

import os
import signal
import time

import simplejpeg

import pipeline.stages_cpu

decode_jpeg = simplejpeg.decode_jpeg


def broken(data: bytes, *args: object, **kwargs: object) -> object:
    if data.endswith(b"CRASH-HERE"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith(b"HANG-HERE"):
        time.sleep(3600)
    return decode_jpeg(data, *args, **kwargs)


simplejpeg.decode_jpeg = broken
pipeline.stages_cpu.DEADLINE_S = 3.0
