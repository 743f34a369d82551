"""Rows measured on a GPU by ``make gpu PART=tune``, which writes this file: read before the tables
of ``config``. Empty until a GPU has run it.

TILES    kernel -> arch -> (bits, limit, fields of Tile, why)
PLANS    arch -> (limit of rank, plan, why)
CONTEXT  arch -> library kernel
"""

TILES: dict[str, dict[str, tuple]] = {}
PLANS: dict[str, tuple] = {}
CONTEXT: dict[str, str] = {}
