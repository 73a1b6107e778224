"""safetensors files: their headers, their tensors as stored, and writing them piece by piece."""
