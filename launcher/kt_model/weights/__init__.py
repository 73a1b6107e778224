"""Expert weights as files: read from a checkpoint (experts.py), written as shards (shards.py), quantized into a folder
with a manifest (folder.py, quantizing.py), or merged with an adapter into a checkpoint (merging.py).

Not here: arithmetic of the methods (kt_kernels), what a running server loads (the plugin).
"""
