"""Adapters: from their files through SGLang's pool to kt_kernels, at start and at run time."""
