"""Prints the verdicts on eight victims, two honest and six broken, as Markdown.

    python benchmarks/victims.py --images 500

Trains a small classifier of digits plainly and adversarially (seconds), breaks it in six ways, and
asks of each whether its robust accuracy under PGD can be believed.  ``best attack`` is what
all attacks of the examination together leave, image by image: where it is far below ``reported``
the figure was not true.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]


def rows(images: int, num_queries: int):
    """Yields (victim, seconds, verdict, expected check) for each victim."""
    sys.path.insert(0, str(ROOT / "tests"))
    import jax
    import victims

    from robust_ssl import threats
    from robust_ssl.evaluation import checks

    pixels, labels = (part[:images] for part in victims.digits()[1])
    for name, model in victims.all_victims().items():
        begun = time.perf_counter()
        verdict = checks.examine(
            model,
            pixels,
            labels,
            threat=threats.Linf(victims.EPSILON),
            key=jax.random.key(5),
            num_queries=num_queries,
            batch_size=images,
        )
        yield name, time.perf_counter() - begun, verdict, victims.EXPECTED.get(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--num-queries", type=int, default=200)
    options = parser.parse_args()
    print("| victim | reported | best attack | verdict | failed | notes | expected | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, seconds, verdict, expected in rows(options.images, options.num_queries):
        listed = [
            ", ".join(f"`{check}`" for check in verdict.names(status)) or "none"
            for status in ("failed", "note")
        ]
        shares = [f"{100 * verdict.accuracies[kind]:.1f} %" for kind in ("reported", "worst")]
        aim = f"`{expected}`" if expected else "none"
        cells = [name, *shares, verdict.word, *listed, aim, f"{seconds:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
