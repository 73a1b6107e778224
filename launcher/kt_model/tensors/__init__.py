"""safetensors files: their headers, their tensors as they lie on disk, and writing them in pieces."""
