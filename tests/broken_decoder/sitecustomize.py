"""On the path of a child process, this makes its JPEG decoder crash on one mark in the bytes and hang on another."""

import signal
import threading
import time

import simplejpeg

import pipeline.stages_cpu

decode_jpeg = simplejpeg.decode_jpeg


def broken(data: bytes, *args: object, **kwargs: object) -> object:
    if data.endswith(b"CRASH-HERE"):
        signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)  # here and now, as a decoder's own
    if data.endswith(b"HANG-HERE"):
        time.sleep(3600)
    return decode_jpeg(data, *args, **kwargs)


simplejpeg.decode_jpeg = broken
pipeline.stages_cpu.DEADLINE_S = 3.0
