"""Tables of what a block is made of, and of what whole models cost."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import provenance, short, table

Result = dict[str, Any]


def block_table(result: Result) -> str:
    """Tabulate `benchmarks.block`: losses over the base's, of each part alone and of those that were joined."""
    names = list(result["data"])
    best = {row["block"]: row for row in result["best"]}
    rows = []
    for row in result["alone"]:
        own = best.get(row["block"])
        losses = [_loss(row["loss"].get(name)) for name in names]
        rows.append([row["block"], *losses, _over(row), "" if own is None else _over(own)])
    head = ["changed in the base", *(f"loss, {name}" for name in names), "÷ base", "÷ base, own rate and all the time"]
    return (
        table(head, rows)
        + "\n"
        + table(
            ["joined, the best first", "÷ base", "stays"],
            [[row["block"], _over(row), "yes" if row["stays"] else "no"] for row in result["together"]],
        )
        + f"\nValidation losses of size {result['size']} with seed {result['seeds'][0]}; all the time is, of the "
        + f"processor, {_seconds(result)}, and in the first columns {result['share_of_time_alone']:g} of it, at "
        + f"the base's best learning rates, {_base_rates(result)}. {_winner(result)}"
        + _origin(result)
    )


def rates_table(result: Result) -> str:
    """Tabulate `benchmarks.block --own-rates`: losses by learning rate of each block, and its best over the base's."""
    parts, cells = result["parts"], result["cells"]
    rates = sorted({cell["rate"] for cell in cells})
    words = {(parts[cell["block"]], cell["data"], cell["rate"]): _loss(cell["val_loss"]) for cell in cells}
    rows = [
        [row["block"], name, *(words.get((row["block"], name, rate), "") for rate in rates), _over(row)]
        for row in result["best"]
        for name in result["data"]
    ]
    return (
        table(["block", "data", *(f"loss at {rate:g}" for rate in rates), "best ÷ base's best"], rows)
        + f"\nValidation losses of size {result['size']} with seed {result['seeds'][0]}, after, of the processor, "
        + f"{_seconds(result)}. {_origin(result)}"
    )


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else short(loss)


def _seconds(result: Result) -> str:
    return ", ".join(f"{of['seconds']:g} s ({name}, {of['tokens']:,} tokens)" for name, of in result["data"].items())


def _origin(result: Result) -> str:
    return f"Trained at {', '.join(sorted({cell['commit'] for cell in result['cells']}))}. {provenance(result)}\n"


def _over(row: Result) -> str:
    return "diverged" if row["over_base"] is None else f"{row['over_base']:.3f}"


def _base_rates(result: Result) -> str:
    found = {
        name: {float(rate): loss for rate, loss in grid.items() if loss is not None}
        for name, grid in result["base"]["rates"].items()
    }
    return ", ".join(f"{min(grid, key=lambda rate: grid[rate]):g} ({name})" for name, grid in found.items())


def _winner(result: Result) -> str:
    found = result["winner"]
    ratios = ", ".join(f"{row['over_base']:.3f} ({row['data']}, seed {row['seed']})" for row in found["seeds"])
    return f"Chosen: {found['block']}; with seeds that chose nothing its loss over the base's is {ratios}. "


def cost_table(result: Result) -> str:
    """Tabulate `benchmarks.cost`: how many times faster than attention, and the memory of a training step."""
    faster, weights = result["times_faster_than_attention"], result["megabytes"]
    contenders = list(dict.fromkeys(name for found in weights.values() for name in found))
    rows = [
        [
            name,
            *(f"{found[name]:.2f}×" if found.get(name) else "" for found in faster.values()),
            *(f"{found[name]:,.0f} MB" if name in found else "" for found in weights.values()),
            f"{power:.2f}" if (power := result["exponents"].get(name)) else "",
        ]
        for name in contenders
    ]
    head = ["model", *(f"{int(tokens):,} tokens" for tokens in faster), *(f"{int(t):,}, memory" for t in weights)]
    settings = result["settings"]
    return (
        table([*head, "exponent"], rows)
        + f"\nOne image, forward and backward, times faster than attention; models of size {settings['size']} with "
        + f"{settings['parameters']:,} parameters, as near as 2 %. {provenance(result)}\n"
    )
