"""What the ops run today: the same maths as ``reference/`` on the library's GEMMs and attention.

Plain PyTorch, so it runs wherever torch does, but written for traffic: rank updates accumulate
into the big output (beta = 1), nothing of the big activation's size is cast or copied, and what
must be done elementwise is done in blocks of rows that stay in cache. Every function takes and
returns exactly what its namesake in ``reference/`` does.
"""
