"""Expert weights as files: quantized into a folder with a manifest (folder.py, quantizing.py), cached in the kernels'
packed form (packed.py), or merged with an adapter into a checkpoint (merging.py).

Not here: reading experts from a checkpoint (kt_model/experts.py), the methods' arithmetic (kt_kernels), loading into a
running server (the plugin).
"""
