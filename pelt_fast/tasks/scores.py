"""Scores of a study's runs: the number that ranks a run, means over seeds, comparisons."""

import statistics


def score(row: dict) -> float:
    """The number that ranks a run; higher is better. A translation's is its negative loss, since
    the paper selects by perplexity there."""
    metrics = row["metrics"]
    ranked = ("accuracy", "matched", "rouge2")
    return next((metrics[name] for name in ranked if name in metrics), -metrics.get("loss", 0.0))


def compared(first: list[float], second: list[float]) -> str:
    """A sentence: whether two means differ by more than two standard errors of the difference."""
    if min(len(first), len(second)) < 2:
        return "one seed: not judged"
    (a, da), (b, db) = mean_and_deviation(first), mean_and_deviation(second)
    bound = 2 * (da**2 / len(first) + db**2 / len(second)) ** 0.5
    digits = digits_of(a)
    apart, error = f"{a - b:+.{digits}f}", f"{bound:.{digits}f}"
    if abs(a - b) <= bound:
        return f"level: {apart}, inside two standard errors ({error})"
    better = "the first" if a > b else "the second"
    return f"{better} is better: {apart}, two standard errors are {error}"


def digits_of(scored: float) -> int:
    """Decimals to show: one of a percentage, three of a loss (given as a negative number)."""
    return 3 if scored < 0 else 1


def mean_and_deviation(numbers: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; the deviation of a single number is None."""
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None
