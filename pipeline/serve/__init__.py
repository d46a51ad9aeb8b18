"""`python -m pipeline.serve`: an index over HTTP, for years. The folder reads from outside in:

guard (who may) -> lifeline (how long, how much) -> app (routes) -> answers, embeddings, renditions
shown: the generation that is answered from     batcher, embedder: texts and pictures -> vectors
decoders, decoder_process: hostile bytes, decoded in confined child processes
"""
