"""What the ops run on a GPU: the Triton kernels of ``kernels/`` beside the library's GEMMs.

Each module mirrors one of ``plans/``: same functions, same arguments, same results. Imported on the
first call, as Triton is.
"""
