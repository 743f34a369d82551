"""What a compiled kernel must keep to on each target."""

SHARED_LIMIT = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
REGISTERS = {"gfx942": 512}  # with the accumulation registers; 255 on NVIDIA
# the second stage reads rows of R numbers, however few
STREAMING_EXCEPT = {"reduce_parts_kernel"}


def problems(target: str, row: dict) -> list[str]:
    """What is wrong with one compiled kernel."""
    counts = row["counts"]
    nvidia, half = target.startswith("sm"), row["dtype"] in ("fp16", "bf16")
    # sizes of 1 and sizes that divide nothing have no fast path: they are to compile, and be exact
    ugly = row["launch"].startswith(("ugly", "huge"))
    claims = {
        "spills": row["spills"] == 0 or ugly,
        "uses fp64": counts["fp64"] == 0,
        "needs more shared memory than there is": row["shared"] <= SHARED_LIMIT[target],
        "needs more registers than there are": row["registers"] <= REGISTERS.get(target, 255),
        "multiplies a stride in 32 bits": counts["narrow_strides"] == 0,
        "computes fp32 products in tf32": counts["tf32"] == 0,
        "has a race of asynchronous work": counts["races"] == 0,
    }
    if row["launch"].startswith("huge"):
        claims["has no 64-bit product in its addresses"] = counts["long_products"] > 0
    if row["streaming"] and row["kernel"] not in STREAMING_EXCEPT:
        claims["has no 16-byte access"] = counts["wide"] > 0
    if target == "sm90" and half:
        claims["has a large dot that is not wgmma"] = counts["slow_dots"] == 0
    if counts["dots"] and half and not ugly:
        claims["has dots without tensor cores"] = counts["wgmma"] + counts["mma"] > 0
    if target == "gfx942" and counts["dots"]:
        claims["has dots without mfma"] = counts["mma"] > 0
    if nvidia and "descriptor" in row["kernel"] and target != "sm80":
        claims["has no bulk tensor copy"] = counts["tma"] > 0
    return [claim for claim, holds in claims.items() if not holds]
