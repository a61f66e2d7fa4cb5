"""What semantic ids are worth, as numbers and as a page: how alike items of one prefix are, how evenly codes are used,
how many items share all codes, what the decoder cannot restore, and how long the tokens are.

The prefix table is that of Singh et al., "Better Generalization with Semantic IDs" (RecSys 2024), section 4.1.

Shapes: N items, V numbers of a content vector, L levels, K codes.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from raycascade import drawing
from raycascade.drawing import NONE, STYLE, number, percent
from raycascade.ragged import Ragged
from raycascade.semantic_ids.rqvae import unit_rows

LEAST_USED, LEAST_ENTROPY, MOST_COLLISIONS = 0.5, 0.6, 0.2  # beyond these the report warns
NUM_DECILES = 10


# ---------------------------------------------------------------- numbers
def quality(
    vectors_NV: np.ndarray, codes_NL: np.ndarray, impressions_N: np.ndarray, *, codes: int,
    errors: "tuple[np.ndarray, np.ndarray] | None" = None, tokens: Ragged | None = None, rows: int = 0,
) -> dict[str, Any]:
    """The report of items that have content, as plain numbers (None: not defined).

    `impressions_N`: of the training period; items with none are new. `errors`: ||x - x^||^2 and ||x||^2 of every item,
    as `RQVAE.errors` gives them. `tokens` of every item in a table of `rows`. Thresholds that are missed stand in
    "warnings", in words.
    """
    assert len(vectors_NV) == len(codes_NL) == len(impressions_N)
    new_N = impressions_N <= 0
    report: dict[str, Any] = {
        "items": len(codes_NL), "new_items": int(new_N.sum()), "impressions": int(impressions_N.sum()),
        "levels": codes_NL.shape[1], "codes": codes,
        "prefixes": prefix_table(vectors_NV, codes_NL),
        "usage": [{"level": level, "items": usage(codes_N, np.ones(len(codes_N)), codes),
                   "impressions": usage(codes_N, impressions_N, codes)}
                  for level, codes_N in enumerate(codes_NL.T, 1)],
        "collisions": collisions(codes_NL, impressions_N),
    }
    if errors is not None:
        report["error"] = error_table(*errors, impressions_N)
    if tokens is not None:
        report["tokens"] = token_table(tokens, impressions_N, rows)
    return report | {"warnings": warnings_of(report)}


def prefix_table(vectors_NV: np.ndarray, codes_NL: np.ndarray) -> list[dict[str, Any]]:
    """For n = 0 .. L: the mean pairwise cosine among items that share their first n codes, over groups of two or more:
    "mean" over groups, "by_pairs" over pairs; how many such groups there are, and the quartiles of all groups' sizes.

    With the sum S of a group's g unit vectors: (||S||^2 - g) / (g (g - 1)). A zero vector counts as any other.
    """
    assert len(codes_NL), "a report of no items"
    unit_NV = unit_rows(vectors_NV)
    own_N = np.square(unit_NV).sum(axis=1, dtype=np.float64)
    group_N, table = np.zeros(len(codes_NL), np.int64), []
    for n in range(codes_NL.shape[1] + 1):
        if n:
            _, group_N = np.unique(np.stack([group_N, codes_NL[:, n - 1]], axis=1), axis=0, return_inverse=True)
            group_N = group_N.reshape(-1)
        sizes_G = np.bincount(group_N)
        starts_G = np.cumsum(sizes_G) - sizes_G
        sums_GV = np.add.reduceat(unit_NV[np.argsort(group_N, kind="stable")], starts_G, axis=0, dtype=np.float64)
        pairs_G = sizes_G * (sizes_G - 1)
        likeness_G = np.square(sums_GV).sum(axis=1) - np.bincount(group_N, own_N)
        several_G = pairs_G > 0
        table.append({
            "n": n, "groups": int(several_G.sum()),
            "mean": _ratio(float((likeness_G[several_G] / pairs_G[several_G]).sum()), int(several_G.sum())),
            "by_pairs": _ratio(float(likeness_G[several_G].sum()), int(pairs_G.sum())),
            "sizes": np.quantile(sizes_G, (0.25, 0.5, 0.75)).tolist(),
        })
    return table


def usage(codes_N: np.ndarray, weights_N: np.ndarray, codes: int) -> dict[str, float | None]:
    """Of one level: share of the K codes in use, entropy / ln K, perplexity, and the largest share of one code."""
    mass_K = np.bincount(codes_N, weights_N.astype(np.float64), minlength=codes)
    if mass_K.sum() <= 0:
        return {"used": None, "entropy": None, "perplexity": None, "largest": None}
    share_K = mass_K[mass_K > 0] / mass_K.sum()
    entropy = float(-(share_K * np.log(share_K)).sum())
    return {"used": len(share_K) / codes, "entropy": entropy / math.log(codes), "perplexity": math.exp(entropy),
            "largest": float(share_K.max())}


def collisions(codes_NL: np.ndarray, impressions_N: np.ndarray) -> dict[str, float | int | None]:
    """Items that share all codes with another: 1 - distinct / items, the largest bucket, their share of impressions."""
    _, bucket_N, sizes_B = np.unique(codes_NL, axis=0, return_inverse=True, return_counts=True)
    shared_N = sizes_B[bucket_N.reshape(-1)] > 1
    return {"share": 1.0 - len(sizes_B) / len(codes_NL), "largest": int(sizes_B.max()),
            "impressions": _ratio(float(impressions_N[shared_N].sum()), float(impressions_N.sum()))}


def error_table(lost_N: np.ndarray, whole_N: np.ndarray, impressions_N: np.ndarray) -> dict[str, Any]:
    """Relative error of the decoder, sum ||x - x^||^2 / sum ||x||^2: of the training items, of each tenth of them from
    the least to the most shown (empty where they are fewer than ten), and of new items."""
    old_N = np.flatnonzero(impressions_N > 0)
    by_popularity = old_N[np.argsort(impressions_N[old_N], kind="stable")]
    tenths = np.array_split(by_popularity, NUM_DECILES) if len(old_N) >= NUM_DECILES else []

    def relative(rows: np.ndarray) -> float | None:
        return _ratio(float(lost_N[rows].sum()), float(whole_N[rows].sum()))

    return {"training": relative(old_N), "deciles": [relative(rows) for rows in tenths],
            "new": relative(np.flatnonzero(impressions_N <= 0))}


def token_table(tokens: Ragged, impressions_N: np.ndarray, rows: int) -> dict[str, Any]:
    """Mean tokens of an item and of an impression, share of impressions with one token, rows that no item has."""
    lengths_N, shown = tokens.lengths_Q, float(impressions_N.sum())
    used = len(np.unique(tokens.values.to_numpy(zero_copy_only=False)))
    return {"rows": rows, "unused_rows": max(0, rows - 2) - used, "per_item": _ratio(float(lengths_N.sum()),
            len(lengths_N)), "per_impression": _ratio(float((lengths_N * impressions_N).sum()), shown),
            "one_token": _ratio(float(impressions_N[lengths_N == 1].sum()), shown)}


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """What a person should look at, one sentence each."""
    found = []
    for level in report["usage"]:
        used, entropy = level["items"]["used"], level["items"]["entropy"]
        if used is not None and used < LEAST_USED:
            found.append(f"level {level['level']} uses {percent(used)} of its {report['codes']} codes, less than "
                         f"{percent(LEAST_USED)}: lower rqvae.codes or train for more steps")
        if entropy is not None and entropy < LEAST_ENTROPY:
            found.append(f"level {level['level']} has an entropy of {entropy:.2f} ln K, less than {LEAST_ENTROPY}: a "
                         "few codes hold most items")
    likeness = [(row["n"], row["mean"]) for row in report["prefixes"] if row["mean"] is not None]
    for (_, before), (n, now) in pairwise(likeness):
        if now <= before:
            found.append(f"items that share {n} codes are no more alike (cosine {now:.3f}) than those that share fewer "
                         f"({before:.3f}): level {n} adds nothing")
    share = report["collisions"]["share"]
    if share is not None and share > MOST_COLLISIONS:
        found.append(f"{percent(share)} of the items share all codes with another, more than "
                     f"{percent(MOST_COLLISIONS)}: raise rqvae.levels or rqvae.codes")
    return found


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


# ---------------------------------------------------------------- the page
def render_page(title: str, report: Mapping[str, Any], *, curves: "Mapping[str, drawing.Points] | None" = None) -> str:
    """A whole HTML file; the same report gives the same bytes. `curves`: parts of the loss -> (step, value)."""
    head = escape(title)
    lead = f"{number(report['items'])} items, {report['levels']} levels of {report['codes']} codes."
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{head}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"<header><h1>{head}</h1><p class='lead'>{lead}</p></header>\n<main>\n"
        f"{render_sections(report)}{_training(curves or {})}</main>\n</body></html>\n"
    )


def render_sections(report: Mapping[str, Any]) -> str:
    """The report as sections of a page; what was not measured is left out."""
    return "".join(part(report) for part in (_warnings, _prefixes, _usage, _collisions, _errors, _tokens))


def _warnings(report: Mapping[str, Any]) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in report["warnings"])
    return drawing.section("Warnings", "", f"<ul>{lines}</ul>") if lines else ""


def _prefixes(report: Mapping[str, Any]) -> str:
    columns = ["Codes shared", "Groups of two or more", "Mean cosine", "Weighted by pairs", "Group sizes, 25-50-75%"]
    rows = [[str(row["n"]), number(row["groups"]), number(row["mean"]), number(row["by_pairs"]),
             " - ".join(f"{size:g}" for size in row["sizes"])] for row in report["prefixes"]]
    names = {"mean": "mean over groups", "by_pairs": "weighted by pairs"}
    series = {name: [(row["n"], row[key]) for row in report["prefixes"] if row[key] is not None]
              for key, name in names.items()}
    chart = ""
    if all(series.values()):
        slots = [(str(row["n"]), "codes") for row in report["prefixes"]]
        said = ", ".join(f"{n} codes {y:.3f}" for n, y in series["mean over groups"])
        chart = drawing.figure("Cosine of items that share a prefix", f"Mean over groups: {said}.",
                               drawing.plot(series, slots=slots), list(series))
    text = ("How alike the content of items is that share their first n codes; no code: any two items. It must rise "
            "from code to code, and the first codes should leave large groups.")
    return drawing.section("Prefixes", text, drawing.beside(chart) + drawing.table("Prefixes", columns, rows))


def _usage(report: Mapping[str, Any]) -> str:
    rows, groups = [], []
    for level in report["usage"]:
        name, items, shown = f"level {level['level']}", level["items"], level["impressions"]
        rows.append([name, *(_share(items[key]) for key in ("used", "entropy")), number(items["perplexity"]),
                     _share(items["largest"]), *(_share(shown[key]) for key in ("used", "entropy", "largest"))])
        shares = [(style, items[key]) for style, key in enumerate(("used", "entropy")) if items[key] is not None]
        groups.append((name, [(style, share, percent(share)) for style, share in shares]))
    said = ", ".join(f"{name} {bars[0][2]} of its codes used" for name, bars in groups if bars)
    figure = drawing.figure("Use of the codes", f"By items: {said}.", drawing.bars(groups),
                            ["codes used", "entropy of ln K"])
    columns = ["Level", "Used", "Entropy", "Perplexity", "Largest", "Used, by impressions", "Entropy, by impressions",
               "Largest, by impressions"]
    text = ("Share of the codes in use, and how evenly: entropy as a share of ln K (100%: all alike), perplexity as a "
            "number of codes, and the share of the most frequent code.")
    return drawing.section("Codes", text, drawing.beside(figure) + drawing.table("Use of the codes", columns, rows))


def _collisions(report: Mapping[str, Any]) -> str:
    found = report["collisions"]
    rows = [["items beyond the first of their codes", _share(found["share"])],
            ["largest group with equal codes", number(found["largest"])],
            ["impressions of items with equal codes", _share(found["impressions"])]]
    text = "To a model that sees nothing else of them, items with equal codes are one. As a feature that is harmless."
    return drawing.section("Collisions", text, _narrow("Collisions", rows))


def _errors(report: Mapping[str, Any]) -> str:
    if "error" not in report:
        return ""
    found = report["error"]
    named = [("training items", found["training"]), ("new items", found["new"])]
    named += [(f"tenth {i}", error) for i, error in enumerate(found["deciles"], 1)]
    bars = [(name, [(0, error, number(error))]) for name, error in named if error is not None]
    said = ", ".join(f"{name} {number(error)}" for name, error in named if error is not None)
    figure = drawing.figure("Relative error of the decoder", f"{said}.", drawing.bars(bars), []) if bars else ""
    text = ("Squared error of the restored vectors over the squares of the vectors: 0 is perfect, 1 says no more than "
            "the mean. Tenths of the training items go from the least to the most shown; new items were not shown in "
            "the training period.")
    return drawing.section("Error", text, drawing.beside(figure)) if figure else ""


def _tokens(report: Mapping[str, Any]) -> str:
    if "tokens" not in report:
        return ""
    found = report["tokens"]
    rows = [["rows of the table", number(found["rows"])], ["rows that no item has", number(found["unused_rows"])],
            ["tokens of an item", number(found["per_item"])],
            ["tokens of an impression", number(found["per_impression"])],
            ["impressions with one token", _share(found["one_token"])]]
    return drawing.section("Tokens", "", _narrow("Tokens", rows))


def _training(curves: Mapping[str, "drawing.Points"]) -> str:
    if not any(curves.values()):
        return ""
    said = ", ".join(f"{name} from {number(p[0][1])} to {number(p[-1][1])}" for name, p in curves.items())
    chart = drawing.plot({name: drawing.thin(points) for name, points in curves.items()}, x_title="step")
    figure = drawing.figure("Training loss by step", f"{said}.", chart, list(curves))
    return drawing.section("Training", "", drawing.beside(figure))


def _narrow(caption: str, rows: Sequence[Sequence[str]]) -> str:
    return f"<div class='narrow'>{drawing.table(caption, ['Figure', 'Value'], rows)}</div>"


def _share(value: float | None) -> str:
    return NONE if value is None else percent(value)


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures for a terminal: what is shown at the end of `raycascade semantic-ids`."""
    def by_level(key: str) -> Sequence[float | None]:
        return [level["items"][key] for level in report["usage"]]

    return {"items": report["items"], "new_items": report["new_items"],
            "prefix_cosine": [row["mean"] for row in report["prefixes"]], "codes_used": by_level("used"),
            "entropy": by_level("entropy"), "collisions": report["collisions"]["share"],
            "error": report.get("error", {}).get("training"), "error_of_new_items": report.get("error", {}).get("new"),
            "tokens_per_impression": report.get("tokens", {}).get("per_impression"), "warnings": report["warnings"]}
