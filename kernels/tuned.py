"""Rows measured on a GPU by ``make gpu PART=tune``, which writes this file: read before the tables
of ``config``. Empty until a GPU has run it.

TILES       kernel -> arch -> (bits, limit, fields of Tile, why)
PLANS       arch -> (limit of rank, plan, why)
CONTEXT     arch -> library kernel
ONE_PASS    arch -> "triton" or "cuda"
FUSED_RANK  arch -> kernel -> the largest rank at which it beats the library
"""

TILES: dict[str, dict[str, tuple]] = {}
PLANS: dict[str, tuple] = {}
CONTEXT: dict[str, str] = {}
ONE_PASS: dict[str, str] = {}
FUSED_RANK: dict[str, dict[str, int]] = {}
