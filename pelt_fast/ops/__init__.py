"""One folder an op, the same five files in each, read in this order.

``api`` checks what a user gives, ``op`` has the schema, the fake and autograd's Function,
``reference`` is the specification, ``cpu`` runs the library's GEMMs and the C++ passes, ``gpu`` the
kernels. ``common`` is what they share. Imports go one way: api, op, then the three, then common.
"""
