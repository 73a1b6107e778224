"""From files to kt_kernels: SGLang's loader, quantized folders, the packed cache, and what must not stay unwritten."""
